"""Numbers that the loop's body computes of a pass's samples together, and that no graph shows.

``adv = (adv - adv.mean()) / adv.std()`` on data that is not trained: each worker has a mean of its own samples, one
process that of the whole batch. So the calls of torch that a body makes are followed, in the first step of each epoch:
which tensors come from the batch, which of them are a reduction over its samples, and whether one of those comes into
the loss without a graph. What has a graph is :class:`~raytrain_het.training.losses.LossCheck`'s. Numbers that leave
torch (``.item()``, numpy) are not followed.
"""

from __future__ import annotations

import enum
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode
from torch.utils.weak import WeakTensorKeyDictionary

from raytrain_het.training.autograd_nodes import words

logger = logging.getLogger("raytrain_het")

FEWEST_SAMPLES = 3
"""A dimension of two may be anything."""
_REDUCTIONS = words(
    "sum nansum mean nanmean std var std_mean var_mean norm linalg_norm linalg_vector_norm normalize max min amax amin "
    "aminmax median nanmedian mode quantile nanquantile logsumexp softmax softmin log_softmax cumsum cumprod "
    "logcumsumexp prod bincount histc unique count_nonzero cov corrcoef topk kthvalue msort"
)
_LENGTHS = words("max min amax amin aminmax")
"""Of whole numbers they are lengths, by which a batch is cut or padded."""
_NUMBERS = words("sum nansum count_nonzero")
"""What a sum is divided by, and what the loss's graph is read for."""
_SHAPE_ONLY = words(
    "zeros_like ones_like empty_like full_like rand_like randn_like randint_like new_zeros new_ones new_empty new_full "
    "new_tensor"
)
_ONE_OF_THEM = words("getitem select unbind")
"""They may take one sample out of all."""
_SUMS = words("add sub rsub radd")
_LINEAR = _SUMS | words("mul div true_divide rmul rdiv")
_RATIOS = words("div true_divide normalize")
_PAIRS = words("add sub mul div true_divide eq ne lt gt le ge")
_PRODUCTS = words("matmul mm cdist")


class Kind(enum.IntEnum):
    """What a tensor is of the samples of a pass, as far as calls have shown."""

    SAMPLES = 1
    """Something of each sample by itself."""
    SCALED = 2
    """The same, times a number that depends on how many samples there are: the gradient of a mean over them."""
    REDUCED = 3
    """Samples put together, as the tensor's graph shows."""
    TOGETHER = 4
    """Samples put together, and no graph shows it."""


@dataclass(frozen=True)
class Trace:
    """What is known of one tensor."""

    kind: Kind
    how: str = ""
    """The call that has put samples together."""
    has_graph: bool = True
    """Whether the tensor had one when it was made."""


