"""Checkpoints: what is in the directory, and who may put it where.

Format 1, one directory per report, named ``checkpoint_<step>_<ordinal>``:

- ``het.json``: format, cursor (epoch, offset, step), generation (the number of the one in force), version of its table
  of shares (0: none), layout fingerprint, parameter names and shapes, world size, and the data plan that the cursor
  belongs to (files without it are accepted);
- ``state.pt``: ``model``, ``optimizer`` and ``registered`` state dictionaries (``torch.save``);
- ``worker_<slot>.pt``: what is a worker's own: its random states, its codec's state by parameter name, and the
  weight of a sample that this goes with.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import secrets
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
        """Store a local directory under this name; returns its path there. All or nothing.

        What has the same ``het.json`` is the same checkpoint, and stays as it is: two members hold each snapshot, and
        one that was stopped while it wrote may wake up when the other's is stored and registered.
        """
        ...

    def fetch(self, path: str) -> contextlib.AbstractContextManager[str]:
        """A local directory with a stored checkpoint's files."""
        ...


class LocalStorage:
    """A directory on this machine or a shared file system."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)

    def persist(self, local_dir: str, name: str) -> str:
        """Copy to a temporary name, then rename: nobody ever sees half a checkpoint."""
        final = self.root / name
        part, aside = (self.root / f".{name}.{secrets.token_hex(4)}.{end}" for end in ("part", "old"))
        self.root.mkdir(parents=True, exist_ok=True)
        try:
            self._copy(local_dir, part)
            if not _is_same(Path(local_dir), final):
                with contextlib.suppress(FileNotFoundError):
                    final.rename(aside)  # From a life of the run that went another way.
                part.rename(final)
        finally:
            for path in (part, aside):
                shutil.rmtree(path, ignore_errors=True)
        return str(final)

    def _copy(self, local_dir: str, part: Path) -> None:
        shutil.copytree(local_dir, part)

    @contextlib.contextmanager
    def fetch(self, path: str) -> Iterator[str]:
        """The directory itself."""
        yield path


def _is_same(one: Path, other: Path) -> bool:
    try:
        return (one / "het.json").read_bytes() == (other / "het.json").read_bytes()
    except OSError:
        return False


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
            "damaged: remove it, or start anew with another name: RunConfig(name=...), or --name."
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
        f"checkpoint {path} is from another model: {what}. Build the same model, or "
        "start anew with another name: RunConfig(name=...), or --name."
    )


def check_same_data(meta: dict[str, Any], data: dict[str, Any], path: str) -> None:
    """What a cursor means follows from the order of samples; where windows are cut in it, from batch sizes, may change.

    Raises:
        CheckpointError: the order is another one, so that samples would be repeated and others left out.
    """
    theirs = {"sampler": "", **meta.get("data", data)}  # Older ones have no sampler.
    for field, fix in _ORDER.items():
        if field == "dataset_fingerprint" and "" in (theirs[field], data[field]):
            continue  # It has none.
        if theirs[field] != data[field]:
            raise CheckpointError(
                f"checkpoint {path} is from a run with {field}={theirs[field]!r}, here it is {data[field]!r}: going on "
                "in the middle of another order of samples would repeat some and leave out others. "
                f"{fix.format(theirs[field])}, or start anew with another name: RunConfig(name=...), or --name."
            )


_ORDER = {
    "dataset_size": "Give the same dataset of {} samples",
    "dataset_fingerprint": "Give the dataset whose fingerprint is {!r}",
    "sampler": "Give the DataLoader the sampler that gave {!r}",
    "shuffle": "Write DataLoader(dataset, shuffle={})",
    "seed": "Write HetConfig(seed={})",
}


def read_state(directory: str) -> dict[str, Any]:
    """``state.pt``, on the CPU."""
    return torch.load(Path(directory) / "state.pt", map_location="cpu", weights_only=False)


def read_worker(directory: str, slot: int) -> dict[str, Any] | None:
    """``worker_<slot>.pt``; None if that worker was lost, or the fleet was smaller, when it was written."""
    path = Path(directory) / f"worker_{slot}.pt"
    return torch.load(path, map_location="cpu", weights_only=False) if path.exists() else None


def read_left_over(directory: str, slot: int, num_slots: int) -> list[dict[str, Any]]:
    """The files of workers that a fleet of ``num_slots`` has no slot for: each is given to one of its workers."""
    slots = (int(path.stem.removeprefix("worker_")) for path in Path(directory).glob("worker_*.pt"))
    found = (read_worker(directory, s) for s in sorted(slots) if s >= num_slots and s % num_slots == slot)
    return [own for own in found if own is not None]
