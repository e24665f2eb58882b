"""When a worker that does not reach the hub gives up."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raytrain_het.errors import EvictedError, HetError, RunFailedError

if TYPE_CHECKING:
    from raytrain_het.membership.agent import MemberAgent

FIRST_CONTACT_LIMIT_S = 120.0
"""A worker that has not reached the hub by then never does: the run fails."""


def out_of_reach(agent: MemberAgent, away_s: float, hang_limit_s: float, why: Exception) -> HetError | None:
    """What a worker is to leave with; None as long as it goes on trying.

    One that was a member goes by itself: if only it does not reach the hub, the others go on.

    Args:
        agent: the worker's.
        away_s: for so long the hub was not reached.
        hang_limit_s: for so long a member tries.
        why: what the last try has failed with.
    """
    slot = agent.member.slot
    if agent.record is None and away_s > FIRST_CONTACT_LIMIT_S:
        return RunFailedError(
            f"worker {slot} could not reach the membership actor within {FIRST_CONTACT_LIMIT_S:.0f} s ({why}). The "
            "machines of a run must reach each other on all ports."
        )
    if agent.record is not None and away_s > hang_limit_s:
        return EvictedError(f"worker {slot} has not reached the membership actor for {away_s:.0f} s ({why})")
    return None
