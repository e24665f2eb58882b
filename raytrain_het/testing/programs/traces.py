"""The notes of a program's run: the state after every step, and the outcome."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn


@dataclass(kw_only=True)
class StepNote:
    """The state after one committed step, as one process has it."""

    step: int
    """Steps committed before this one."""
    epoch: int
    state: dict[str, Any]
    """By name: parameters, buffers, the optimizer's state and settings."""
    bits: str
    """A hash of it."""
    generation: int = 0
    slot: int = 0
    slices: dict[str, tuple[int, int]] = field(default_factory=dict)
    """By member: [start, stop) in the epoch's order."""
    uid: str = ""
    offset: int = 0
    """Where the batch begins in the epoch's order."""
    batch: list[int] = field(default_factory=list)
    """Dataset indices of the global batch, in order, as this worker knows it."""
    own: list[int] = field(default_factory=list)
    """Dataset indices of this worker's part."""


@dataclass(kw_only=True)
class Outcome:
    """How a program ended in one process."""

    kind: str
    """result, error, or gone (it was let go before its end)."""
    value: Any = None
    """What the function returned."""
    error: str = ""
    """The exception's class and text."""
    error_class: str = ""
    refused: bool = False
    """Whether the exception is one of raytrain_het's own."""
    traceback: str = ""
    final: dict[str, Any] = field(default_factory=dict)
    """The state at the end, as in :class:`StepNote`."""
    reports: list[dict[str, Any]] = field(default_factory=list)
    notes: list[StepNote] = field(default_factory=list)
    """The reference's notes. Workers write theirs into files, which outlive a kill."""
    complaints: list[str] = field(default_factory=list)


def state_of(model: nn.Module | None, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    """Copies of all tensors and numbers that the next step depends on, by name."""
    state: dict[str, Any] = {}
    names: dict[int, str] = {}
    if model is not None:
        for name, p in model.named_parameters():
            if isinstance(p, nn.parameter.UninitializedParameter):
                continue
            state[f"parameter {name}"] = p.detach().clone()
            names[id(p)] = name
        for name, b in model.named_buffers():
            state[f"buffer {name}"] = b.detach().clone()
    if optimizer is not None:
        for k, group in enumerate(optimizer.param_groups):
            for key in ("lr", "momentum", "betas", "weight_decay"):
                if key in group:
                    value = group[key]
                    state[f"group {k} {key}"] = value.detach().clone() if isinstance(value, torch.Tensor) else value
            for place, p in enumerate(group["params"]):
                if isinstance(p, nn.parameter.UninitializedParameter):
                    continue
                name = names.get(id(p), f"group {k} number {place}")
                if id(p) not in names:
                    state[f"parameter {name}"] = p.detach().clone()
                for key, value in optimizer.state.get(p, {}).items():
                    state[f"optimizer {name} {key}"] = (
                        value.detach().clone() if isinstance(value, torch.Tensor) else value
                    )
    return state


def bits_of(state: dict[str, Any]) -> str:
    """A hash that differs if any bit does."""
    digest = hashlib.blake2b(digest_size=12)
    for name, value in state.items():
        digest.update(name.encode())
        if isinstance(value, torch.Tensor):
            digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b"")
        else:
            digest.update(repr(value).encode())
    return digest.hexdigest()


class NoteWriter:
    """Appends notes to a file of this process; each is whole or absent."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115

    def append(self, note: StepNote) -> None:
        """Write one."""
        self._file.write(pickle.dumps(note))


def read_notes(directory: Path) -> list[StepNote]:
    """All notes of a run, by step and generation."""
    notes: list[StepNote] = []
    for path in sorted(directory.glob("*.notes")):
        notes += _notes_of(path)
    return sorted(notes, key=lambda note: (note.step, note.generation, note.slot))


def _notes_of(path: Path) -> Iterator[StepNote]:
    with path.open("rb") as file:
        while True:
            try:
                yield pickle.load(file)
            except (EOFError, pickle.UnpicklingError):
                return
