"""The parameters that are trained, and those that cannot be."""

from __future__ import annotations

import torch
from torch import nn

from raytrain_het.errors import ConfigError
from raytrain_het.worker.checks.unsupported import refuse


def trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """(name, parameter) of all that are trained.

    Raises:
        ConfigError: there is none, or one is of a kind that cannot travel.
        LoopOrderError: one is of a kind that is not supported.
    """
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise refuse("scripted module", f"{path or 'the model'!r} is a {type(module).__name__}")
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            if module.sparse:
                raise refuse("sparse gradient", f"{path!r} has sparse=True")
            if module.max_norm is not None:
                raise refuse("embedding with max_norm", f"{path!r} has max_norm={module.max_norm:g}")
    for name, p in model.named_parameters():
        if isinstance(p, nn.parameter.UninitializedParameter):
            raise refuse("lazy parameter", f"{name!r} has no shape yet")
        if type(p.data) is not torch.Tensor:
            raise refuse("parameter of another class", f"{name!r} is a {type(p.data).__name__}")
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not named:
        total = sum(1 for _ in model.parameters())
        raise ConfigError(
            f"the model has no trainable parameters ({total} parameters, requires_grad=False on all). "
            "Set p.requires_grad_(True) on those to train before prepare_model()."
        )
    for name, p in named:
        if p.is_complex() or not p.is_floating_point():
            raise refuse("complex parameter", f"{name!r} has {p.dtype}")
        if p.layout is not torch.strided:
            raise refuse("sparse parameter", f"{name!r} has {p.layout}")
    return named
