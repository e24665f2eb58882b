"""Tells when the outermost backward pass begins and ends.

Autograd's own callbacks belong to the graph task in which a hook runs. Under activation checkpointing with
``use_reentrant=True``, or a custom Function that calls ``backward()``, that is an inner one. So the watch stands where
every backward pass of Python code comes by: in place of autograd's engine, which it subclasses.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd import Variable

_Engine: Any = type(Variable._execution_engine)


class BackwardWatch(_Engine):
    """Autograd's engine, with a word before and after each outermost pass that accumulates gradients.

    ``torch.autograd.grad`` accumulates nothing and is passed on as it is; so are passes of other threads.

    Args:
        begins: called with the pass's roots, each with its gradient, and whether a graph of the pass is made.
        nested: called for each pass inside of another one.
        ends: called after the outermost pass, in the thread that asked for it, unless the pass has raised. What it
            raises comes out of the user's ``backward()``.
    """

    def __init__(
        self,
        *,
        begins: Callable[[Sequence[tuple[Any, Any]], bool], None],
        nested: Callable[[], None],
        ends: Callable[[], None],
    ) -> None:
        super().__init__()
        self._begins, self._nested, self._ends = begins, nested, ends
        self._before: Any = None
        self._thread = threading.get_ident()

    def __new__(cls, **_: Any) -> BackwardWatch:
        return super().__new__(cls)

    def run_backward(self, roots: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        """As torch calls it: (roots, gradients, keep_graph, create_graph, inputs, ...)."""
        if threading.get_ident() != self._thread:
            return super().run_backward(roots, *args, **kwargs)
        if torch._C._current_graph_task_id() != -1:
            self._nested()
            return super().run_backward(roots, *args, **kwargs)
        if not kwargs.get("accumulate_grad", False):
            return super().run_backward(roots, *args, **kwargs)
        self._begins(list(zip(roots, args[0], strict=True)), bool(args[2]))
        result = super().run_backward(roots, *args, **kwargs)
        self._ends()
        return result

    def accumulate(self, params: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor]) -> None:
        """Have autograd add gradients to parameters', by a pass that nobody watches: hooks on them are called."""
        with torch.enable_grad():
            roots = [p.view_as(p) for p in reversed(params)]  # Autograd begins with the youngest.
        args = (tuple(reversed(roots)), tuple(gradients), False, False, ())
        super().run_backward(*args, allow_unreachable=True, accumulate_grad=True)

    def install(self) -> None:
        """From now on this process's backward passes are watched."""
        self._before = Variable._execution_engine
        Variable._execution_engine = self

    def remove(self) -> None:
        """Put back what was there before."""
        if Variable._execution_engine is self:
            Variable._execution_engine = self._before
