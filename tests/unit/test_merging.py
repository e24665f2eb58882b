"""Workers' metrics become one, whatever numbers they are."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytrain_het.membership.merging import exact_sum, mixed_up, reduce_metrics
from raytrain_het.membership.message_parts import LoopProgress
from raytrain_het.membership.protocol import Report
from raytrain_het.membership.reports import ReportCollector

INF, NAN = math.inf, math.nan


def part(metrics: dict[str, Any], **values: Any) -> Report:
    return Report(**{"key": "1.5.0", "step": 5, "epoch": 0, "metrics": metrics, **values})


def reduced(*parts: tuple[Any, int], how: str | None = None) -> Any:
    reduce = {"x": how} if how else {}
    return reduce_metrics([part({"x": v}, samples=n, reduce=reduce) for v, n in parts])["x"]


def same(a: float, b: float) -> bool:
    return a == b or (math.isnan(a) and math.isnan(b))


@pytest.mark.parametrize(
    ("values", "how", "expected"),
    [
        ((INF, -INF), None, NAN),
        ((INF, -INF), "sum", NAN),
        ((INF, 1.0), None, INF),
        ((INF, INF), None, INF),
        ((NAN, INF), None, NAN),
        ((NAN, 1.0), "max", NAN),
        ((1.0, NAN), "max", NAN),
        ((1.0, NAN), "min", NAN),
        ((1e308, 1e308), "sum", INF),
        ((-1e308, -1e308), "sum", -INF),
        ((1e308, 1e308), None, 1e308),
        ((1.5e308, 1.7e308), None, 1.6e308),
        ((10**18, 10**18 + 2), None, 1e18),
        ((None, 2.0), None, 2.0),
        ((None, None), None, None),
        (("a", "b"), None, "a"),
        ((None, "b"), None, "b"),
        ((True, False), None, True),
    ],
)
def test_any_numbers_are_merged(values: tuple[Any, ...], how: str | None, expected: Any) -> None:
    found = reduced(*((value, 8) for value in values), how=how)
    assert found is expected or same(found, expected) or found == pytest.approx(expected)


@given(st.lists(st.floats(), min_size=1, max_size=5), st.lists(st.integers(0, 2**40), min_size=5, max_size=5))
def test_no_numbers_break_the_merging(values: list[float], samples: list[int]) -> None:
    for how in (None, "mean", "sum", "max", "min"):
        reduced(*zip(values, samples, strict=False), how=how)
    assert same(exact_sum(values), exact_sum(reversed(values)))
    json.dumps(reduced(*zip(values, samples, strict=False)))


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        (part({"x": 1.0}), part({"x": "text"}), "metric 'x' is a number on worker 0, and a text on worker 2"),
        (part({"x": True}), part({"x": 1}), "metric 'x' is a flag on worker 0, and a number on worker 2"),
        (part({}), part({}, checkpoint=False), "worker 0 has checkpoint=True, and worker 2 has checkpoint=False"),
        (part({"x": 1}, reduce={"x": "sum"}), part({"x": 1}), "worker 0 has reduce={'x': 'sum'}, and worker 2 has"),
        (part({"x": 1, "y": 2}), part({"x": None, "z": 1.5}), None),
    ],
)
def test_what_cannot_be_merged_is_named(first: Report, second: Report, said: str | None) -> None:
    found = mixed_up({0: first, 2: second})
    assert found is None if said is None else found is not None and said in found


# ---------------------------------------------------------------- who has left a report out


class Hub:
    """A book, and workers that tell it how far they are."""

    def __init__(self) -> None:
        self.book = ReportCollector()

    def told(self, slot: int, step: int, reported: str | None = None, **values: Any) -> str | None:
        told = LoopProgress(**{"life": 1, "began": 0, "step": step, "reported": reported, "complete": False, **values})
        self.book.note_progress(slot, told)
        return self.book.left_out()

    def part(self, slot: int, key: str, before: str | None = None, **values: Any) -> str | None:
        step = int(key.split(".")[1])
        told = LoopProgress(**{"life": 1, "began": 0, "step": step, "reported": before, "complete": False, **values})
        said = part({}, key=key, step=step, samples=1, checkpoint=False, told=told, at="train.py:3")
        self.book.add_part(slot, "u", said)
        return self.book.left_out()


def test_who_has_committed_a_later_step_has_left_a_report_out() -> None:
    hub = Hub()
    assert hub.part(0, "1.12.0") is None
    assert hub.told(1, 12) is None, "it may come yet"
    said = hub.told(1, 13)
    assert said is not None
    assert "report() was called at step 12 at train.py:3 by worker 0, and not by all: worker 1 has gone on to" in said


def test_words_that_came_before_the_report_count_and_so_do_those_of_a_later_report() -> None:
    hub = Hub()
    hub.told(1, 13)
    hub.told(1, 16, "1.16.0")
    assert hub.part(0, "1.12.0") is not None
    other = Hub()
    other.part(1, "1.16.0", "1.8.0")
    assert other.part(0, "1.12.0") is not None


def test_a_report_that_was_made_and_is_on_its_way_is_not_left_out() -> None:
    hub = Hub()
    hub.part(0, "1.12.0")
    assert hub.told(1, 20, "1.12.0") is None
    assert hub.part(1, "1.16.0", "1.12.0") is None


def test_a_worker_that_ends_with_its_loop_has_left_out_the_last_report_and_one_that_returns_before_has_not() -> None:
    hub = Hub()
    hub.part(0, "1.12.0")
    assert hub.told(1, 12, complete=False) is None
    assert "has finished without it" in (hub.told(1, 12, complete=True) or "")


def test_what_was_reported_before_a_worker_came_is_not_its_business() -> None:
    hub = Hub()
    hub.part(0, "1.12.0")
    assert hub.told(1, 20, began=13) is None
    assert hub.told(1, 20, began=12) is not None


def test_words_of_a_life_before_say_nothing_of_this_one() -> None:
    hub = Hub()
    hub.part(0, "7.12.0", life=7)
    assert hub.told(1, 40) is None
    assert hub.told(1, 12, life=7) is None
    assert hub.told(1, 13, life=7) is not None


def test_a_new_process_in_a_slot_is_not_blamed_for_what_its_predecessor_said() -> None:
    hub = Hub()
    hub.told(1, 13)
    hub.book.forget(1)
    assert hub.part(0, "1.12.0") is None


def test_a_report_that_a_worker_has_left_out_is_whole_without_it() -> None:
    hub = Hub()
    hub.part(0, "1.12.0")
    assert hub.book.settle([0, 1]) == []
    hub.told(1, 13)
    assert [r.num_workers for r in hub.book.settle([0, 1])] == [1]
