"""Whether tensors can go through the compiled loops, and the way there."""

from __future__ import annotations

import functools
import logging
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from raytrain_het.allreduce.codecs.packed import Feedback

logger = logging.getLogger("raytrain_het")


@functools.cache
def kernels() -> ModuleType | None:
    """The compiled loops, loaded when first needed; None where numba does not work, and tensors' own operations do the
    same, some twenty times as slowly."""
    try:
        from raytrain_het.allreduce.codecs import kernels as loops
    except Exception as error:  # Also what a numba that does not suit this Python or numpy raises.
        logger.warning(
            "codecs are slow on this machine: numba does not work here (%s: %s). Install a version that suits this "
            "Python: pip install --upgrade numba.",
            type(error).__name__,
            error,
        )
        return None
    return loops


def loops_for(tensor: torch.Tensor) -> ModuleType | None:
    """The compiled loops, if they can work on this tensor."""
    return kernels() if tensor.device.type == "cpu" and tensor.is_contiguous() else None


def array(tensor: torch.Tensor) -> Any:
    """A tensor's memory as a numpy array."""
    return tensor.detach().numpy()


def arrays(feedback: Feedback | None) -> tuple[Any, Any, float]:
    """What the loops are told of error feedback: the residual, the next one, and the weight."""
    if feedback is None:
        return _NONE, _NONE, 1.0
    return array(feedback.residual), array(feedback.following), feedback.weight


_NONE = np.empty(0, np.float32)
