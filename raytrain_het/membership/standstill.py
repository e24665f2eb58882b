"""Who waits for whom, and when that will never end: pure functions over what members have said of their places.

A member that waits is never to blame for it. Where all wait, and not just for each other's gradients, the program
itself has led them to different places: it is told at once, and nobody is dropped.
"""

from __future__ import annotations

from collections.abc import Sequence

from raytrain_het.membership.peers import Peer
from raytrain_het.membership.whereabouts import STEP

LOG_AFTER_S = 5.0
"""Somebody who waits for so long, and for several typical steps, is told about."""
TYPICAL_STEPS = 4
ASK_AGAIN_S = 1.0
"""As long as somebody waits, members are asked so often where they are."""
DEADLOCK_S = 3.0
"""All have waited at the same places for so long, with nothing under way that could end it."""


def where_all_are(peers: Sequence[Peer]) -> str:
    """``worker 0: in report() at step 12 (it waits); worker 1: computing step 13``."""
    said = (
        f"worker {p.member.slot}: {p.place.text or 'has not said where it is'}"
        for p in sorted(peers, key=lambda p: p.member.slot)
    )
    return "; ".join(said)


def somebody_waits(peers: Sequence[Peer]) -> bool:
    """As far as is known."""
    return any(p.place.waits for p in peers)


def deadlocked(peers: Sequence[Peer], now: float) -> bool:
    """Whether all wait for each other, and have done so at these very places for a while.

    Where all wait in a step, it is the network that holds them up, and not the program.
    """
    return all(
        p.place.waits and now - p.place_since >= DEADLOCK_S and now - p.place_heard <= 2 * ASK_AGAIN_S for p in peers
    ) and any(p.place.kind != STEP for p in peers)


def longest_wait(peers: Sequence[Peer], now: float) -> float:
    """Seconds that somebody has waited at one place; 0 if nobody waits."""
    return max((now - p.place_since for p in peers if p.place.waits), default=0.0)


def to_blame(peers: Sequence[Peer], since: float, limit_s: float, now: float) -> list[Peer]:
    """Who holds the others up: does not wait, and has been at one place since then, and for ``limit_s``."""
    return [p for p in peers if not is_innocent(p) and now - max(p.place_since, since) >= limit_s]


def is_innocent(peer: Peer) -> bool:
    """Whether it waits for something itself, outside of the step."""
    return peer.place.waits and peer.place.kind != STEP
