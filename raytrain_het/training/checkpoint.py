"""Checkpoints: what is in the directory, and who may put it where.

Format 1, one directory per report, named ``checkpoint_<step>_<ordinal>``:

- ``het.json``: format, cursor (epoch, offset, step), generation (the table version in force), layout fingerprint,
  parameter names and shapes, world size;
- ``state.pt``: ``model``, ``optimizer`` and ``registered`` state dictionaries (``torch.save``);
- ``worker_<slot>.pt``: what is a worker's own: its random states, and its codec's state by parameter name.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from raytrain_het.errors import CheckpointError

FORMAT = 1


class Storage(Protocol):
    """Where checkpoints go."""

    def persist(self, local_dir: str, name: str) -> str:
        """Store a local directory under this name; returns its path there. All or nothing."""
        ...

    def fetch(self, path: str) -> contextlib.AbstractContextManager[str]:
        """A local directory with a stored checkpoint's files."""
        ...

    def delete(self, path_or_name: str) -> None:
        """Remove what a failed :meth:`persist` may have left."""
        ...


class LocalStorage:
    """A directory on this machine or a shared file system."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)

    def persist(self, local_dir: str, name: str) -> str:
        """Copy to a temporary name, then rename: nobody ever sees half a checkpoint."""
        final, part = self.root / name, self.root / f".{name}.{os.getpid()}.part"
        self.root.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(local_dir, part)
        shutil.rmtree(final, ignore_errors=True)
        part.rename(final)
        return str(final)

    @contextlib.contextmanager
    def fetch(self, path: str) -> Iterator[str]:
        """The directory itself."""
        yield path

    def delete(self, path_or_name: str) -> None:
        """Remove a checkpoint and its temporary part."""
        name = Path(path_or_name).name
        shutil.rmtree(self.root / name, ignore_errors=True)
        shutil.rmtree(self.root / f".{name}.{os.getpid()}.part", ignore_errors=True)


def random_states() -> dict[str, Any]:
    """The states of the generators that training code draws from."""
    states = {"torch": torch.get_rng_state(), "numpy": np.random.get_state(), "python": random.getstate()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_states(states: dict[str, Any]) -> None:
    """The inverse of :func:`random_states`."""
    torch.set_rng_state(states["torch"])
    np.random.set_state(states["numpy"])
    random.setstate(states["python"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def write(directory: str, meta: dict[str, Any], state: dict[str, Any], workers: dict[int, dict[str, Any]]) -> None:
    """Write a checkpoint's files into a local directory."""
    path = Path(directory)
    torch.save(state, path / "state.pt")
    for slot, own in workers.items():
        torch.save(own, path / f"worker_{slot}.pt")
    (path / "het.json").write_text(json.dumps({"format": FORMAT, **meta}, indent=1))


def read_meta(directory: str) -> dict[str, Any]:
    """The checkpoint's ``het.json``.

    Raises:
        CheckpointError: it is missing, torn, or of an unknown format.
    """
    try:
        meta = json.loads((Path(directory) / "het.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"checkpoint {directory}: het.json can't be read ({error}). It was not written by raytrain_het, or is "
            "damaged: remove it, or run under another name."
        ) from error
    if meta.get("format") != FORMAT:
        raise CheckpointError(
            f"checkpoint {directory}: format {meta.get('format')!r} is not supported, allowed is {FORMAT}. "
            "Install the version of raytrain-het that wrote it."
        )
    return meta


def check_same_model(meta: dict[str, Any], parameters: dict[str, list[int]], path: str) -> None:
    """Raises:
    CheckpointError: the checkpoint belongs to another model; the message names the first difference.
    """
    theirs: dict[str, list[int]] = meta["parameters"]
    if theirs == parameters:
        return
    for name, shape in parameters.items():
        if name not in theirs:
            what = f"it has no parameter {name!r}"
            break
        if theirs[name] != shape:
            what = f"parameter {name!r} has shape {theirs[name]} there and {shape} here"
            break
    else:
        extra = next((n for n in theirs if n not in parameters), None)
        what = f"it has a parameter {extra!r} that the model lacks" if extra else "the parameters' order differs"
    raise CheckpointError(
        f"checkpoint {path} is from another model: {what}. Build the same model, or run under another name."
    )


def read_state(directory: str) -> dict[str, Any]:
    """``state.pt``, on the CPU."""
    return torch.load(Path(directory) / "state.pt", map_location="cpu", weights_only=False)


def read_worker(directory: str, slot: int) -> dict[str, Any] | None:
    """``worker_<slot>.pt``; None if that worker was lost, or the fleet was smaller, when it was written."""
    path = Path(directory) / f"worker_{slot}.pt"
    return torch.load(path, map_location="cpu", weights_only=False) if path.exists() else None
