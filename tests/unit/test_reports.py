"""Reports and evaluations on the hub's side: what counts, when it is whole, and that nothing counts twice."""

from __future__ import annotations

import math
import random
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytrain_het.membership import reports
from raytrain_het.membership.evaluations import ChunkDealer
from raytrain_het.membership.merging import reduce_metrics
from raytrain_het.membership.protocol import Evaluate, Reply, Report
from raytrain_het.membership.reports import ReportCollector


def part(key: str = "1.5.0", **values: Any) -> Report:
    given = {"key": key, "step": int(key.split(".")[1]), "epoch": 0, "metrics": {"loss": 1.0}, "samples": 8}
    return Report(**(given | values))


def add(book: ReportCollector, slot: int, said: Report, *, uid: str = "u") -> str | None:
    return book.add_part(slot, uid, said)


def ask(
    book: ChunkDealer, key: str, num_chunks: int, uid: str, result: tuple[int, dict[str, float]] | None = None
) -> dict[str, Any]:
    """What is replied: a chunk, the sums, or nothing yet."""
    replies = dict(book.hear(key, uid, Evaluate(key=key, num_chunks=num_chunks, result=result)))
    reply = replies.get(uid, Reply(id=0))
    return {name: value for name, value in msgspec.structs.asdict(reply).items() if name != "id" and value is not None}


def reduced(*parts: tuple[Any, int], how: str | None = None) -> Any:
    reduce = {"x": how} if how else {}
    return reduce_metrics([part(metrics={"x": v}, samples=n, reduce=reduce) for v, n in parts])["x"]


# ---------------------------------------------------------------- reducing


def test_means_are_weighted_by_samples() -> None:
    assert reduced((1.0, 30), (5.0, 10)) == pytest.approx(2.0)


def test_a_worker_without_samples_has_no_weight_even_with_a_nan() -> None:
    assert reduced((1.0, 30), (math.nan, 0)) == 1.0


def test_workers_count_the_same_if_none_has_samples() -> None:
    assert reduced((1.0, 0), (2.0, 0)) == 1.5


def test_a_value_that_is_equal_everywhere_is_kept_to_the_bit() -> None:
    assert reduced((0.1, 3), (0.1, 7), (0.1, 11)) == 0.1


@pytest.mark.parametrize(("how", "expected"), [("sum", 6.0), ("max", 4.0), ("min", 2.0)])
def test_other_reductions_ignore_the_weights(how: str, expected: float) -> None:
    assert reduced((2.0, 1), (4.0, 100), how=how) == expected


def test_texts_and_flags_are_the_first_workers() -> None:
    assert reduced(("a", 1), ("b", 99)) == "a"
    assert reduced((True, 1), (False, 99)) is True


def test_a_metric_that_only_some_report_is_taken_from_them() -> None:
    parts = [
        part(metrics={"x": 1.0, "y": 3.0}, samples=1),
        part(metrics={"x": 2.0}, samples=1),
    ]
    assert reduce_metrics(parts) == {"x": 1.5, "y": 3.0}


# ---------------------------------------------------------------- when a report is whole


def test_a_report_is_whole_when_every_member_has_given_its_part() -> None:
    book = ReportCollector()
    add(book, 0, part(checkpoint=False))
    assert book.settle([0, 1]) == []
    add(book, 1, part(checkpoint=False, metrics={"loss": 3.0}))
    (whole,) = book.settle([0, 1])
    assert (whole.metrics, whole.num_workers, whole.checkpoint_error) == ({"loss": 2.0}, 2, None)


def test_reports_are_whole_in_the_order_of_steps_and_then_of_calls() -> None:
    book = ReportCollector()
    for key in ("1.10.0", "1.9.1", "1.9.0"):
        for slot in (0, 1):
            add(book, slot, part(key, checkpoint=False))
    assert [r.key for r in book.settle([0, 1])] == ["1.9.0", "1.9.1", "1.10.0"]


def test_a_report_waits_for_the_one_before_it() -> None:
    book = ReportCollector()
    add(book, 0, part("1.4.0", checkpoint=True, holds_snapshot=True))
    add(book, 0, part("1.5.0", checkpoint=False))
    assert book.settle([0]) == []
    book.checkpoint_stored("1.4.0", "path", None)
    assert [r.key for r in book.settle([0])] == ["1.4.0", "1.5.0"]