class BodyWatch(TorchFunctionMode):
    """Follows one pass of the loop's body at a time. Used by the training thread only."""

    def __init__(self) -> None:
        super().__init__()
        self._traces: Any = {}
        """By tensor."""
        self._samples = 0
        self._follows = self._stands = False

    def begin(self, batch: Any, samples: int) -> None:
        """The body gets this batch next.

        Programs with compiled parts are not followed: they would be compiled once with the watch and again without.
        """
        self.end()
        if samples < FEWEST_SAMPLES or _something_is_compiled():
            return
        self._traces, self._samples, self._follows = WeakTensorKeyDictionary(), samples, True
        for t in _tensors(batch, objects=True):
            if samples in t.shape:
                self._traces[t] = Trace(Kind.SAMPLES)
        _push_mode(self)
        self._stands = True

    def how(self, roots: Sequence[tuple[Any, Any]]) -> str | None:
        """A backward pass begins: the call that has put samples together, if that comes into a root."""
        traces = self._known([root for root, _ in roots if isinstance(root, torch.Tensor)]).values()
        return next((trace.how for trace in traces if trace.kind == Kind.TOGETHER), None)

    def end(self) -> None:
        """The body is over. A mode that the body has begun since, and not ended, stays."""
        self._follows = False
        self._traces = {}
        if not self._stands:
            return
        self._stands = False
        above = []
        while _get_current_function_mode_stack():
            mode = _pop_mode()
            if mode is self:
                break
            above.append(mode)
        for mode in reversed(above):
            _push_mode(mode)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called for each of the body's calls of torch."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self._follows:
            try:
                self._follow(_name_of(func), args, kwargs, result)
            except Exception:  # Of a call of another kind than any that was seen.
                logger.debug("a loop's body could not be followed", exc_info=True)
                self._follows = False
        return result

    # ---------------------------------------------------------------- what a call makes of what is known

    def _follow(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        given = self._known(_tensors((args, kwargs)))
        if not given or name in _SHAPE_ONLY:
            return
        made = list(_tensors(args[0] if name == "setitem" else result))
        if name == "grad":
            traces = self._known(_tensors(args[:1])).values()
            known = self._of_gradients(max(traces, key=_kind), made) if traces else {}
        elif name in _ONE_OF_THEM and not any(self._has_samples(t) for t in made):
            return
        else:
            trace = self._combined(name, args, kwargs, given, made)
            known = dict.fromkeys(made, trace)
        for t, trace in known.items():
            hidden = trace.kind == Kind.REDUCED and not t.requires_grad
            self._traces[t] = Trace(Kind.TOGETHER if hidden else trace.kind, trace.how, t.requires_grad)

    def _known(self, tensors: Iterable[torch.Tensor]) -> dict[torch.Tensor, Trace]:
        """What was made without a graph and has one now has come out of a function of the program's own, or of a
        checkpointed block: the loss's graph is read, or said not to be readable, there."""
        known = {}
        for t in tensors:
            trace = self._traces.get(t)
            if trace is not None and not trace.has_graph and t.grad_fn is not None and trace.kind == Kind.TOGETHER:
                trace = Trace(Kind.REDUCED, trace.how)
            if trace is not None:
                known[t] = trace
        return known

    def _has_samples(self, t: torch.Tensor) -> bool:
        return t.shape[:1] == (self._samples,) or t.shape[:2] == (1, self._samples)

    def _combined(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], given: dict[torch.Tensor, Trace],
        made: list[torch.Tensor],
    ) -> Trace:  # fmt: skip
        """What a call makes of what is known of its arguments; but for what the loss's graph shows by itself."""
        tensors = list(_tensors((args, kwargs)))
        if name in _LINEAR and any(t.requires_grad for t in tensors):
            is_loss = any(trace.kind == Kind.REDUCED for trace in given.values())
            given = {t: x for t, x in given.items() if t.requires_grad or not _is_shown(name, t, x, is_loss=is_loss)}
        trace = max(given.values(), key=_kind, default=Trace(Kind.SAMPLES))
        how = self._puts_together(name, args, kwargs, given, made) if trace.kind <= Kind.SCALED else None
        if trace.kind == Kind.SCALED:
            all_scaled = all(given.get(t, trace).kind == Kind.SCALED for t in tensors)
            if name == "sign" or name in _RATIOS and all(t in given for t in tensors) and all_scaled:
                return Trace(Kind.SAMPLES)
            added = name in _SUMS and len(tensors) > 1
            return Trace(Kind.TOGETHER, trace.how) if how or added or not all_scaled else trace
        return Trace(Kind.REDUCED, how) if how else trace

    def _of_gradients(self, of: Trace, made: list[torch.Tensor]) -> dict[torch.Tensor, Trace]:
        """``torch.autograd.grad()``, where it makes no graph. Of a mean over samples it has one over their number in
        it."""
        how = "torch.autograd.grad()"
        known = {}
        for t in made:
            if t.requires_grad:
                continue  # Its graph is read.
            if t.shape[:1] != (self._samples,):
                known[t] = Trace(Kind.TOGETHER, f"{how} of all samples' loss")
            elif of.kind == Kind.REDUCED and not of.how.startswith("sum"):
                known[t] = Trace(Kind.SCALED, f"{how} of a mean over samples ({of.how})")
            else:
                known[t] = Trace(Kind.SAMPLES)
        return known

    def _puts_together(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], given: dict[torch.Tensor, Trace],
        made: list[torch.Tensor],
    ) -> str | None:  # fmt: skip
        """What a call is called that puts together samples, which were by themselves."""
        n, tensors = self._samples, list(_tensors((args, kwargs)))
        t = tensors[0]
        if name in _LENGTHS and not (t.is_floating_point() or t.is_complex()):
            return None
        if name in _PRODUCTS and len(tensors) > 1 and all(x in given for x in tensors[:2]):
            return name if made[0].shape[-2:] == (n, n) else None
        if name in _PAIRS and len(tensors) > 1:
            pairs = {tuple(x.shape[:2]) for x in tensors[:2]} == {(1, n), (n, 1)}
            return f"{name} of each sample and each other" if pairs else None
        if name not in _REDUCTIONS:
            flat = all(x.dim() == 0 for x in made) and any(x.numel() % n == 0 for x in given)
            return str(kwargs.get("reduction") or name) if flat else None
        dims = _dims(name, args, kwargs)
        if dims is None:
            return name if t.numel() % n == 0 else None
        return name if t.shape[:1] == (n,) and 0 in {d % max(t.dim(), 1) for d in dims} else None


