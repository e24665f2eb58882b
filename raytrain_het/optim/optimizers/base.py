"""What an optimizer of a job file is: options, and the name of torch's class. The objects are made elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from raytrain_het.named_options import FROM_0, TRUE_OR_FALSE, NamedOptions, option


@dataclass(frozen=True, kw_only=True)
class Optimizer(NamedOptions):
    """What all optimizers have in common. The rate is the job's own field, ``lr``.

    :func:`raytrain_het.jobs.optimizer.make_optimizer` makes the object.
    """

    field = "optimizer"
    example = "{'sgd': {'momentum': 0.9}}"
    torch_name: ClassVar[str]
    """The name of the class in ``torch.optim``."""

    weight_decay: float = option(0.0, FROM_0)
    """An L2 penalty, added to the gradient; ``adamw`` takes it off the weights instead."""
    decay_all: bool = option(False, TRUE_OR_FALSE)
    """Whether the biases and the parameters of normalisation layers decay too."""

    def torch_options(self) -> dict[str, Any]:
        """What torch's class is given besides parameters, rate and decay."""
        return {}
