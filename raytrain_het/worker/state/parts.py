"""The files of a checkpoint: what can be read without running code apart from what cannot.

A value named ``x`` becomes ``x.pt``, which ``torch.load(..., weights_only=True)`` reads, and, only where something in
it needs code, ``x.pkl``: objects of classes, numpy's arrays, sets. They are left out of ``x.pt``, and put back by
:func:`load`. In a list or tuple ``None`` stands in their place.
"""

from __future__ import annotations

import io
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

from raytrain_het.errors import CheckpointError

_LEAVES = (type(None), bool, float, str, bytes, torch.dtype, torch.device, torch.Size)
_MAX_BITS = 2000
"""Of a whole number: torch's safe reader knows no longer ones."""

_SHELLS = {getattr(torch, f"{sign}int{bits}") for sign in ("", "u") for bits in range(1, 8)}
"""Types of less than a byte."""

Hole = tuple[tuple[int, ...], Any, Any, str]
"""Where something is missing (a place at each level), its key if that is in a dictionary, what, and its name."""


def save(folder: str | Path, stem: str, value: Any) -> list[str]:
    """Write a value; returns the names of its files.

    Raises:
        CheckpointError: something in it cannot be stored.
    """
    safe, holes = split(value, stem)
    names = [f"{stem}.pt"]
    torch.save(safe, Path(folder) / names[0])
    if holes:
        names.append(f"{stem}.pkl")
        (Path(folder) / names[1]).write_bytes(pickled(holes))
    return names


def load(folder: str | Path, stem: str) -> Any:
    """The inverse of :func:`save`, with all tensors on the CPU. It runs what is in the second file, if there is one.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    safe = read(Path(folder) / f"{stem}.pt", weights_only=True)
    code = Path(folder) / f"{stem}.pkl"
    return join(safe, read(code, weights_only=False)) if code.exists() else safe


def read(path: Path, *, weights_only: bool) -> Any:
    """``torch.load`` onto the CPU.

    Raises:
        CheckpointError: the file is missing, damaged, or of a class that is not there.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=weights_only)
    except Exception as error:
        text = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{path.name} can't be read ({text}). Make what it needs importable, or, if it is damaged, remove this "
            "checkpoint's directory, or start anew with another name: RunConfig(name=...), or --name."
        ) from error


def split(value: Any, name: str) -> tuple[Any, list[Hole]]:
    """A value without what needs code, and that.

    Raises:
        CheckpointError: a tensor has no data, or is of a type that torch cannot store.
    """
    holes: list[Hole] = []
    try:
        safe = _split(value, (), name, holes)
    except RecursionError:  # It contains itself: nothing of it can be taken apart.
        safe, holes = None, []
        holes.append(((), None, value, name))
    return (None if safe is _HOLE else safe), holes


def join(safe: Any, holes: list[Hole]) -> Any:
    """The inverse of :func:`split`."""
    return _join(safe, [(path, key, value) for path, key, value, _ in holes])


def pickled(holes: list[Hole]) -> bytes:
    """The second file.

    Raises:
        CheckpointError: something has no pickle; the message names it.
    """
    try:
        return _dump(holes)
    except Exception:
        for _, _, value, name in holes:
            try:
                _dump(value)
            except Exception as error:
                raise CheckpointError(
                    f"{name} is a {type(value).__name__} that cannot be stored ({type(error).__name__}: {error}). "
                    "Return tensors and plain values from state_dict(), or objects of classes of a module that can be "
                    "imported."
                ) from error
        raise


def _dump(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


_HOLE = object()


def _split(value: Any, path: tuple[int, ...], name: str, holes: list[Hole]) -> Any:
    kind = type(value)
    if kind in _LEAVES or kind is int and value.bit_length() <= _MAX_BITS:
        return value
    if isinstance(value, torch.Tensor):
        if value.device.type == "meta":
            raise CheckpointError(
                f"{name} is a tensor without data (device 'meta'). Give it some before the first report, for example "
                "with module.to_empty(device=...) and an initialisation."
            )
        if value.dtype in _SHELLS:
            raise CheckpointError(
                f"{name} is a tensor of dtype {value.dtype}, which torch cannot store. Keep it as uint8: t.view(...)."
            )
        if kind in (torch.Tensor, torch.nn.Parameter) and not vars(value):
            return value
    elif kind in (dict, OrderedDict) and all(_is_key(k) for k in value) and _has_plain_attributes(value):
        return _split_dict(value, path, name, holes)
    elif kind in (list, tuple):
        mine: list[Hole] = []
        items = [_split(v, (*path, i), f"{name}[{i}]", mine) for i, v in enumerate(value)]
        holes += mine
        return kind(None if v is _HOLE else v for v in items) if mine else value
    holes.append((path, None, value, name))
    return _HOLE


def _split_dict(value: dict[Any, Any], path: tuple[int, ...], name: str, holes: list[Hole]) -> Any:
    mine: list[Hole] = []
    items = [(k, _split(v, (*path, i), f"{name}[{k!r}]", mine)) for i, (k, v) in enumerate(value.items())]
    if not mine:
        return value
    keys = list(value)
    holes += [(at, keys[at[-1]] if len(at) == len(path) + 1 else key, what, called) for at, key, what, called in mine]
    return _like(value, [(k, v) for k, v in items if v is not _HOLE])


def _join(safe: Any, holes: list[tuple[tuple[int, ...], Any, Any]]) -> Any:
    if not holes:
        return safe
    if holes[0][0] == ():
        return holes[0][2]
    below: dict[int, list[tuple[tuple[int, ...], Any, Any]]] = {}
    for path, key, value in holes:
        below.setdefault(path[0], []).append((path[1:], key, value))
    if isinstance(safe, dict):
        items = list(safe.items())
        for place, inner in sorted(below.items()):
            if inner[0][0] == ():
                items.insert(place, inner[0][1:])
            else:
                items[place] = (items[place][0], _join(items[place][1], inner))
        return _like(safe, items)
    return type(safe)(_join(v, below.get(i, [])) for i, v in enumerate(safe))


def _like(value: dict[Any, Any], items: list[tuple[Any, Any]]) -> Any:
    new = type(value)(items)
    if isinstance(value, OrderedDict):
        vars(new).update(vars(value))
    return new


def _is_key(key: Any) -> bool:
    kind = type(key)
    if kind is tuple:
        return all(_is_key(k) for k in key)
    return kind in (type(None), bool, float, str, bytes) or kind is int and key.bit_length() <= _MAX_BITS


def _has_plain_attributes(value: dict[Any, Any]) -> bool:
    """A model's state dictionary has ``_metadata``, with the versions of its modules."""
    return type(value) is dict or not split(dict(vars(value)), "")[1]
