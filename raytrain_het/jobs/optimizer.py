"""From ``optimizer:`` in a job file to torch's optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from raytrain_het.optim import optimizer_of

_NORMS = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)


def make_optimizer(config: dict[str, Any], model: nn.Module) -> torch.optim.Optimizer:
    """torch's optimizer of ``config["optimizer"]`` at the rate ``config["lr"]``.

    If weights decay, the parameters that do not are in a second parameter group.

    Args:
        config: What the training function is given.
        model: The model whose parameters it updates.
    """
    optimizer = optimizer_of(config["optimizer"])
    spared = set() if optimizer.decay_all or not optimizer.weight_decay else names_that_do_not_decay(model)
    groups = [
        {"params": [p for name, p in model.named_parameters() if (name in spared) == without], "weight_decay": decay}
        for without, decay in ((False, optimizer.weight_decay), (True, 0.0))
    ]
    make: Callable[..., torch.optim.Optimizer] = getattr(torch.optim, optimizer.torch_name)
    return make([group for group in groups if group["params"]], lr=config["lr"], **optimizer.torch_options())


def names_that_do_not_decay(model: nn.Module) -> set[str]:
    """Names of biases, and of the parameters of normalisation layers: to shrink offsets and scales does not make
    weights smaller."""
    of_norms = {id(p) for module in model.modules() if isinstance(module, _NORMS) for p in module.parameters(False)}
    return {
        name for name, p in model.named_parameters() if id(p) in of_norms or name.rpartition(".")[2].endswith("bias")
    }
