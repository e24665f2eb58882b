"""What happened in a run, in order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from raytrain_het.membership.events import Event

MAX_EVENTS = 500
"""At least so many of the latest events are kept; their readers come every second or so and keep what they want."""


@dataclass(kw_only=True)
class Entry:
    """An event in the log."""

    seq: int
    """Grows by one with every event."""
    event: Event
    generation: int | None = None
    """The one in force, for what the hub saw of the members."""
    slot: int | None = None
    """The worker's, for what one said."""
    time: float | None = None
    """When the hub told of it, seconds since 1970."""

    def to_json(self) -> dict[str, Any]:
        """A line of ``events.jsonl``."""
        fields = msgspec.to_builtins(self.event)
        line: dict[str, Any] = {"seq": self.seq}
        if self.slot is not None:
            line["slot"] = self.slot
        line["kind"] = fields.pop("kind")
        if self.generation is not None:
            line["generation"] = self.generation
        return {**line, **fields, "time": self.time}


class EventLog:
    """Sequence numbers grow across restarts of the hub, so that a reader misses none and reads none twice."""

    def __init__(self, *, first_seq: int) -> None:
        self.next_seq = first_seq
        self._entries: list[Entry] = []

    def note(self, event: Event, *, generation: int | None = None, slot: int | None = None) -> None:
        """Add an event."""
        self._entries.append(Entry(seq=self.next_seq, event=event, generation=generation, slot=slot))
        self.next_seq += 1
        if len(self._entries) >= 2 * MAX_EVENTS:
            del self._entries[:MAX_EVENTS]

    def since(self, seq: int) -> list[Entry]:
        """All that are still kept, from this number on."""
        num_kept = min(self.next_seq - seq, len(self._entries))
        return self._entries[len(self._entries) - num_kept :] if num_kept > 0 else []
