"""What the members' links carry, as they see it on their own messages. Nothing more is sent for it."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Mapping
from statistics import fmean

NUM_LOOKS = 3
"""A path must be looked at so often before its rate is used: just after a connection was made it tells little."""
WINDOW = 8
"""The last so many looks at a path count. There are at most two a second."""
LEAST_S = 1e-3
"""The least time that a look counts: the kernel's clock may show nothing for less than a tick."""
LEAST_SENT = 0.1
"""If less of a gradient than this goes one way from look to look, as from a worker without a share, it tells nothing of
the link."""


class PathRates:
    """Pure bookkeeping, by slot."""

    def __init__(self) -> None:
        self._paths: dict[tuple[int, int], deque[tuple[float, float]]] = {}
        self._gradient_bytes: dict[int, int] = {}
        self.hosts: Mapping[int, str] = {}
        """By slot, the machine it is on. Messages within a machine say nothing of its link."""

    def observe(self, slot: int, sent: Mapping[int, tuple[float, float]], gradient_bytes: int = 1) -> None:
        """A member has looked at what it sent since it last did.

        Args:
            slot: the member's.
            sent: by the peer's slot, how many whole gradients, and seconds for which some of that was on the way.
            gradient_bytes: of a gradient as this member encodes it; 1 where nobody asks for :meth:`byte_s`.
        """
        if self._gradient_bytes.get(slot, gradient_bytes) != gradient_bytes:  # Another codec: other measures.
            self._paths = {ends: seen for ends, seen in self._paths.items() if slot != ends[0]}
        self._gradient_bytes[slot] = gradient_bytes
        for peer, (gradients, busy_s) in sent.items():
            self._paths.setdefault((slot, peer), deque(maxlen=WINDOW)).append((gradients, busy_s))

    def links_s(self, slots: Collection[int]) -> dict[int, float]:
        """By slot: seconds that its link takes for a whole gradient, one way; empty while somebody's is not known.

        All members send and receive at the same time, so the rates of a link's paths add up, and of the two directions
        the slower one counts. Where the other ends are slower, that is less than the link could carry.
        """
        return self._links_s(slots, dict.fromkeys(self._gradient_bytes, 1.0))

    def byte_s(self, slots: Collection[int]) -> dict[int, float]:
        """The same for a byte."""
        return self._links_s(slots, self._gradient_bytes)

    def _links_s(self, slots: Collection[int], sizes: Mapping[int, float]) -> dict[int, float]:
        links: dict[int, float] = {}
        for slot in slots:
            peers = [peer for peer in slots if peer != slot]
            others = [peer for peer in peers if self.hosts.get(peer) != self.hosts.get(slot)]
            peers = others or peers
            ways = [self._way(((slot, peer) for peer in peers), sizes), self._way(((p, slot) for p in peers), sizes)]
            if None in ways:
                return {}
            rates = [rate for sent, rate in filter(None, ways) if sent >= LEAST_SENT]
            if not rates:
                return {}
            links[slot] = 1.0 / min(rates)
        return links

    def _way(self, paths: Iterable[tuple[int, int]], sizes: Mapping[int, float]) -> tuple[float, float] | None:
        """All paths of a link in one direction: gradients from look to look, and what was sent a second while some of
        it was on the way, with so much for a sender's gradient. None if not all of them are known."""
        sent = rate = 0.0
        for path in paths:
            seen = self._paths.get(path, ())
            if len(seen) < NUM_LOOKS:
                return None
            gradients, busy_s = (fmean(values) for values in zip(*seen, strict=True))
            sent += gradients
            rate += sizes[path[0]] * gradients / max(busy_s, LEAST_S)
        return sent, rate

    def forget(self, slot: int) -> None:
        """Another worker has come to this slot, perhaps on another machine."""
        self._paths = {pair: seen for pair, seen in self._paths.items() if slot not in pair}
