"""Whether samples of a pass see each other in the loop's body, also where no graph shows it: a test by exchange.

A worker's loss stands for its part of the whole batch's only if it is additive over samples: with ``W`` what it is a
mean over, ``W L(x_1 ... x_n) = sum_i f_i(x_i)``. Then exchanging some samples, ``A``, and others, ``B``, changes it by
amounts that do not depend on each other::

    WL(A', B') - WL(A', B) - WL(A, B') + WL(A, B) = 0

Advantages that are normalised by the batch, weights by its classes, and whatever else puts samples together break it.
The body is run once, as ever. Each of its calls of torch is repeated on three *shadows* of what it was given: the batch
with every second sample replaced by another one of the same batch, with the others replaced, and with both. Shadows
have no graph, draw the same random numbers, and are gone with the tensors that they belong to. A call that can't be
repeated leaves its result without shadows: a constant, of which nothing is claimed.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

from raytrain_het.training.autograd_nodes import words
from raytrain_het.training.batches import with_tensors
from raytrain_het.training.loss_graph import LossGraph

logger = logging.getLogger("raytrain_het")

SHADOWS = 3
OF_CHANGES = 1e-3
OF_LOSS = 1e-4
"""How much of the changes, and of the loss, the difference above may be: more is no rounding."""
OF_A_MEAN = " of a mean over samples, which has their number in it: take the sum there"
_LEAVE_TORCH = words("item tolist numpy __float__ __int__ __index__ __array__")
"""What a program does with these values is not seen."""
_REORDER = words("flip roll index_select getitem")
_OTHERWISE_WITH_MODES = (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.MultiheadAttention)
_TORCH = str(Path(torch.__file__).parent)


@dataclass(frozen=True)
class Shadow:
    """What a tensor would be with other samples."""

    values: tuple[torch.Tensor, ...]
    """With every second sample replaced; with the others; with all."""
    met: str = ""
    """The call in which samples came together, if they have."""


class BodyWatch(TorchFunctionMode):
    """Follows one pass of the loop's body at a time. Used by the training thread only."""

    def __init__(self) -> None:
        super().__init__()
        self._shadows: Any = {}
        """By tensor."""
        self._weights = (1.0,) * (SHADOWS + 1)
        self._samples = 0
        self._follows = False
        self._handles: list[Any] = []

    # ---------------------------------------------------------------- a pass

    def begin(self, batch: Any, samples: int, weight: Callable[[Any], float] | None = None) -> None:
        """The body gets this batch next.

        Args:
            batch: of any class; tensors in containers and dataclasses are followed.
            samples: in it. Where tensors have several dimensions of this size it is the first, if that is what others
                show; else nothing is followed. Nor is it in programs with compiled parts, which would be compiled
                twice.
            weight: what the loss is a mean over, of a batch.
        """
        self.end()
        if samples < 2 or _something_is_compiled():
            return
        try:
            shadows = _shadows_of(batch, samples)
            weights = [1.0] * (SHADOWS + 1)
            if weight is not None:
                others = [with_tensors(batch, lambda t, k=k: _nth(shadows, t, k)) for k in range(SHADOWS)]  # type: ignore[misc]
                weights = [float(weight(one)) for one in (*others, batch)]
        except Exception:
            logger.debug("a loop's body is not followed", exc_info=True)
            return
        if not len(shadows):
            return
        self._shadows, self._samples, self._weights, self._follows = shadows, samples, tuple(weights), True
        self._stand()

    def met(self, roots: Sequence[tuple[Any, torch.Tensor | None]]) -> str | None:
        """A backward pass begins: the call in which samples came together, if the roots are not additive over them."""
        known = [(root, grad, self._shadows.get(root)) for root, grad in roots if isinstance(root, torch.Tensor)]
        if not self._follows or not any(shadow for _, _, shadow in known):
            return None
        totals = [0.0] * (SHADOWS + 1)
        for root, grad, shadow in known:
            for k, value in enumerate((*(shadow.values if shadow else (root,) * SHADOWS), root)):
                value = value.detach().double()
                totals[k] += float((value if grad is None else value * grad.detach()).sum())
        first, second, both, now = (total * w for total, w in zip(totals, self._weights, strict=True))
        cross = abs(both - first - second + now)
        changes, size = max(abs(first - now), abs(second - now)), max(map(abs, (first, second, both, now)))
        if not math.isfinite(cross) or cross <= OF_CHANGES * changes or cross <= OF_LOSS * size:
            return None
        return next((shadow.met for _, _, shadow in known if shadow and shadow.met), "the loss")

    def end(self) -> None:
        """The body is over, or does something that the watch would disturb."""
        self._stop()
        # Inside of a call that it follows it is off the stack, and will be put back.
        if self in _get_current_function_mode_stack():
            for handle in self._handles:
                handle.remove()
            _dynamo_callbacks().remove_start_callback(self._steps_aside)
            for mode in _taken_off():
                if mode is not self:
                    _push_mode(mode)

    def _stop(self) -> None:
        self._follows, self._shadows = False, {}

    def _stand(self) -> None:
        """Below all modes that are there: the program's end in the order in which it has begun them."""
        for mode in [self, *_taken_off()]:
            _push_mode(mode)
        self._handles = [nn.modules.module.register_module_forward_pre_hook(self._module_begins)]
        _dynamo_callbacks().register_start_callback(self._steps_aside)

    def _module_begins(self, module: nn.Module, _: Any) -> None:
        """These compute otherwise while any mode stands."""
        if not module.training and isinstance(module, _OTHERWISE_WITH_MODES):
            self.end()

    def _steps_aside(self, _: Any) -> None:
        """Something is compiled, and the watch is not to be compiled into it."""
        self.end()

    # ---------------------------------------------------------------- a call

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called by torch for each of the body's calls."""
        kwargs = kwargs or {}
        if not self._follows:
            return func(*args, **kwargs)
        call = shadows = None
        with self._or_stop():
            call = _Call(func, args, kwargs)
            shadows = self._before(call)
        result = func(*args, **kwargs)
        if call is not None and shadows is not None:
            with self._or_stop():
                self._after(call, shadows, result)
        return result

    @contextlib.contextmanager
    def _or_stop(self) -> Iterator[None]:
        """A call of another kind than any that was seen ends the watch, and nothing else."""
        try:
            yield
        except Exception:
            logger.debug("a loop's body is not followed any more", exc_info=True)
            self._stop()

    def _before(self, call: _Call) -> dict[torch.Tensor, Shadow] | None:
        """The shadows of what is given to a call; None where there are none."""
        known = {t: shadow for t in call.tensors if (shadow := self._shadows.get(t)) is not None}
        if not known:
            return None
        if call.leaves_torch(known):
            self._stop()
            return None
        target = call.written_to
        if target is not None and target not in known:
            copy = target.detach()
            known[target] = Shadow(tuple(copy.clone() for _ in range(SHADOWS)))
        call.look_before(self._samples)
        return known

    def _after(self, call: _Call, known: dict[torch.Tensor, Shadow], result: Any) -> None:
        target = call.written_to
        made = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)] if target is None else [target]
        if not made:
            return
        if call.name == "grad":
            for t in made:
                if not t.requires_grad:  # Else its graph is read.
                    how = call.place() + OF_A_MEAN * call.is_of_a_mean
                    self._shadows[t] = Shadow(_of_a_gradient(t, self._samples, call.is_of_a_mean), how)
            return
        if call.has_written(known) and call.name != "batch_norm":
            self._stop()  # It is not known what a second call would do.
            return
        if call.reorders(known, self._samples):
            return  # Pairs of samples that are drawn, as of a mixup, are so on each worker.
        results = call.repeated(known)
        values = [[t for t in tree_leaves(r) if isinstance(t, torch.Tensor)] for r in results]
        if target is not None:
            values = [[known[target].values[k]] if call.in_place else values[k][:1] for k in range(len(results))]
            if not results:
                self._stop()
        before = next((shadow.met for shadow in known.values() if shadow.met), "")
        shapes = [t.shape for t in made]
        if any([t.shape for t in v] != shapes for v in values):
            self._stop()  # What is counted may be a shape, and places may be in what was cut.
            return
        for place, t in enumerate(made):
            if not values:
                self._shadows.pop(t, None)
            elif values[0][place] is not t:
                others = tuple(v[place].detach() for v in values)
                self._shadows[t] = Shadow(others, before or (call.place() if _come_together(t, others) else ""))


