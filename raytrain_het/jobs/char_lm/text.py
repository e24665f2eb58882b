"""The text of the language-model job, and the windows that are cut from it. Without torch."""

from __future__ import annotations

import functools
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np

from raytrain_het.errors import ConfigError


def library_text(max_characters: int | None) -> bytes:
    """The source text of the standard library's modules, joined in the order of their names, as ASCII.

    Raises:
        ConfigError: This Python comes without its sources.
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(path for path in folder.glob("*.py") if path.is_file())
    if max_characters is None:
        files += sorted(path for path in folder.glob("*/*.py") if path.parent.name != "site-packages")
    # These files record how this Python was built, and differ between builds of the same version.
    files = [p for p in files if not p.name.startswith("_sysconfigdata") and not p.parent.name.startswith("config-")]
    text = b"".join(path.read_text("utf-8", "replace").encode("ascii", "replace") for path in files)
    if not text:
        raise ConfigError(
            f"the standard library's source text is not in {folder}: a Python without it cannot train the job "
            "'char_lm'. Install Python with its sources, or train another job."
        )
    return text[:max_characters]


def window_starts(characters: int, context: int, seed: int) -> tuple[Any, int]:
    """Where the windows of a text begin, shuffled by a seed, and how many of the first ones are to train on: four
    fifths.

    Raises:
        ConfigError: The text is too short for two windows.
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


@functools.lru_cache(maxsize=1)
def num_characters(max_characters: int | None) -> int:
    """The length of :func:`library_text`, read once for a sweep's many jobs."""
    return len(library_text(max_characters))
