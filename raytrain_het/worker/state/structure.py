"""Whether a program still trains what it began with: the model's modules and parameters, and the optimizer's groups.

Which element of a message belongs to which parameter is settled when the run begins. So a parameter that is unfrozen,
replaced or added afterwards would be trained by each worker for itself.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from raytrain_het.worker.checks.unsupported import refuse

TURNS = 8
"""In so many steps all modules are looked at."""


class Structure:
    """What a worker began with. Looking costs half a microsecond for each module and parameter."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._modules = [
            (path, module, dict(module._parameters), len(module._buffers), dict(module._modules))
            for path, module in model.named_modules()
        ]
        self._frozen = [(name, p) for name, p in model.named_parameters() if not p.requires_grad]
        self._optimizer = optimizer
        self._groups = [list(map(id, group["params"])) for group in optimizer.param_groups]

    def check(self, step: int, *, everything: bool) -> None:
        """Look at what is trained and at the optimizer's groups, and at all modules or at one of each ``TURNS``.

        Args:
            step: by which modules take turns.
            everything: whether none is left out, as at the beginning of an epoch.

        Raises:
            NotSupportedError: something is another one than at the beginning; the message names the first.
        """
        looked_at = self._modules if everything else self._modules[step % TURNS :: TURNS]
        for path, module, parameters, num_buffers, modules in looked_at:
            for kind, then, now in (
                ("parameter", parameters, module._parameters),
                ("module", modules, module._modules),
            ):
                if len(then) != len(now) or any(now.get(name, _GONE) is not one for name, one in then.items()):
                    name = next(n for n in (*then, *now) if now.get(n, _GONE) is not then.get(n, _GONE))
                    how = "is gone" if name not in now else "was replaced" if name in then else "is new"
                    raise refuse("changed model", f"{kind} {_join(path, name)!r} {how}")
            if len(module._buffers) != num_buffers:
                raise refuse(
                    "changed model",
                    f"{path or 'the model'!r} has {len(module._buffers)} buffers, and had {num_buffers}",
                )
        for name, p in self._frozen:
            if p.requires_grad:
                raise refuse("unfrozen parameter", f"{name!r} is")
        if [list(map(id, group["params"])) for group in self._optimizer.param_groups] != self._groups:
            raise refuse("added group", f"there are {len(self._optimizer.param_groups)}, and were {len(self._groups)}")


_GONE = object()


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def parameters_outside(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """What the optimizer trains and the model does not have, by group, place and shape."""
    inside = {id(p) for p in model.parameters()}
    return [
        f"parameter {place} of group {number}, of shape {list(p.shape)}"
        for number, group in enumerate(optimizer.param_groups)
        for place, p in enumerate(group["params"])
        if id(p) not in inside
    ]


def named_flags(model: nn.Module) -> Iterator[tuple[str, bool]]:
    """(name, flag): which parameters are trained, and which modules are in training mode."""
    for name, p in model.named_parameters():
        yield f"{name}.requires_grad", p.requires_grad
    for name, module in model.named_modules():
        yield f"{name}.training".lstrip("."), module.training
