"""What the members' links carry in a run, as they see it on their own messages. Nothing is sent for it."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping

NUM_LOOKS = 3
"""A path that was looked at less often, just after a connection was made say, tells little."""
WINDOW = 8
"""So many last looks at a path count, of which there are at most two a second."""


class Paths:
    """Pure bookkeeping, by slot."""

    def __init__(self) -> None:
        self._paths: dict[tuple[int, int], deque[float]] = {}

    def observe(self, slot: int, paths_s: Mapping[int, float]) -> None:
        """A member has looked at what it sends: by the peer's slot, seconds for a whole gradient at the rate seen."""
        for peer, seconds in paths_s.items():
            if seconds > 0:
                self._paths.setdefault((slot, peer), deque(maxlen=WINDOW)).append(seconds)

    def links_s(self, slots: Collection[int]) -> dict[int, float]:
        """By slot: seconds that its link takes for a whole gradient, one way; empty while somebody's is not known.

        That of the best path from it or to it, whichever of the two is worse. A path shows less than the link can carry
        when little is sent on it, several share the link, or the other end is slower; and somewhat more in a burst.
        """
        links: dict[int, float] = {}
        for slot in slots:
            out = [min(seen) for peer in slots if (seen := self._seen(slot, peer))]
            into = [min(seen) for peer in slots if (seen := self._seen(peer, slot))]
            if not out or not into:
                return {}
            links[slot] = max(min(out), min(into))
        return links

    def _seen(self, sender: int, receiver: int) -> deque[float] | tuple[float, ...]:
        seen = self._paths.get((sender, receiver), ())
        return seen if len(seen) >= NUM_LOOKS else ()

    def forget(self, slot: int) -> None:
        """Another worker has come to that slot, perhaps on another machine."""
        self._paths = {pair: seen for pair, seen in self._paths.items() if slot not in pair}
