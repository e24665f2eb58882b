"""What happened to a run's membership, in order."""

from __future__ import annotations

from typing import Any

MAX_EVENTS = 500
"""At least so many of the latest events are kept; their readers come every second or so and keep what they want."""


class EventLog:
    """Sequence numbers grow across restarts of the actor, so that a reader misses none and reads none twice."""

    def __init__(self, *, first_seq: int) -> None:
        self.next_seq = first_seq
        self._events: list[dict[str, Any]] = []

    def note(self, event: dict[str, Any]) -> None:
        """Add to the events."""
        self._events.append({"seq": self.next_seq, **event})
        self.next_seq += 1
        if len(self._events) >= 2 * MAX_EVENTS:
            del self._events[:MAX_EVENTS]

    def since(self, seq: int) -> list[dict[str, Any]]:
        """All that are still kept, from this number on."""
        num_kept = min(self.next_seq - seq, len(self._events))
        return self._events[len(self._events) - num_kept :] if num_kept > 0 else []