def test_a_part_that_comes_again_counts_once() -> None:
    book = ReportCollector()
    assert add(book, 0, part(checkpoint=False)) is None
    assert add(book, 0, part(checkpoint=False)) is None
    assert book.settle([0])[0].num_workers == 1
    assert add(book, 0, part(checkpoint=False)) is None, "whole, not yet acknowledged"
    assert book.settle([0]) == []


def test_a_part_of_an_acknowledged_report_is_acknowledged_again_and_opens_nothing() -> None:
    book = ReportCollector()
    add(book, 0, part(checkpoint=False))
    book.settle([0])
    assert [r.key for r in book.untaken()] == ["1.5.0"]
    book.acknowledge(["1.5.0"])
    book.acknowledge(["1.5.0"])
    assert add(book, 0, part(checkpoint=False)) == "1.5.0"
    assert book.settle([0]) == []
    assert book.untaken() == []
    assert [r.key for r in book.since(0)] == ["1.5.0"]


def test_a_worker_that_is_lost_before_its_part_is_not_waited_for() -> None:
    book = ReportCollector()
    add(book, 0, part(checkpoint=False))
    assert book.settle([0, 1]) == []
    book.forget(1)
    assert [r.num_workers for r in book.settle([0])] == [1]


def test_a_process_that_came_after_a_report_is_not_waited_for() -> None:
    book = ReportCollector()
    book.joined(0, 1, -1)
    book.joined(1, 1, 5)
    add(book, 0, part("1.5.0", checkpoint=False))
    assert [r.key for r in book.settle([0, 1])] == ["1.5.0"]
    add(book, 0, part("1.6.0", checkpoint=False))
    assert book.settle([0, 1]) == []
    add(book, 1, part("1.6.0", checkpoint=False))
    assert [r.key for r in book.settle([0, 1])] == ["1.6.0"]


def test_the_part_of_a_worker_that_is_lost_afterwards_counts() -> None:
    book = ReportCollector()
    add(book, 0, part(checkpoint=False, metrics={"loss": 1.0}))
    add(book, 1, part(checkpoint=False, metrics={"loss": 3.0}))
    book.forget(1)
    (whole,) = book.settle([0])
    assert whole.metrics == {"loss": 2.0}


def test_a_late_joiner_that_is_past_the_report_is_not_waited_for() -> None:
    book = ReportCollector()
    add(book, 0, part("1.5.0", checkpoint=True, holds_snapshot=True))
    add(book, 1, part("1.8.0", checkpoint=False))
    assert book.writer_wanted([0, 1]) == {"1.5.0": 0}
    book.checkpoint_stored("1.5.0", "path", None)
    assert [r.key for r in book.settle([0, 1])] == ["1.5.0"]


def test_a_refilled_slot_is_not_taken_for_its_predecessor() -> None:
    book = ReportCollector()
    add(book, 1, part("1.8.0", checkpoint=False))
    book.forget(1)
    add(book, 0, part("1.8.0", checkpoint=False))
    add(book, 0, part("1.9.0", checkpoint=False))
    assert [r.key for r in book.settle([0, 1])] == ["1.8.0"], "9.0 waits for the new process"


def test_the_end_of_the_run_settles_what_is_open() -> None:
    book = ReportCollector()
    add(book, 0, part(checkpoint=False))
    assert book.settle([0, 1], ended=False) == []
    assert [r.key for r in book.settle([], ended=True)] == ["1.5.0"]


def test_a_step_that_is_done_again_after_a_reset_is_reported_again() -> None:
    book = ReportCollector()
    for key in ("1.5.0", "1.9.0"):
        for slot in (0, 1):
            add(book, slot, part(key, checkpoint=False))
    assert [r.key for r in book.settle([0, 1])] == ["1.5.0", "1.9.0"]
    book.acknowledge(["1.5.0"])
    for slot in (0, 1):
        book.forget(slot)
        book.joined(slot, 7, 4)
    for key in ("7.5.0", "7.9.0"):
        for slot in (0, 1):
            assert add(book, slot, part(key, checkpoint=False, metrics={"loss": 2.0})) is None
    again = book.settle([0, 1])
    assert [(r.key, r.step, r.metrics) for r in again] == [
        ("7.5.0", 5, {"loss": 2.0}),
        ("7.9.0", 9, {"loss": 2.0}),
    ]
    assert [r.key for r in book.untaken()] == ["1.9.0", "7.5.0", "7.9.0"]


