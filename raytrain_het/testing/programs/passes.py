"""What the passes of a step come to when they are made one after the other, in one process: the reference's part of
``Program.by_pass``. From each pass the gradient and the changes of buffers are kept; their weighted mean is the step's.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


class ReferencePasses:
    """The passes of one step, made one after the other from the same state. Use it as a context manager.

    Args:
        model: the program's.
        optimizer: its optimizer.
        registered: what goes back to its state with every pass.
        sums: whether gradients are added up as they are, and not averaged.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, registered: dict[str, Any], *, sums: bool
    ) -> None:
        self._model, self._optimizer, self._registered, self._sums = model, optimizer, registered, sums
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        self._own: list[nn.Parameter] = list({id(p): p for p in [*model.parameters(), *trained]}.values())
        self._gradients: dict[int, torch.Tensor] = {}
        self._weight, self._total = 0.0, 0.0
        self._first, self._last = True, False
        self._at_start = self._state()
        self._changes: dict[str, torch.Tensor] = {}
        self._backward = torch.Tensor.backward
        self._depth = 0
        self._left: dict[int, torch.Tensor | None] | None = None
        """By parameter: what was in ``p.grad`` before the first pass."""

    def _state(self) -> dict[str, Any]:
        return {
            "model": {n: t.detach().clone() for n, t in self._tensors()},
            "groups": [
                {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in g.items() if k != "params"}
                for g in self._optimizer.param_groups
            ],
            "registered": {n: copy.deepcopy(obj.state_dict()) for n, obj in self._registered.items()},
        }

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self._model.named_parameters()
        yield from self._model.named_buffers()

    def __enter__(self) -> None:
        passes = self
        # A function, and no bound method: torch's own is called with the tensor in front.
        torch.Tensor.backward = lambda t, *a, **k: passes._combined(t, *a, **k)  # type: ignore[method-assign]

    def __exit__(self, *_: object) -> None:
        torch.Tensor.backward = self._backward  # type: ignore[method-assign]

    def begin(self, weight: float, *, last: bool) -> None:
        """Begin the next pass, with its weight. What the body of the last pass has changed is undone."""
        if not self._first:
            self._go_back()
        self._first, self._weight, self._last = False, weight, last
        self._total += weight

    def _go_back(self) -> None:
        with torch.no_grad():
            for name, t in self._tensors():
                t.copy_(self._at_start["model"][name])
        for group, old in zip(self._optimizer.param_groups, self._at_start["groups"], strict=True):
            for key, value in old.items():
                if isinstance(value, torch.Tensor):
                    group[key].copy_(value)
                else:
                    group[key] = value
        for name, obj in self._registered.items():
            obj.load_state_dict(copy.deepcopy(self._at_start["registered"][name]))

    def _keep_changes(self) -> None:
        for name, b in self._model.named_buffers():
            new, old = b.double(), self._at_start["model"][name].double()
            change = torch.where(torch.isfinite(old), torch.where(new == old, 0.0, new - old), new) * self._weight
            self._changes[name] = self._changes[name] + change if name in self._changes else change

    def _settle_buffers(self) -> None:
        """``b + sum_j w_j (b_j - b) / sum_j w_j``; where ``b`` is not finite, the mean of ``b_j``."""
        with torch.no_grad():
            for name, b in self._model.named_buffers():
                old = self._at_start["model"][name]
                change = self._changes[name] / self._total
                new = torch.where(torch.isfinite(old), old.double() + change, change)
                if b.is_floating_point():
                    b.copy_(torch.where(torch.isfinite(old) & (change == 0), old, new.to(b.dtype)))
                elif b.dtype == torch.bool:
                    b.copy_(new.round())
                else:
                    b.copy_(old + change.round().to(b.dtype))

    def _combined(self, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        if not self._depth:
            if self._left is None:
                self._left = {id(p): p.grad for p in self._own}
            for p in self._own:
                p.grad = None
        self._depth += 1
        try:
            self._backward(tensor, *args, **kwargs)
        finally:
            self._depth -= 1
        if self._depth:
            return
        factor = 1.0 if self._sums else self._weight
        for p in self._own:
            if p.grad is None:
                continue
            sofar = self._gradients.get(id(p))
            part = p.grad.detach() * factor
            self._gradients[id(p)] = part if sofar is None else sofar + part
            p.grad = torch.zeros_like(p)
        self._keep_changes()
        if self._last:
            for p in self._own:
                mean = self._gradients.get(id(p))
                left = self._left[id(p)] if self._left is not None else None
                if mean is not None and not self._sums:
                    mean = mean / self._total
                p.grad = mean if left is None else (left if mean is None else left + mean)
            self._settle_buffers()
