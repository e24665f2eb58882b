"""How often members tell the hub of themselves: in a large fleet less often, so that it hears no more than it can."""

from __future__ import annotations

LARGE_FLEET = 32
"""With more members than this, what need not be known at once is looked at every tick, and not with each message."""
MOST_A_SECOND = 64
"""So many messages of one kind the hub hears a second, of all members together."""


def pace_s(least_s: float, num_members: int) -> float:
    """The time between two messages of one kind, seconds: ``max(least_s, num_members / MOST_A_SECOND)``.

    Example:
        >>> pace_s(0.05, 8), pace_s(0.05, 1000)
        (0.125, 15.625)
    """
    return max(least_s, num_members / MOST_A_SECOND)
