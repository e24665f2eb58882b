"""The name under which what a model's training step takes is kept: by runs and by probes alike."""

from __future__ import annotations

import hashlib

from torch import nn


def step_key(model: nn.Module, dataset_size: int, micro_batch_size: int | None) -> str:
    """Tells apart models whose steps may take different times, as well as can be told from the outside.

    Args:
        model: by the names, shapes and dtypes of its parameters, and which are trained.
        dataset_size: samples; another dataset's may be larger ones.
        micro_batch_size: most samples in one pass.
    """
    parameters = [(name, tuple(p.shape), str(p.dtype), p.requires_grad) for name, p in model.named_parameters()]
    return f"{hashlib.sha256(repr(parameters).encode()).hexdigest()[:16]}/{dataset_size}/{micro_batch_size}"