def test_a_report_that_a_life_left_open_holds_up_none_of_the_next() -> None:
    book = ReportCollector()
    add(book, 0, part("1.9.0", holds_snapshot=True))
    for slot in (0, 1):
        book.forget(slot)
        book.joined(slot, 7, 4)
        add(book, slot, part("7.5.0", checkpoint=False))
    assert [r.key for r in book.settle([0, 1])] == ["1.9.0", "7.5.0"]


def test_the_books_do_not_grow_with_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reports, "MAX_REPORTS", 3)
    book = ReportCollector(first_seq=10)
    for step in range(8):
        add(book, 0, part(f"1.{step}.0", checkpoint=False))
        book.settle([0])
        book.acknowledge([f"1.{step}.0"])
    assert [(r.seq, r.step) for r in book.since(0)] == [(15, 5), (16, 6), (17, 7)]
    assert list(book._acknowledged) == ["1.5.0", "1.6.0", "1.7.0"]


# ---------------------------------------------------------------- checkpoints


def held_by(*slots: int) -> ReportCollector:
    book = ReportCollector()
    for slot in range(3):
        add(book, slot, part(holds_snapshot=slot in slots), uid=f"{slot}-a")
    return book


def test_the_first_holder_writes_once_all_parts_are_there() -> None:
    book = ReportCollector()
    add(book, 1, part(holds_snapshot=True))
    assert book.writer_wanted([0, 1]) == {}
    add(book, 0, part(holds_snapshot=True))
    assert book.writer_wanted([0, 1]) == {"1.5.0": 0}
    assert book.settle([0, 1]) == [], "the checkpoint is awaited"


def test_another_holder_writes_if_the_writer_is_lost() -> None:
    book = held_by(0, 2)
    assert book.writer_wanted([0, 1, 2]) == {"1.5.0": 0}
    book.forget(0)
    assert book.writer_wanted([1, 2]) == {"1.5.0": 2}
    book.checkpoint_stored("1.5.0", "path", None)
    (whole,) = book.settle([1, 2])
    assert (whole.checkpoint, whole.checkpoint_error) == ("path", None)


def test_a_report_whose_holders_are_all_lost_says_so_and_goes_on() -> None:
    book = held_by(0)
    book.forget(0)
    assert book.writer_wanted([1, 2]) == {}
    (whole,) = book.settle([1, 2])
    assert whole.checkpoint is None
    assert "lost before it was stored" in whole.checkpoint_error
    assert whole.metrics == {"loss": 1.0}


def test_the_next_process_of_a_slot_is_not_asked_for_what_its_predecessor_held() -> None:
    book = held_by(0)
    book.forget(0)
    assert book.writer_wanted([0, 1, 2]) == {}
    assert [r.checkpoint for r in book.settle([0, 1, 2])] == [None], "it would wait for ever"


def test_a_checkpoint_that_cannot_be_stored_costs_itself_only() -> None:
    book = held_by(0, 1)
    book.checkpoint_stored("1.5.0", None, "OSError: disk full")
    assert book.writer_wanted([0, 1, 2]) == {}
    (whole,) = book.settle([0, 1, 2])
    assert (whole.checkpoint, whole.checkpoint_error) == (None, "OSError: disk full")


def test_a_second_writers_word_does_not_replace_a_stored_checkpoint() -> None:
    book = held_by(0, 1)
    book.checkpoint_stored("1.5.0", "first", None)
    book.checkpoint_stored("1.5.0", None, "late")
    assert book.settle([0, 1, 2])[0].checkpoint == "first"


def test_the_states_of_those_that_reported_are_gathered() -> None:
    assert held_by(0).uids("1.5.0") == ["0-a", "1-a", "2-a"]


# ---------------------------------------------------------------- evaluations


