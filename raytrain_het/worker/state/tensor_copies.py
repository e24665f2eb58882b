"""Deep copies of nested values, with a say in how their tensors are copied."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from raytrain_het.worker.data import strides


def deep_copy(value: Any, keep: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """``copy.deepcopy``, with the tensors in dictionaries and sequences copied by ``keep``.

    A tensor's own deep copy would stay on its device, and let no other thread run meanwhile.
    """

    def copied(t: torch.Tensor) -> torch.Tensor:
        new = keep(t)
        return (
            nn.Parameter(new, t.requires_grad) if isinstance(t, nn.Parameter) else new.requires_grad_(t.requires_grad)
        )

    return copy.deepcopy(value, {id(t): copied(t) for t in _tensors(value)})


def clone(t: torch.Tensor) -> torch.Tensor:
    """A copy on the same device, with the same strides."""
    return strides.copy(t)


def cpu_clone(t: Any) -> Any:
    """A copy on the CPU; of other values a deep copy."""
    return strides.copy(t, "cpu") if isinstance(t, torch.Tensor) else copy.deepcopy(t)


def cpu(t: Any) -> Any:
    """The tensor itself where it is on the CPU, else a copy there."""
    return strides.on_cpu(t) if isinstance(t, torch.Tensor) else t


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)
