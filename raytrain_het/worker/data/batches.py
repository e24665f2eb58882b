"""Batches of any class on their way to the device: tensors are moved, everything else stays what it is."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, MutableMapping, MutableSequence
from typing import Any

import torch

from raytrain_het.errors import ConfigError

Move = Callable[[Any], Any]


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on ``device``.

    Lists, tuples, named tuples, mappings, dataclasses and attrs classes are gone through, and keep their class and
    what else they hold; any object with a method ``to`` moves itself. Numbers, texts, None and objects of other classes
    stay. A batch that is there already comes back as the same object.
    """
    return _moved(batch, "to", lambda thing: thing.to(device), lambda t: t.to(device, non_blocking=True))


def pinned(batch: Any) -> Any:
    """The batch with its tensors in page-locked memory; needs CUDA."""
    return _moved(batch, "pin_memory", lambda thing: thing.pin_memory(), lambda t: t.pin_memory())


def with_tensors(batch: Any, replacement: Move) -> Any:
    """The batch with other tensors in its containers, dataclasses and attrs classes; objects of other classes stay."""
    return _moved(batch, "", replacement, replacement)


def _moved(batch: Any, method: str, move_object: Move, move_tensor: Move) -> Any:
    if isinstance(batch, torch.Tensor):
        return move_tensor(batch)
    if batch is None or isinstance(batch, str | bytes | bytearray | int | float | complex | type):
        return batch
    if method and callable(getattr(batch, method, None)):
        moved = move_object(batch)
        return batch if moved is None else moved  # Some move in place.

    def part(value: Any) -> Any:
        return _moved(value, method, move_object, move_tensor)

    if isinstance(batch, tuple):
        return _rebuilt_tuple(batch, part)
    if isinstance(batch, MutableSequence):
        return _with_items(batch, dict(enumerate(batch)), part)
    if isinstance(batch, Mapping):
        return _with_items(batch, dict(batch.items()), part)
    if dataclasses.is_dataclass(batch):
        return _with_attributes(batch, [f.name for f in dataclasses.fields(batch)], part)
    if hasattr(type(batch), "__attrs_attrs__"):
        return _with_attributes(batch, [a.name for a in type(batch).__attrs_attrs__], part)
    return batch


def _rebuilt_tuple(batch: tuple[Any, ...], part: Move) -> Any:
    values = [part(value) for value in batch]
    if all(new is old for new, old in zip(values, batch, strict=True)):
        return batch
    if type(batch) is tuple:
        return tuple(values)
    # Not type(batch)(...): a subclass may be made from something else.
    new = tuple.__new__(type(batch), values)
    vars(new).update(vars(batch)) if hasattr(batch, "__dict__") else None
    return new


def _with_items(batch: Any, items: dict[Any, Any], part: Move) -> Any:
    moved = {k: part(value) for k, value in items.items()}
    if all(moved[k] is value for k, value in items.items()):
        return batch
    try:
        if isinstance(batch, Mapping) and not isinstance(batch, MutableMapping):
            return type(batch)(moved)  # type: ignore[call-arg]
        clone = copy.copy(batch)  # It may hold more than its items.
        for k, value in moved.items():
            clone[k] = value
    except TypeError as error:
        name = type(batch).__name__
        raise ConfigError(
            f"a batch of class {name} can't be moved to the device: it is no class that can be copied with other items "
            f"({error}). Give {name} a method to(self, device) that returns a moved copy."
        ) from error
    return clone


def _with_attributes(batch: Any, names: list[str], part: Move) -> Any:
    values = {name: getattr(batch, name) for name in names if hasattr(batch, name)}
    moved = {name: part(value) for name, value in values.items()}
    if all(moved[name] is value for name, value in values.items()):
        return batch
    clone = copy.copy(batch)
    for name, value in moved.items():
        object.__setattr__(clone, name, value)  # It may be frozen.
    return clone
