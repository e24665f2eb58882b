"""The hooks that a program has put on parameters: they get the mean gradient, as in one process with the whole batch.

A worker's own gradient is another number, and few hooks are linear: one that clips, or makes an optimizer's step, would
do something else on each worker. So autograd finds none of them in the pass; when the means are known it accumulates
these itself, and calls hooks as it always does.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch

Hooks = dict[Any, Any]


class UserHooks:
    """Of all parameters that are trained.

    Args:
        params: whose hooks, in the order in which :meth:`on` counts them.
        own: ids of those that are not the program's.
    """

    def __init__(self, params: Sequence[torch.Tensor], own: Collection[int]) -> None:
        self._params, self._own = params, frozenset(own)
        self._aside: list[tuple[Hooks, Hooks]] = []
        """Where hooks were replaced, and these."""
        self._with_hooks: set[int] = set()

    def on(self, index: int) -> bool:
        """Whether a parameter had some when the pass began."""
        return index in self._with_hooks

    def set_aside(self) -> None:
        """A pass begins: autograd finds none of them."""
        self.put_back()
        self._with_hooks = set()
        for index, p in enumerate(self._params):
            if not p._backward_hooks and self._own.issuperset(p._post_accumulate_grad_hooks or ()):
                continue
            for hooks in (p._backward_hooks, p._post_accumulate_grad_hooks):
                theirs = {key: hook for key, hook in hooks.items() if key not in self._own} if hooks else {}
                if hooks is not None and theirs:
                    self._with_hooks.add(index)
                    self._aside.append((hooks, theirs))
                    hooks.update(dict.fromkeys(theirs, _nothing))

    def put_back(self) -> None:
        """The pass is over, or has failed: hooks go back to where the program has put them, unless it has removed
        them."""
        for hooks, theirs in self._aside:
            hooks.update({key: hook for key, hook in theirs.items() if key in hooks})
        self._aside = []


def _nothing(_: torch.Tensor) -> None:
    """Stands for a hook during a pass."""
