"""Calls of torch that are repeated on shadows of what they were given."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves, tree_map_only

from raytrain_het.worker.checks.autograd_nodes import words
from raytrain_het.worker.checks.loss_graph import LossGraph
from raytrain_het.worker.checks.shadows import SHADOWS, Shadow

_LEAVE_TORCH = words("item tolist numpy __float__ __int__ __index__ __array__")
"""What a program does with these values is not seen."""
_REORDER = words("flip roll index_select getitem gather take_along_dim")
_CALLS_BACK = words("apply map map2")
"""They call functions of the program's."""
_NOT_THE_PROGRAM = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))


class RepeatedCall:
    """One call of torch, and what has to be known to repeat it."""

    def __init__(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.func, self.args, self.kwargs = func, args, kwargs
        self._full = full = str(getattr(func, "__name__", ""))
        self.name = full.strip("_")
        self.tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        is_method_in_place = full.endswith("_") and not full.endswith("__")
        self.in_place = is_method_in_place or full == "__setitem__" or full.startswith("__i") and full.endswith("__")
        out = kwargs.get("out")
        self.written_to = args[0] if self.in_place and args else out if isinstance(out, torch.Tensor) else None
        if not isinstance(self.written_to, torch.Tensor):
            self.written_to = None
        self.is_of_a_mean = False
        """Of ``torch.autograd.grad()``: whether the gradient has the number of samples in it."""
        self._versions: list[int] = []
        self._random: list[tuple[torch.Generator, torch.Tensor]] = []

    def leaves_torch(self, known: dict[torch.Tensor, Shadow]) -> bool:
        """Whether numbers by which samples are ordered or cut, or whole tensors, go where nobody follows; or memory is
        put in place of other memory."""
        if self.name == "set":
            return any(isinstance(value, torch.Tensor) for value in self.args[1:])
        if self.name in _CALLS_BACK or isinstance(self.func, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
            return True  # An operator of the program's own may do more than compute.
        is_logged = self._full in ("item", "__float__") and any(t.requires_grad for t in known)
        return self._full in _LEAVE_TORCH and not is_logged

    def look_before(self, samples: int) -> None:
        """Remember what the call may change, and read the graph that it may use up."""
        if self.name == "grad":
            roots = [t for t in tree_leaves(self.args[0]) if isinstance(t, torch.Tensor)]
            graphs = [LossGraph(t.grad_fn, samples=samples) for t in roots if t.numel() == 1 and t.grad_fn]
            self.is_of_a_mean = any(r.kind != "sum" for graph in graphs for r in graph.reductions)
        self._versions = [t._version for t in self.tensors]
        generators = [torch.default_generator]
        generators += [g for g in tree_leaves((self.args, self.kwargs)) if isinstance(g, torch.Generator)]
        for device in {t.device for t in self.tensors if t.is_cuda}:
            generators.append(torch.cuda.default_generators[device.index or 0])
        self._random = [(generator, generator.get_state()) for generator in generators]

    def has_written(self, known: dict[torch.Tensor, Shadow]) -> bool:
        """Whether the call has changed something besides what it says: a buffer, as observers do."""
        now = [(t, t._version) for t in self.tensors]
        changed = [t for (t, version), before in zip(now, self._versions, strict=True) if version != before]
        return any(t is not self.written_to for t in changed)

    def reorders(self, known: dict[torch.Tensor, Shadow], samples: int) -> bool:
        """Whether samples are put in an order, or chosen by something that does not come from them."""
        if self.name not in _REORDER or not self.args:
            return False
        if self.name in ("flip", "roll"):
            dims = self.args[-1] if len(self.args) > 1 else self.kwargs.get("dims", 0)
            shape = self.args[0].shape
            return any(shape[d] == samples for d in (dims if isinstance(dims, list | tuple) else [dims]))
        if self.name in ("gather", "take_along_dim"):
            return any(not t.is_floating_point() and t not in known and samples in t.shape for t in self.tensors[1:])
        index = self.args[-1] if isinstance(self.args[-1], tuple) else (self.args[-1],)
        return any(
            isinstance(i, list | np.ndarray)
            or isinstance(i, torch.Tensor)
            and i.dim()
            and _reorders(i, samples, i in known)
            for i in index
        )

    def repeated(self, known: dict[torch.Tensor, Shadow]) -> list[Any]:
        """The call's results on shadows; none, if one can't be had."""
        after = [generator.get_state() for generator, _ in self._random]
        draws = any(not torch.equal(a, b) for a, (_, b) in zip(after, self._random, strict=True))
        results: list[Any] = []
        try:
            for k in range(SHADOWS):
                if draws:
                    self._set_random([state for _, state in self._random])
                results.append(self._with(k, known))
                if draws and not all(
                    torch.equal(generator.get_state(), state)
                    for (generator, _), state in zip(self._random, after, strict=True)
                ):
                    raise RuntimeError("how many numbers are drawn depends on values")
        except Exception:
            results = []
        if draws:
            self._set_random(after)
        return results

    def _with(self, k: int, known: dict[torch.Tensor, Shadow]) -> Any:
        def other(t: torch.Tensor) -> torch.Tensor:
            return known[t].values[k] if t in known else t

        kwargs = {name: value for name, value in self.kwargs.items() if name != "out"}
        args, kwargs = tree_map_only(torch.Tensor, other, (self.args, kwargs))
        with torch.no_grad():
            if self.name == "batch_norm" and self.args[0] in known:
                return _as_with_its_own(self.args[0], args, kwargs)
            return self.func(*args, **kwargs)

    def _set_random(self, states: list[torch.Tensor]) -> None:
        for (generator, _), state in zip(self._random, states, strict=True):
            generator.set_state(state)

    def place(self) -> str:
        """Which call it is, and where the program makes it."""
        frame: Any = sys._getframe(1)
        while frame is not None and frame.f_code.co_filename.startswith(_NOT_THE_PROGRAM):
            frame = frame.f_back
        where = f" ({Path(frame.f_code.co_filename).name}, line {frame.f_lineno})" if frame is not None else ""
        return f"torch's {self.name}{where}"


def _as_with_its_own(given: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """A batch norm of other samples by the statistics of the pass's own. They are a pass's, and known to be."""
    names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
    call = dict(zip(names, args, strict=False)) | kwargs
    if call.get("training"):
        dims = [d for d in range(given.dim()) if d != 1]
        call |= {
            "running_mean": given.detach().mean(dims),
            "running_var": given.detach().var(dims, unbiased=False),
            "training": False,
        }
    return F.batch_norm(**call)


def _reorders(index: torch.Tensor, samples: int, known: bool) -> bool:
    """Whether an index puts all samples in another order, or is drawn."""
    if index.is_floating_point() or index.dtype == torch.bool:
        return False
    place = torch.arange(samples, device=index.device)
    whole = index.shape == place.shape
    if known:
        return whole and torch.equal(index.detach().sort().values, place)
    return not (whole and torch.equal(index, place))
