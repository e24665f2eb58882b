"""Which members wait, and whether that can ever end: pure functions of where members say they are.

A member that waits is not to blame. If all wait, and not only for each other's gradients, the program itself has led
them to different places: the run fails with these places, and no member is dropped.
"""

from __future__ import annotations

from collections.abc import Sequence

from raytrain_het.membership.pace import pace_s
from raytrain_het.membership.peers import Peer
from raytrain_het.membership.place import STEP

LOG_AFTER_S = 5.0
"""A wait that lasts so long, and for several typical steps, is logged."""
TYPICAL_STEPS = 4
ASK_AGAIN_S = 1.0
"""As long as a member waits, all are asked so often where they are; in a large fleet less often."""
DEADLOCK_S = 3.0
"""All members must have waited at the same places for so long, with nothing under way that could end it."""


def where_all_are(peers: Sequence[Peer]) -> str:
    """``worker 0: in report() at step 12 (it waits); worker 1: computing step 13``."""
    said = (
        f"worker {p.member.slot}: {p.place.text or 'has not said where it is'}"
        for p in sorted(peers, key=lambda p: p.member.slot)
    )
    return "; ".join(said)


def somebody_waits(peers: Sequence[Peer]) -> bool:
    """Whether a member waits, as far as is known."""
    return any(p.place.waits for p in peers)


def deadlocked(peers: Sequence[Peer], now: float) -> bool:
    """Whether all wait for each other, and have done so at these very places for a while.

    If all wait in a step, the network holds them up, and not the program.
    """
    again_s = pace_s(ASK_AGAIN_S, len(peers))
    return all(
        p.place.waits and now - p.place_since >= DEADLOCK_S and now - p.place_heard <= 2 * again_s for p in peers
    ) and any(p.place.kind != STEP for p in peers)


def longest_wait(peers: Sequence[Peer], now: float) -> float:
    """The longest time that a member has waited at one place, seconds; 0 if none waits."""
    return max((now - p.place_since for p in peers if p.place.waits), default=0.0)


def to_blame(peers: Sequence[Peer], since: float, limit_s: float, now: float) -> list[Peer]:
    """The members that hold the others up: they do not wait, and were at one place since then, and for ``limit_s``."""
    return [p for p in peers if not is_innocent(p) and now - max(p.place_since, since) >= limit_s]


def is_innocent(peer: Peer) -> bool:
    """Whether it waits for something itself, outside of the step."""
    return peer.place.waits and peer.place.kind != STEP
