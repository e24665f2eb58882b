"""The hooks that a program has put on parameters: they get the mean gradient, as in one process with the whole batch.

A worker's own gradient is another number, and few hooks are linear: one that clips, or makes an optimizer's step, would
do something else on each worker. So they are kept out of the pass, and called when the mean is known.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch

Hooks = dict[Any, Any]


class UserHooks:
    """Of all parameters that are trained.

    Args:
        params: whose hooks, in the order in which :meth:`changed` and :meth:`accumulated` count them.
        own: ids of those that are not the program's.
    """

    def __init__(self, params: Sequence[torch.Tensor], own: Collection[int]) -> None:
        self._params, self._own = params, own
        self._aside: list[tuple[Hooks, Hooks]] = []
        """Where hooks were taken out, and these."""
        self._of_gradient: dict[int, Hooks] = {}
        self._of_accumulation: dict[int, Hooks] = {}

    def set_aside(self) -> None:
        """A pass begins: autograd finds none of them."""
        self.put_back()
        self._of_gradient, self._of_accumulation = {}, {}
        for index, p in enumerate(self._params):
            self._take(index, p._backward_hooks, self._of_gradient)
            self._take(index, p._post_accumulate_grad_hooks, self._of_accumulation)

    def _take(self, index: int, hooks: Hooks | None, taken: dict[int, Hooks]) -> None:
        theirs = {key: hook for key, hook in hooks.items() if key not in self._own} if hooks else {}
        if hooks is None or not theirs:
            return
        taken[index] = theirs
        self._aside.append((hooks, theirs))
        for key in theirs:
            del hooks[key]

    def put_back(self) -> None:
        """The pass is over, or has failed: they are where the program has put them."""
        for hooks, theirs in self._aside:
            hooks.update(theirs)
        self._aside = []

    def changed(self, index: int, mean: torch.Tensor) -> torch.Tensor:
        """What a parameter's hooks (``Tensor.register_hook``) make of its mean gradient."""
        for hook in self._of_gradient.get(index, {}).values():
            result = hook(mean)
            mean = mean if result is None else result
        return mean

    def accumulated(self, index: int) -> None:
        """A parameter has its gradient: call those of ``register_post_accumulate_grad_hook``."""
        for hook in self._of_accumulation.get(index, {}).values():
            hook(self._params[index])
