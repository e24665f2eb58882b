"""The model's buffers: what a step's passes have made of them, averaged over all members.

The rule, by kind of buffer. ``b`` is its value when the step was opened, the same on all members; ``b_j`` what pass
``j`` of weight ``w_j`` has made of it, starting from ``b`` as every pass does:

====================================  ==============================================================================
floating point, complex               ``b + sum_j w_j (b_j - b) / sum_j w_j``; where ``b`` is not finite, the mean of
                                      ``b_j``. What nobody has changed keeps its bits
whole numbers, booleans               all must have made the same of it, and that it is then
sparse, quantized, None at the start  nobody may change it
====================================  ==============================================================================

A buffer that is a statistic of a pass (a batch norm's) becomes that of the whole batch, as far as it is a mean over
samples. Buffers are settled together with the gradients, at the end of the last backward pass: what the loop does to
them after that acts on what all members have.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from raytrain_het.allreduce.layout import Bucket, Layout
from raytrain_het.errors import ReplicaMismatchError
from raytrain_het.worker.checks.unsupported import refuse

_SAME = 1e-5
"""Whole numbers that differ by less than this part are the same: they travel in fp32."""


class BufferSync:
    """One model's buffers. Used by the training thread.

    Args:
        model: its buffers are those that it has now. A module may put another tensor of the same shape there any time.
    """

    def __init__(self, model: nn.Module) -> None:
        self._places: list[tuple[str, nn.Module, str]] = []
        """Those that travel."""
        self._constant: list[tuple[str, nn.Module, str, torch.Tensor | None, int]] = []
        """Those that nobody may change: with the tensor and its version."""
        self._forms: list[tuple[torch.Size, torch.dtype]] = []
        seen: set[int] = set()
        for path, module in model.named_modules():
            for name, buffer in module._buffers.items():
                full = f"{path}.{name}" if path else name
                if buffer is not None and id(buffer) in seen:
                    continue
                if buffer is None or buffer.layout is not torch.strided or buffer.is_quantized:
                    version = buffer._version if buffer is not None else 0
                    self._constant.append((full, module, name, buffer, version))
                    continue
                seen.add(id(buffer))
                self._places.append((full, module, name))
                self._forms.append((buffer.shape, buffer.dtype))
        self._before: list[torch.Tensor] = []
        self._changed: list[bool] = []
        self._buckets: list[Bucket] = []

    def travelling(self) -> list[tuple[str, torch.Tensor]]:
        """(name, a tensor of the shape in which it travels) of each buffer, for the layout."""
        return [(name, _as_travels(getattr(module, attribute))) for name, module, attribute in self._places]

    def bind(self, layout: Layout) -> None:
        """The layout is made: these are the buckets."""
        self._buckets = [b for b in layout.buckets if b.is_state]

    # ---------------------------------------------------------------- a step

    def begin(self) -> None:
        """A step is opened: this is ``b``."""
        self._before = [_dense_clone(b) for b in self._live()]
        self._changed = [False] * len(self._before)

    def rewind(self) -> None:
        """Another pass of the step begins: it starts from ``b`` too."""
        with torch.no_grad():
            for place, old in zip(self._places, self._before, strict=True):
                put(place, old)

    def gather(self, locals_: Sequence[torch.Tensor], weight: float, *, first: bool) -> None:
        """A pass of this weight is over: add ``w_j (b_j - b)`` to the buckets (n,).

        Raises:
            LoopOrderError: a buffer has another shape or dtype, is there no more or for the first time, or is of a
                kind that may not change.
        """
        live = self._live()
        place = 0
        for bucket in self._buckets:
            for segment in bucket.segments:
                target = locals_[bucket.index][segment.offset : segment.stop].view(segment.shape)
                change = _change(live[place], self._before[place], target.dtype)
                if first:
                    target.copy_(change).mul_(weight)
                else:
                    target.add_(change.to(target.device), alpha=weight)
                place += 1

    def settle(self, outs: Sequence[torch.Tensor], applies: bool, *, own: bool) -> None:
        """Put the members' mean in place; what was there when the step was opened if the step does not apply.

        Args:
            outs: the means, by bucket (n,).
            applies: whether the step does.
            own: whether this member's passes count in them.

        Raises:
            ReplicaMismatchError: members have made different whole numbers of one buffer.
        """
        live = self._live()
        before, self._before = self._before or [_dense_clone(b) for b in live], []
        place = 0
        with torch.no_grad():
            for bucket in self._buckets:
                for segment in bucket.segments:
                    old, where = before[place], self._places[place]
                    mean = outs[bucket.index][segment.offset : segment.stop].view(segment.shape).to(old.device)
                    if not applies:
                        put(where, old)
                    elif old.is_floating_point() or old.is_complex():
                        put(where, _mean(old, mean))
                    elif own:
                        _check_same(where[0], live[place], old, mean)
                    else:
                        put(where, _added(old, mean))
                    place += 1

    def values(self) -> dict[str, torch.Tensor]:
        """A copy of each that travels, by name."""
        return {name: _dense_clone(b) for (name, _, _), b in zip(self._places, self._live(), strict=True)}

    def forget(self) -> None:
        """The step that was open is not any more, and the state may have been loaded."""
        self._before = []
        self._constant = [
            (name, module, attribute, kept, kept._version if kept is not None else 0)
            for name, module, attribute, kept, _ in self._constant
        ]

    # ---------------------------------------------------------------- inside

    def _live(self) -> list[torch.Tensor]:
        for name, module, attribute, kept, version in self._constant:
            now = module._buffers.get(attribute)
            if now is not kept or now is not None and now._version != version:
                kind = "None" if kept is None else f"{kept.layout}, {kept.dtype}".removeprefix("torch.")
                raise refuse("changing buffer", f"{name!r} was {kind} at first and was changed")
        live = []
        for (name, module, attribute), (shape, dtype) in zip(self._places, self._forms, strict=True):
            buffer = module._buffers.get(attribute)
            if buffer is None:
                raise refuse("changing buffer", f"{name!r} had shape {list(shape)} and is None or gone now")
            if buffer.shape != shape or buffer.dtype != dtype:
                raise refuse(
                    "changing buffer",
                    f"{name!r} had shape {list(shape)} and {dtype}, and has {list(buffer.shape)} and {buffer.dtype} "
                    "now",
                )
            live.append(buffer.detach())
        return live


def _real(t: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(t.resolve_conj()) if t.is_complex() else t


_LIMB = 22
"""Bits of a whole number's change that travel in one fp32 number, which holds them exactly."""


