"""Which member owns, and so adds up, which part of the gradient."""

from __future__ import annotations

from collections.abc import Sequence

STEEPNESS = 3
"""Exponent by which parts grow with speed."""
MOST = 2.0
"""No member owns more than so many times an equal part, so that its link carries at most about twice as much."""
LEAST = 0.25
"""A part of less than so many times an equal one is not worth the wait for a slow member's answer."""


LINK_SLACK = 1.1
"""A link may be busy for so many times as long as it must be. A slow owner would hold a step up for longer."""


def owner_parts(speeds: Sequence[float], links_s: Sequence[float] = (), unhurried_s: float = 0.0) -> list[float]:
    """Parts by member, summing to 1: in proportion to ``p_i^3``, at most ``2/N``, and none where it would be tiny.

    Every bucket's reduction waits for its slowest owner, between two exchanges, and a slow member has the least time to
    spare. Members of equal speed own equal parts. A speed of 0 owns nothing.

    Where links are slow, they have the last word, also over those bounds: no member owns more than its link can carry
    in ``1.1 T``, with ``T`` what the busiest link needs at the least, see :func:`link_parts`.

    Args:
        speeds: by member.
        links_s: by member, seconds that its link takes for a whole gradient, one way; empty if links do not matter.
        unhurried_s: seconds a step that a link may be busy in any case.
    """
    equal = 1.0 / max(sum(speed > 0 for speed in speeds), 1)
    parts = _capped([speed**STEEPNESS for speed in speeds], MOST * equal)
    parts = _capped([part if part >= LEAST * equal else 0.0 for part in parts], MOST * equal)
    if not links_s or sum(speed > 0 for speed in speeds) < 3:
        return parts  # Of two, each sends and receives the gradient once, whoever owns what.
    owners = [i for i, speed in enumerate(speeds) if speed > 0]
    links = [links_s[i] for i in owners]
    limit_s = max(LINK_SLACK * busiest_link_s(link_parts(links), links), unhurried_s)
    limits = dict(zip(owners, _carried(limit_s, links), strict=True))
    parts = _limited(parts, [limits.get(i, 0.0) for i in range(len(speeds))], speeds)
    parts = [part if part >= LEAST * equal else 0.0 for part in parts]
    return [part / sum(parts) for part in parts]


def busiest_link_s(parts: Sequence[float], links_s: Sequence[float]) -> float:
    """How long the busiest link is busy in a step, one way: ``max_i (1 + (N - 2) o_i) l_i`` for parts ``o_i``.

    In the first half member ``i`` sends what it does not own, ``1 - o_i`` of a gradient, and in the second its part to
    ``N - 1`` others. It receives as much.
    """
    return max((1.0 + (len(parts) - 2) * part) * link for part, link in zip(parts, links_s, strict=True))


def link_parts(links_s: Sequence[float]) -> list[float]:
    """The parts that keep the busiest link as short as can be.

    ``o_i = max(0, (T / l_i - 1) / (N - 2))`` for the least ``T``, at least ``max_i l_i``, at which they come to 1, by
    bisection. What is too much then is taken off in proportion.

    Args:
        links_s: seconds above 0 for a whole gradient, of three members or more.
    """
    low, high = max(links_s), len(links_s) * max(links_s)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if sum(_carried(middle, links_s)) >= 1.0 else (middle, high)
    parts = _carried(high, links_s)
    return [part / sum(parts) for part in parts]


def _carried(limit_s: float, links_s: Sequence[float]) -> list[float]:
    """How large a part each link carries in that time."""
    return [max(0.0, (limit_s / link - 1.0) / (len(links_s) - 2)) for link in links_s]


def _limited(parts: Sequence[float], limits: Sequence[float], speeds: Sequence[float]) -> list[float]:
    """The parts, none above its limit; what is cut off goes to those with room, the faster the more.

    A member without a part gets one only when all others are full.
    """
    given = [min(part, limit) for part, limit in zip(parts, limits, strict=True)]
    missing = sum(parts) - sum(given)
    while missing > 1e-9:
        room = [limit - part for part, limit in zip(given, limits, strict=True)]
        wishes = [speed if space > 1e-12 else 0.0 for speed, space in zip(speeds, room, strict=True)]
        wanted = [wish if part > 0 else 0.0 for wish, part in zip(wishes, parts, strict=True)]
        wishes = wanted if sum(wanted) else wishes
        if not sum(wishes):
            break
        more = [min(missing * wish / sum(wishes), space) for wish, space in zip(wishes, room, strict=True)]
        given = [part + extra for part, extra in zip(given, more, strict=True)]
        missing -= sum(more)
    return [part / sum(given) for part in given]


def _capped(weights: Sequence[float], most: float) -> list[float]:
    """In proportion to the weights, but at most ``most`` each; if that can't be, in equal parts."""
    full: set[int] = set()
    while True:
        rest = sum(w for i, w in enumerate(weights) if i not in full)
        room = 1.0 - most * len(full)
        if rest <= 0 or room <= 0:
            count = sum(w > 0 for w in weights)
            return [1.0 / count if w > 0 else 0.0 for w in weights] if count else [0.0] * len(weights)
        parts = [most if i in full else room * w / rest for i, w in enumerate(weights)]
        over = {i for i, part in enumerate(parts) if part > most * (1 + 1e-9)}
        if not over:
            return parts
        full |= over
