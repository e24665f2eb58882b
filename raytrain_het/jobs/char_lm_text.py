"""The text of the language-model job, and the windows that are cut from it. Without torch."""

from __future__ import annotations

import functools
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np

from raytrain_het.errors import ConfigError
from raytrain_het.jobs.char_lm_config import CharLMJob


def library_text(max_characters: int | None) -> bytes:
    """The modules of the standard library, in order of their names, joined."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(path for path in folder.glob("*.py") if path.is_file())
    if max_characters is None:
        files += sorted(path for path in folder.glob("*/*.py") if path.parent.name != "site-packages")
    # What was found when this Python was built differs between builds of the same version.
    files = [p for p in files if not p.name.startswith("_sysconfigdata") and not p.parent.name.startswith("config-")]
    text = b"".join(path.read_text("utf-8", "replace").encode("ascii", "replace") for path in files)
    if not text:
        raise ConfigError(
            f"the standard library's source text is not in {folder}: a Python without it cannot train the job "
            "'char_lm'. Install Python with its sources, or train another job."
        )
    return text[:max_characters]


def window_starts(characters: int, context: int, seed: int) -> tuple[Any, int]:
    """Where windows of a text begin, in an order by seed, and how many of them are to train on: all but a fifth.

    Raises:
        ConfigError: the text is too short for two.
    """
    starts = np.arange(0, characters - context - 1, context)
    order = np.random.default_rng(seed).permutation(starts)
    num_train = len(order) - max(1, len(order) // 5)
    if num_train < 1:
        raise ConfigError(
            f"context={context} leaves {len(order)} windows of {characters} characters: allowed are two or more, one "
            f"to train on and one held out. Write --set context={max(2, (characters - 2) // 10)}, or more "
            "max_characters"
        )
    return order, num_train


def num_samples(job: CharLMJob) -> int:
    """That a job trains on."""
    return window_starts(_num_characters(job.max_characters), job.context, 0)[1]


@functools.lru_cache(maxsize=1)
def _num_characters(most: int | None) -> int:
    return len(library_text(most))


def check(job: CharLMJob) -> list[str]:
    """Read the text before any worker is started, for the sake of early errors; there is nothing to warn of.

    Raises:
        ConfigError: the text is not there, or too short for the windows.
    """
    num_samples(job)
    return []
