"""What the membership actor has to know about a run."""

from __future__ import annotations

from dataclasses import dataclass

from raytrain_het.balance.scores import Policy
from raytrain_het.membership.cursor import Cursor


@dataclass(frozen=True, kw_only=True)
class HubSettings:
    """Settings of one run's membership. Times in seconds."""

    run_id: str
    num_slots: int
    shares: tuple[float, ...] | None = None
    """Relative batch shares by slot; None is equal."""
    balance: bool = False
    """Whether shares follow the speeds that workers turn out to have."""
    score_policy: str | Policy = "train_step"
    """How a worker's measurements become its score."""
    warm_spares: bool = False
    """Whether a worker that costs more than it gives may have a share of 0."""
    alpha: float = 0.0
    """Exponent of the learning-rate scales."""
    lr_scale_normalisation: str = "mean"
    codecs: tuple[str, ...] = ("none",)
    """By which each slot encodes what it sends; a single one is everybody's."""
    compression_error: float | None = None
    """Other codecs may be chosen, that lose no more than this of a message; None: those above stay."""
    hierarchy: bool | None = False
    """Whether gradients of members on one host are added up there first; None: as a table says."""
    backend: str = "tcp"
    host: str = "127.0.0.1"
    """Address of the machine the actor runs on, as the workers reach it."""
    silence_s: float = 0.5
    hang_limit_s: float = 600.0
    start_timeout_s: float = 120.0
    checkpoint: str | None = None
    """Checkpoint from which the run resumes."""
    checkpoint_cursor: Cursor | None = None
    """Position stored in that checkpoint."""
