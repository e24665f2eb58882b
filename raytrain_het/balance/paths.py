"""What the members' links carry, as they see it on their own messages. Nothing more is sent for it."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Mapping, Sequence
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
NUM_KNOWN = 4
"""In a larger fleet than :data:`MAX_WATCHED` so many paths each way have to be known."""
MAX_WATCHED = 16
"""In a fleet of no more members than this each tells of its paths to all others."""


def watched(rank: int, size: int) -> set[int]:
    """The ranks to which a member tells of its paths: in a large fleet those at distances 1, 2, 4, 8 ... either way.

    So each link has some ``2 log2(size)`` paths each way that are told of, and the others are taken to be like these.
    """
    if size <= MAX_WATCHED:
        return set(range(size)) - {rank}
    distances = [2**k for k in range(size.bit_length()) if 2**k < size]
    return {(rank + sign * d) % size for d in distances for sign in (1, -1)} - {rank}


class PathRates:
    """Pure bookkeeping, by slot."""

    def __init__(self) -> None:
        self._paths: dict[int, dict[int, deque[tuple[float, float]]]] = {}
        """By slot of the sender, then of the receiver: the last looks."""
        self._senders: dict[int, set[int]] = {}
        """By slot of the receiver: those that have told of a path to it."""
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
            self._forget_sender(slot)
        self._gradient_bytes[slot] = gradient_bytes
        paths = self._paths.setdefault(slot, {})
        for peer, (gradients, busy_s) in sent.items():
            self._senders.setdefault(peer, set()).add(slot)
            paths.setdefault(peer, deque(maxlen=WINDOW)).append((gradients, busy_s))

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
        here, on_host = set(slots), Counter(self.hosts.get(slot) for slot in slots)
        for slot in slots:
            host = self.hosts.get(slot)
            num_others = len(here) - on_host[host]
            num_peers = num_others or len(here) - 1

            def counts(peer: int, slot: int = slot, host: str | None = host, others: int = num_others) -> bool:
                return peer in here and peer != slot and not (others and self.hosts.get(peer) == host)

            out = [(slot, peer) for peer in self._paths.get(slot, ()) if counts(peer)]
            into = [(peer, slot) for peer in self._senders.get(slot, ()) if counts(peer)]
            large = len(here) > MAX_WATCHED
            ways = [self._way(way, num_peers, sizes, in_large_fleet=large) for way in (out, into)]
            if None in ways:
                return {}
            rates = [rate for sent, rate in filter(None, ways) if sent >= LEAST_SENT]
            if not rates:
                return {}
            links[slot] = 1.0 / min(rates)
        return links

    def _way(
        self, paths: Sequence[tuple[int, int]], num_paths: int, sizes: Mapping[int, float], *, in_large_fleet: bool
    ) -> tuple[float, float] | None:
        """All paths of a link in one direction: gradients from look to look, and what was sent a second while some of
        it was on the way, with so much for a sender's gradient. None if too few of them are known: in a small fleet
        all have to be, in a large one some, and the others are taken to be like these."""
        sent, rate, known, num_told = 0.0, 0.0, 0, len(paths)
        for sender, receiver in paths:
            seen = self._paths[sender].get(receiver, ())
            if len(seen) < NUM_LOOKS:
                continue
            gradients, busy_s = (fmean(values) for values in zip(*seen, strict=True))
            sent += gradients
            rate += sizes[sender] * gradients / max(busy_s, LEAST_S)
            known += 1
        if known < (min(num_told, NUM_KNOWN) if in_large_fleet else num_paths) or not known:
            return None
        return sent * num_paths / known, rate * num_paths / known

    def forget(self, slot: int) -> None:
        """Another worker has come to this slot, perhaps on another machine."""
        self._forget_sender(slot)
        for sender in self._senders.pop(slot, ()):
            self._paths[sender].pop(slot, None)

    def _forget_sender(self, slot: int) -> None:
        for receiver in self._paths.pop(slot, ()):
            self._senders[receiver].discard(slot)