class _Call:
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
        while frame is not None and frame.f_code.co_filename.startswith((_TORCH, __file__)):
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


def _shadows_of(batch: Any, samples: int) -> Any:
    """By tensor, of all that have a dimension of samples. Where others have none, as those of graphs and of texts that
    were put one after the other, whole numbers may be lengths and places in them: these stay."""
    tensors: list[torch.Tensor] = []
    with_tensors(batch, lambda t: tensors.append(t) or t)  # type: ignore[func-returns-value]
    dims = [[d for d, size in enumerate(t.shape) if size == samples] for t in tensors]
    if any(len(d) > 1 for d in dims) and {d[0] for d in dims if len(d) == 1} != {0}:
        raise ValueError(f"tensors have several dimensions of {samples}: {[list(t.shape) for t in tensors]}")
    whole = all(dims)
    shadows: Any = WeakTensorKeyDictionary()
    for t, d in zip(tensors, dims, strict=True):
        if d and t.layout is torch.strided and (whole or t.is_floating_point()):
            orders = _orders(samples, t.device)
            shadows[t] = Shadow(tuple(t.detach().index_select(d[0], order) for order in orders))
    return shadows


def _reorders(index: torch.Tensor, samples: int, known: bool) -> bool:
    """Whether an index puts all samples in another order, or is drawn."""
    if index.is_floating_point() or index.dtype == torch.bool:
        return False
    place = torch.arange(samples, device=index.device)
    whole = index.shape == place.shape
    if known:
        return whole and torch.equal(index.detach().sort().values, place)
    return not (whole and torch.equal(index, place))