def test_each_chunk_is_given_to_one_worker_and_the_sums_are_the_same_for_all() -> None:
    book = ChunkDealer()
    assert ask(book, "e", 2, "a") == {"chunk": 0}
    assert ask(book, "e", 2, "b") == {"chunk": 1}
    assert ask(book, "e", 2, "b", (1, {"hits": 2.0})) == {}
    assert ask(book, "e", 2, "a", (0, {"hits": 3.0})) == {"sums": {"hits": 5.0}}
    assert ask(book, "e", 2, "b") == {"sums": {"hits": 5.0}}


def test_who_waits_is_answered_when_there_is_something_to_say() -> None:
    book = ChunkDealer()
    ask(book, "e", 1, "a")
    for uid in ("b", "c"):
        assert book.hear("e", uid, Evaluate(id=7, key="e", num_chunks=1)) == []
    assert book.forget("a") == [("b", Reply(id=7, chunk=0))]
    told = dict(book.hear("e", "b", Evaluate(id=8, key="e", num_chunks=1, result=(0, {"n": 2.0}))))
    assert told == {"c": Reply(id=7, sums={"n": 2.0}), "b": Reply(id=8, sums={"n": 2.0})}


def test_a_chunk_of_a_lost_worker_is_given_out_again() -> None:
    book = ChunkDealer()
    ask(book, "e", 1, "a")
    assert ask(book, "e", 1, "b") == {}
    book.forget("a")
    assert ask(book, "e", 1, "b") == {"chunk": 0}


def test_a_chunk_whose_answer_was_lost_is_given_out_again() -> None:
    book = ChunkDealer()
    assert ask(book, "e", 2, "a") == {"chunk": 0}
    assert ask(book, "e", 2, "a") == {"chunk": 0}, "it asks again, so it is at none"
    assert ask(book, "e", 2, "b") == {"chunk": 1}
    assert ask(book, "e", 2, "b", (1, {"n": 1.0})) == {}
    assert ask(book, "e", 2, "a", (0, {"n": 2.0})) == {"sums": {"n": 3.0}}


def test_a_result_that_comes_twice_counts_once() -> None:
    book = ChunkDealer()
    ask(book, "e", 1, "a")
    ask(book, "e", 1, "a", (0, {"n": 1.0}))
    assert ask(book, "e", 1, "b", (0, {"n": 5.0})) == {"sums": {"n": 1.0}}


def test_two_evaluations_of_one_step_are_kept_apart() -> None:
    book = ChunkDealer()
    assert ask(book, "5/eval/0", 1, "a") == ask(book, "5/eval/1", 1, "a") == {"chunk": 0}


@given(
    st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=12),
    st.integers(0, 2**16),
)
def test_the_sums_depend_neither_on_who_computed_what_nor_on_when(values: list[float], seed: int) -> None:
    chance, book = random.Random(seed), ChunkDealer()
    doing: dict[str, int] = {}
    for worker in ["a", "b", "c"] * (len(values) + 1):
        chunk = doing.pop(worker, None)
        if chunk is not None and chance.random() < 0.2:
            book.forget(worker)
            continue
        result = None if chunk is None else (chunk, {"loss": values[chunk]})
        answer = ask(book, "e", len(values), worker, result)
        if "chunk" in answer:
            doing[worker] = answer["chunk"]
    while "sums" not in (answer := ask(book, "e", len(values), "d")):
        for worker in ["a", "b", "c"]:
            book.forget(worker)
        if "chunk" in answer:
            ask(book, "e", len(values), "d", (answer["chunk"], {"loss": values[answer["chunk"]]}))
    assert answer["sums"]["loss"] == math.fsum(values)


def test_what_was_done_since_the_last_report_is_added_up_once() -> None:
    """Samples and bytes of all; seconds, steps and clipped steps of who has been there for longest."""
    book = ReportCollector()
    done = {"seconds": 2.0, "steps": 10, "clipped_steps": 4, "samples": 30, "bytes_sent": 500}
    late = {"seconds": 9.0, "steps": 3, "clipped_steps": 7, "samples": 5, "bytes_sent": 20}
    add(book, 0, part(checkpoint=False, since_last=done, lr=0.05))
    add(book, 1, part(checkpoint=False, since_last=late, lr=0.05))
    (whole,) = book.settle([0, 1])
    assert whole.since_last == done | {"samples": 35, "bytes_sent": 520}
    assert whole.lr == 0.05
