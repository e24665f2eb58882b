"""Lines of ``events.jsonl`` have the keys that people's tools read."""

from __future__ import annotations

from typing import Any

import pytest

from raytrain_het.balance.scoreboard import Table
from raytrain_het.membership import events
from raytrain_het.membership.event_log import EventLog

TABLE = Table(1, {0: 1.5, 1: 0.5}, {0: 0.5, 1: 1.5}, {0: 12, 1: 4}, 0.25, "a test")


@pytest.mark.parametrize(
    ("event", "source", "line"),
    [
        (
            events.Lost(slot=2, uid="2-a", reason="it died"),
            {"generation": 3},
            {"kind": "lost", "generation": 3, "slot": 2, "uid": "2-a", "reason": "it died"},
        ),
        (
            events.Evicted(slot=2, uid="2-a", reason="silent", expected=True, left_out=0.5),
            {"generation": 3},
            {"kind": "evicted", "generation": 3, "slot": 2, "uid": "2-a"}
            | {"reason": "silent", "expected": True, "left_out": 0.5},
        ),
        (
            events.TableIssued.of(TABLE),
            {"generation": 0},
            {"kind": "table", "generation": 0, "version": 1, "scores": {0: 1.5, 1: 0.5}}
            | {"lr_scales": {0: 0.5, 1: 1.5}, "shares": {0: 12, 1: 4}, "predicted_step_s": 0.25, "reason": "a test"}
            | {"links_s": {}, "codecs": {}, "hierarchy": False},
        ),
        (
            events.Drift(step=7, largest_difference=0.1),
            {"slot": 1},
            {"slot": 1, "kind": "drift"} | {"step": 7, "largest_difference": 0.1},
        ),
        (events.Warned(text="so"), {}, {"kind": "warning", "text": "so"}),
    ],
)
def test_a_line_of_the_log_has_the_events_fields_and_where_it_comes_from(
    event: events.Event, source: dict[str, int], line: dict[str, Any]
) -> None:
    log = EventLog(first_seq=5)
    log.note(event, **source)
    (entry,) = log.since(0)
    assert list(entry.to_json().items()) == list(({"seq": 5} | line | {"time": None}).items())