def _of_a_gradient(t: torch.Tensor, samples: int, is_of_a_mean: bool) -> tuple[torch.Tensor, ...]:
    """Shadows of what ``torch.autograd.grad()`` has computed, which are not known.

    A sample's gradient is exchanged with it; if it has the number of samples in it, what depends on its size is not
    additive. Nothing is that depends on the gradient of all samples' loss.
    """
    dims = [d for d, size in enumerate(t.shape) if size == samples]
    if len(dims) != 1:
        waves = torch.arange(t.numel(), device=t.device).sin().view(t.shape)
        return t.clone(), t.clone(), t * (1.5 + 0.5 * waves.to(t.dtype))
    first, second, both = (t.index_select(dims[0], order) for order in _orders(samples, t.device))
    return first, second, 2 * both if is_of_a_mean else both


def _orders(samples: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Every second sample is replaced by another one; the others are; all are."""
    place = torch.arange(samples, device=device)
    even = place % 2 == 0
    return torch.where(even, 1, place), torch.where(even, place, 0), torch.where(even, 1, 0)


def _nth(shadows: Any, t: torch.Tensor, k: int) -> torch.Tensor:
    shadow = shadows.get(t)
    return t if shadow is None else shadow.values[k]


def _come_together(t: torch.Tensor, others: tuple[torch.Tensor, ...]) -> bool:
    """Whether some of a tensor's elements are not additive in samples."""
    if not t.is_floating_point() or not t.numel():
        return False
    now, first, second, both = (x.detach().double() for x in (t, *others))
    changes = max(float((first - now).abs().max()), float((second - now).abs().max()))
    return float((both - first - second + now).abs().max()) > OF_CHANGES * changes > 0


def _taken_off() -> list[Any]:
    """All modes, the lowest first, none of which stands any more."""
    modes = _get_current_function_mode_stack()
    for _ in modes:
        _pop_mode()
    return modes


def _dynamo_callbacks() -> Any:
    return importlib.import_module("torch._dynamo.callback").callback_handler


def _something_is_compiled() -> bool:
    """Whether torch.compile has been called in this process."""
    backends = importlib.import_module("torch._dynamo.eval_frame").cached_backends
    return any(backend is not None for backend in dict(backends).values())