def _num_limbs(dtype: torch.dtype) -> int:
    return -(-dtype.itemsize * 8 // _LIMB)


def _is_averaged(t: torch.Tensor) -> bool:
    return t.is_floating_point() or t.is_complex()


def _as_travels(t: torch.Tensor) -> torch.Tensor:
    """Real and imaginary parts; of whole numbers as many fp32 numbers as hold their bits."""
    return _real(t) if _is_averaged(t) else torch.empty((_num_limbs(t.dtype), *t.shape))


def _change(new: torch.Tensor, old: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What a pass has made of a buffer, as it travels."""
    if not _is_averaged(old):
        return _limbs(new, old).to(dtype)
    new, old = _real(new).to(dtype), _real(old).to(dtype)
    return torch.where(torch.isfinite(old), torch.where(new == old, 0, new - old), new)


def _limbs(new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """``new - old`` in pieces of ``_LIMB`` bits (limbs, ...), the lowest first; the highest has the sign."""
    change = new.to(torch.int64) - old.to(torch.int64)
    num = _num_limbs(old.dtype)
    low = [(change >> (_LIMB * k)) & (2**_LIMB - 1) for k in range(num - 1)]
    return torch.stack([*low, change >> (_LIMB * (num - 1))])


def _added(old: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """A whole number, and the change that all members agree on."""
    pieces = mean.round().to(torch.int64)
    change = sum((piece << (_LIMB * k) for k, piece in enumerate(pieces)), torch.zeros_like(pieces[0]))
    return (old.to(torch.int64) + change).to(old.dtype)


def _dense_clone(t: torch.Tensor) -> torch.Tensor:
    """A copy with memory for each element of its own, also of an expanded tensor."""
    return torch.empty_like(t, memory_format=torch.preserve_format).copy_(t) if _is_dense(t) else t.contiguous().clone()


def _is_dense(t: torch.Tensor) -> bool:
    return all(stride > 0 or size <= 1 for size, stride in zip(t.shape, t.stride(), strict=True))


def put(place: tuple[str, nn.Module, str], value: torch.Tensor) -> None:
    """Give a buffer a value: in its own memory, so that whoever holds it sees it, where each element has some."""
    _, module, attribute = place
    buffer = module._buffers[attribute]
    assert buffer is not None
    if _is_dense(buffer):
        buffer.copy_(value)
    elif not torch.equal(buffer, value):
        module._buffers[attribute] = value.clone()


def _mean(old: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    """``b`` and what has come of it, see the module's text. ``change`` is real."""
    real = _real(old)
    wide = real.to(change.dtype)
    new = torch.where(torch.isfinite(wide), wide + change, change).to(real.dtype)
    new = torch.where(torch.isfinite(wide) & (change == 0), real, new)
    return torch.view_as_complex(new) if old.is_complex() else new


def _check_same(name: str, new: torch.Tensor, old: torch.Tensor, mean: torch.Tensor) -> None:
    own = _limbs(new, old)
    off = ((own - mean).abs() > _SAME * own.abs() + 1e-3).any(dim=0)
    if bool(off.any()):
        where = tuple(int(k) for k in off.nonzero()[0])
        change = float(new[where]) - float(old[where])
        raise ReplicaMismatchError(
            f"buffer {name!r} ({new.dtype}) differs between workers: at {list(where)} this one has changed it by "
            f"{change:g}, and others by something else. Whole numbers and flags are no averages: they must not "
            "depend on a worker's own samples. Keep what counts a worker's samples outside of the model, or as a "
            "floating-point buffer, of which workers' changes are averaged."
        )