def _kind(trace: Trace) -> Kind:
    return trace.kind


def _is_shown(name: str, constant: torch.Tensor, trace: Trace, *, is_loss: bool) -> bool:
    """Whether a constant has no part in the gradient, or its part is read from the loss's graph.

    Args:
        is_loss: whether samples were put together before in what it is added to, or multiplied by.
    """
    if name in _SUMS:
        return is_loss
    return constant.numel() == 1 and (is_loss or trace.how in _NUMBERS)


_WITH_NUMBER_FIRST = words("norm topk kthvalue quantile nanquantile linalg_norm linalg_vector_norm renorm")
"""Their second argument is no dimension."""
_OF_ALL = words("bincount histc unique cov corrcoef")


def _dims(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int] | None:
    """The dimensions that are reduced; None is all of them."""
    if name in _OF_ALL:
        return None
    place = 2 if name in _WITH_NUMBER_FIRST else 1
    dim = kwargs.get("dim", kwargs.get("axis"))
    if dim is None and len(args) > place and not isinstance(args[place], bool | torch.Tensor):
        dim = args[place]
    if dim is None:
        return {"topk": [-1], "kthvalue": [-1], "normalize": [1], "msort": [0], "mode": [-1]}.get(name)
    return [int(d) for d in dim] or None if isinstance(dim, list | tuple) else [int(dim)]


def _name_of(func: Callable[..., Any]) -> str:
    """The same for ``x.add_(y)``, ``torch.add(x, y)`` and an operator's ``__add__``."""
    return str(getattr(func, "__name__", "")).strip("_")


def _tensors(value: Any, *, objects: bool = False, depth: int = 6) -> Iterator[torch.Tensor]:
    """All tensors in a call's arguments; with ``objects``, in a batch of any class."""
    if isinstance(value, torch.Tensor):
        yield value
        return
    if objects and not isinstance(value, type) and not isinstance(value, Mapping) and hasattr(value, "__dict__"):
        value = vars(value)
    items = value.values() if isinstance(value, Mapping) else value
    if depth and isinstance(value, Mapping | list | tuple | set | frozenset):
        for item in items:
            yield from _tensors(item, objects=objects, depth=depth - 1)


def _something_is_compiled() -> bool:
    """Whether torch.compile has been called in this process."""
    frames = sys.modules.get("torch._dynamo.eval_frame")
    backends = getattr(frames, "cached_backends", {}) if frames is not None else {}
    return any(backend is not None for backend in dict(backends).values())
