"""Checkpoints: what is in the directory.

Format 2, one directory per report, named ``checkpoint_<step>_<ordinal>``. Each ``.pt`` is read by
``torch.load(..., weights_only=True)``; what in it needs code is in a ``.pkl`` beside it, see
:mod:`raytrain_het.worker.state.parts`.

- ``het.json``: format, identity (see ``storage.py``), cursor (epoch, offset, step), generation (the number of the one
  in force), version of its table of shares (0: none), layout fingerprint, parameter names and shapes, world size, the
  data plan that the cursor belongs to, the slots of the workers whose own files are there, and the names of extras;
- ``model.pt``: the model's state dictionary;
- ``training.pt``: ``optimizer`` (its state dictionary), ``optimizer_class``, ``groups`` (names of each group's
  parameters), ``buffers`` (those that the model's state dictionary leaves out) and ``registered``;
- ``extra_<name>.pt``: see :mod:`raytrain_het.worker.state.extras`;
- ``worker_<slot>.pt``, written by that worker: its codec's state by parameter name, the weight of a sample that this
  goes with, and extras of its own, its random states among them.

Format 1 is read too: ``state.pt`` with ``model``, ``optimizer`` and ``registered``, and ``worker_<slot>.pt``.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raytrain_het.errors import CheckpointError
from raytrain_het.worker.state import parts
from raytrain_het.worker.state.storage import META
from raytrain_het.worker.state.storage import LocalStorage as LocalStorage
from raytrain_het.worker.state.storage import Storage as Storage

FORMAT = 2
READABLE = (1, 2)


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


def write_shared(directory: str | Path, snapshot: dict[str, Any]) -> Iterator[str]:
    """Write what all workers have in common; yields the name of each file when it is there."""
    rest = {name: value for name, value in snapshot.items() if name not in ("model", "extras")}
    yield from parts.save(directory, "model", snapshot["model"])
    yield from parts.save(directory, "training", rest)
    for name, value in snapshot.get("extras", {}).items():
        yield from parts.save(directory, f"extra_{name}", value)


def write_own(directory: str | Path, slot: int, own: dict[str, Any]) -> list[str]:
    """Write what is one worker's own; returns the names of the files."""
    return parts.save(directory, f"worker_{slot}", own)


def write_meta(directory: str | Path, meta: dict[str, Any], workers: list[int]) -> None:
    """Write ``het.json``: the checkpoint is complete, with the own files of these workers."""
    text = json.dumps({"format": FORMAT, **meta, "workers": sorted(workers)}, indent=1)
    (Path(directory) / META).write_text(text)


def wanted(slot: int, num_slots: int) -> Any:
    """Which files a worker needs of a checkpoint: not those that other workers' own parts are in."""

    def is_wanted(name: str) -> bool:
        stem = name.partition(".")[0]
        if not stem.startswith("worker_"):
            return True
        theirs = int(stem.removeprefix("worker_"))
        return theirs == slot or theirs >= num_slots and theirs % num_slots == slot

    return is_wanted


def read_meta(directory: str) -> dict[str, Any]:
    """The checkpoint's ``het.json``.

    Raises:
        CheckpointError: it is missing, torn, or of an unknown format.
    """
    try:
        meta = json.loads((Path(directory) / META).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"checkpoint {directory}: het.json can't be read ({error}). It was not written by raytrain_het, or is "
            "damaged: remove it, or start anew with another name: RunConfig(name=...), or --name."
        ) from error
    if meta.get("format") not in READABLE:
        raise CheckpointError(
            f"checkpoint {directory}: format {meta.get('format')!r} is not supported, allowed are {READABLE}. "
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
    """What all workers have in common, on the CPU: what :meth:`Replica.load` takes, and ``extras``.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    meta = read_meta(directory)
    if meta["format"] == 1:
        return parts.read(Path(directory) / "state.pt", weights_only=False) | {"extras": {}}
    extras = {name: parts.load(directory, f"extra_{name}") for name in meta["extras"]}
    return {"model": parts.load(directory, "model"), **parts.load(directory, "training"), "extras": extras}


def read_worker(directory: str, slot: int) -> dict[str, Any] | None:
    """What is one worker's own; None if that worker was lost, or the fleet was smaller, when it was written."""
    meta, stem = read_meta(directory), f"worker_{slot}"
    if meta["format"] == 1:
        path = Path(directory) / f"{stem}.pt"
        own = parts.read(path, weights_only=False) if path.exists() else None
        return own and {**own, "extras": {"random": own["random"]}}
    return parts.load(directory, stem) if slot in meta["workers"] else None


def read_left_over(directory: str, slot: int, num_slots: int) -> list[dict[str, Any]]:
    """The files of workers that a fleet of ``num_slots`` has no slot for: each is given to one of its workers."""
    meta = read_meta(directory)
    slots = (
        meta["workers"]
        if meta["format"] > 1
        else [int(p.stem.removeprefix("worker_")) for p in Path(directory).glob("worker_*.pt")]
    )
    found = (read_worker(directory, s) for s in sorted(slots) if s >= num_slots and s % num_slots == slot)
    return [own for own in found if own is not None]
