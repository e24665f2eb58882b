"""What the hub has to know of one run besides its settings, which are a :class:`~raytrain_het.config.HetConfig`."""

from __future__ import annotations

from dataclasses import dataclass

from raytrain_het.membership.cursor import Cursor


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """One run on one set of slots."""

    run_id: str
    """Names the run."""
    num_slots: int
    """How many workers the run has when all slots are filled."""
    host: str = "127.0.0.1"
    """Address of the machine that the hub runs on, as the workers reach it."""
    checkpoint: str | None = None
    """Checkpoint from which the run resumes."""
    checkpoint_cursor: Cursor | None = None
    """Position stored in that checkpoint."""
