"""What the members' links carry in a run, as they see it on their own messages. Nothing is sent for it."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Mapping
from statistics import fmean

NUM_LOOKS = 3
"""A path that was looked at less often, just after a connection was made say, tells little."""
WINDOW = 8
"""So many last looks at a path count, of which there are at most two a second."""
LEAST_S = 1e-3
"""What takes less than a tick of the kernel's clock may be counted as nothing."""
LEAST_SENT = 0.1
"""Of a gradient: a way on which less goes from look to look, as from who has no share, tells nothing of a link."""


class Paths:
    """Pure bookkeeping, by slot."""

    def __init__(self) -> None:
        self._paths: dict[tuple[int, int], deque[tuple[float, float]]] = {}

    def observe(self, slot: int, sent: Mapping[int, tuple[float, float]]) -> None:
        """A member has looked at what it sent since it last did.

        Args:
            slot: the member's.
            sent: by the peer's slot, how many whole gradients, and seconds for which some of that was on the way.
        """
        for peer, (gradients, busy_s) in sent.items():
            self._paths.setdefault((slot, peer), deque(maxlen=WINDOW)).append((gradients, busy_s))

    def links_s(self, slots: Collection[int]) -> dict[int, float]:
        """By slot: seconds that its link takes for a whole gradient, one way; empty while somebody's is not known.

        All members send and receive at the same time, so the rates of a link's paths add up, and of the two directions
        the slower one counts. Where the other ends are slower, that is less than the link could carry.
        """
        links: dict[int, float] = {}
        for slot in slots:
            peers = [peer for peer in slots if peer != slot]
            ways = [self._way((slot, peer) for peer in peers), self._way((peer, slot) for peer in peers)]
            if None in ways:
                return {}
            rates = [rate for sent, rate in filter(None, ways) if sent >= LEAST_SENT]
            if not rates:
                return {}
            links[slot] = 1.0 / min(rates)
        return links

    def _way(self, paths: Iterable[tuple[int, int]]) -> tuple[float, float] | None:
        """All paths of a link in one direction: gradients from look to look, and gradients per second while some of one
        was on the way. None if not all of them are known."""
        sent = rate = 0.0
        for path in paths:
            seen = self._paths.get(path, ())
            if len(seen) < NUM_LOOKS:
                return None
            gradients, busy_s = (fmean(values) for values in zip(*seen, strict=True))
            sent += gradients
            rate += gradients / max(busy_s, LEAST_S)
        return sent, rate

    def forget(self, slot: int) -> None:
        """Another worker has come to that slot, perhaps on another machine."""
        self._paths = {pair: seen for pair, seen in self._paths.items() if slot not in pair}
