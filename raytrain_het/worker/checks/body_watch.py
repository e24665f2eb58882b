"""Whether samples of a pass see each other in the loop's body, also where no graph shows it: a test by exchange.

A worker's loss stands for its part of the whole batch's only if it is additive over samples: with ``W`` what it is a
mean over, ``W L(x_1 ... x_n) = sum_i f_i(x_i)``. Then exchanging some samples, ``A``, and others, ``B``, changes it by
amounts that do not depend on each other::

    WL(A', B') - WL(A', B) - WL(A, B') + WL(A, B) = 0

Advantages that are normalised by the batch, weights by its classes, and whatever else puts samples together break it.
The body is run once, as ever. Each of its calls of torch is repeated on three *shadows* of what it was given: the batch
with every second sample replaced by another one of the same batch, with the others replaced, and with both. Shadows
have no graph, draw the same random numbers, and are gone with the tensors that they belong to; they take a tenth of the
memory that is spare at most. A call that can't be repeated leaves its result without shadows: a constant, of which
nothing is claimed.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode
from torch.utils._pytree import tree_leaves

from raytrain_het.worker.checks.repeated_call import RepeatedCall
from raytrain_het.worker.checks.shadows import (
    OF_CHANGES,
    SHADOWS,
    Shadow,
    come_together,
    nth,
    of_a_gradient,
    shadows_of,
)
from raytrain_het.worker.data.batches import with_tensors

logger = logging.getLogger("raytrain_het")

OF_LOSS = 1e-4
"""How much of the loss is rounding."""
OF_A_MEAN = " of a mean over samples, which has their number in it: take the sum there"
_OTHERWISE_WITH_MODES = (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.MultiheadAttention)


class BodyWatch(TorchFunctionMode):
    """Follows one pass of the loop's body at a time. Used by the training thread only."""

    def __init__(self) -> None:
        super().__init__()
        self._shadows: Any = {}
        """By tensor."""
        self._weights = (1.0,) * (SHADOWS + 1)
        self._samples = 0
        self._held_bytes = self._most_bytes = 0
        self._follows = False
        self._handles: list[Any] = []

    # ---------------------------------------------------------------- a pass

    def begin(self, batch: Any, samples: int, weight: Callable[[Any], float] | None = None) -> None:
        """The body gets this batch next.

        Args:
            batch: of any class; tensors in containers and dataclasses are followed.
            samples: in it. Where tensors have several dimensions of this size nothing is followed; nor is it in
                programs with compiled parts, which would be compiled twice.
            weight: what the loss is a mean over, of a batch.
        """
        self.end()
        if samples < 2 or _something_is_compiled():
            return
        try:
            shadows = shadows_of(batch, samples)
            weights = [1.0] * (SHADOWS + 1)
            if weight is not None:
                others = [with_tensors(batch, lambda t, k=k: nth(shadows, t, k)) for k in range(SHADOWS)]  # type: ignore[misc]
                weights = [float(weight(one)) for one in (*others, batch)]
                if len(set(weights)) == 1:
                    return  # It may have been counted before, and what was exchanged counts otherwise.
            self._held_bytes, self._most_bytes = 0, _spare_bytes(batch) // 10
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
        with torch._C.DisableTorchFunction():
            return self._met(known)

    def _met(self, known: list[tuple[torch.Tensor, torch.Tensor | None, Shadow | None]]) -> str | None:
        totals = [0.0] * (SHADOWS + 1)
        for root, grad, shadow in known:
            for k, value in enumerate((*(shadow.values if shadow else (root,) * SHADOWS), root)):
                value = value.detach().double()
                totals[k] += float((value if grad is None else value * grad.detach()).sum())
        first, second, both, now = (total * w for total, w in zip(totals, self._weights, strict=True))
        cross = abs(both - first - second + now)
        changes, size = max(abs(first - now), abs(second - now)), max(map(abs, (first, second, both, now)))
        rounding = 8 * max(torch.finfo(root.dtype).eps for root, _, _ in known)
        if not math.isfinite(cross) or cross <= max(OF_CHANGES, rounding) * changes:
            return None
        if cross <= max(OF_LOSS, rounding) * size:
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
            call = RepeatedCall(func, args, kwargs)
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

    def _before(self, call: RepeatedCall) -> dict[torch.Tensor, Shadow] | None:
        """The shadows of what is given to a call; None where there are none."""
        known = {t: shadow for t in call.tensors if (shadow := self._shadows.get(t)) is not None}
        if not known:
            return None
        # What a dispatch mode of the program's notes of each call, it would note of those that are repeated.
        if call.leaves_torch(known) or torch._C._len_torch_dispatch_stack() or self._held_bytes > self._most_bytes:
            self._stop()
            return None
        target = call.written_to
        if target is not None and target not in known:
            if target._base is not None:
                self._stop()  # What it is a view of may have shadows that are none of it.
                return None
            copy = target.detach()
            known[target] = Shadow(tuple(copy.clone() for _ in range(SHADOWS)))
        call.look_before(self._samples)
        return known

    def _after(self, call: RepeatedCall, known: dict[torch.Tensor, Shadow], result: Any) -> None:
        target = call.written_to
        made = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)] if target is None else [target]
        if not made:
            return
        if call.name == "grad":
            for t in made:
                if not t.requires_grad:  # Else its graph is read.
                    how = call.place() + OF_A_MEAN * call.is_of_a_mean
                    self._shadows[t] = Shadow(of_a_gradient(t, self._samples, call.is_of_a_mean), how)
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
                self._held_bytes += sum(other.numel() * other.element_size() for other in others)
                self._shadows[t] = Shadow(others, before or (call.place() if come_together(t, others) else ""))


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


def _spare_bytes(batch: Any) -> int:
    """Of memory, where a batch is."""
    devices: list[torch.device] = []
    with_tensors(batch, lambda t: devices.append(t.device) or t)  # type: ignore[func-returns-value]
    cuda = next((device for device in devices if device.type == "cuda"), None)
    if cuda is not None:
        return int(torch.cuda.mem_get_info(cuda)[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
