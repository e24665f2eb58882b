"""Train one PyTorch model on unequal machines, through failures and joins."""

from __future__ import annotations

from raytrain_het.config import HetConfig
from raytrain_het.training.user import (
    evaluate,
    num_participants,
    prepare_data_loader,
    prepare_model,
    prepare_optimizer,
    register_state,
    report,
)

__all__ = [
    "HetConfig",
    "evaluate",
    "num_participants",
    "prepare_data_loader",
    "prepare_model",
    "prepare_optimizer",
    "register_state",
    "report",
]
