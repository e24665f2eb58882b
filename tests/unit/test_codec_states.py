"""What a codec remembers follows what became of what it had sent."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from collectives_fakes import Reduction, record_of
from remembering import Counting

from raytrain_het.allreduce.codecs import codec_of
from raytrain_het.allreduce.error_feedback import ErrorFeedback
from raytrain_het.allreduce.layout import Layout
from raytrain_het.codec_options import CODECS

pytestmark = pytest.mark.usefixtures("shards_of_any_size")

LAYOUT = Layout([("a", torch.zeros(3, 5)), ("b", torch.zeros(40))], [("mean", torch.zeros(4))], 100)
NUMEL = sum(bucket.numel for bucket in LAYOUT.buckets)


@pytest.fixture(autouse=True)
def counting() -> Iterator[None]:
    Counting.register()
    yield
    del CODECS["counting"]


def reduction(shares: list[float] | None = None, owners: list[float] | None = None) -> Reduction:
    return Reduction(record_of(shares or [1, 1], owners, codec="counting"), LAYOUT)


def step(of: Reduction, at: int, weights: list[float] | None = None) -> None:
    of.run([torch.ones(NUMEL)] * len(of.reducers), weights or [1.0] * len(of.reducers), at=at)


def commit(states: ErrorFeedback, at: int) -> None:
    states.commit(at, 1.0, [2 ** len(bucket.segments) - 1 for bucket in LAYOUT.buckets])


def counts(of: Reduction, rank: int) -> set[float]:
    """Those of all elements that are trained."""
    return {float(v) for state in of.reducers[rank].feedback.by_parameter().values() for v in state["count"]}


@pytest.mark.parametrize("owners", [[1, 1], [3, 0], [0, 1]])
def test_a_committed_step_leaves_its_trace_in_every_element_whoever_owns_it(owners: list[float]) -> None:
    of = reduction(owners=owners)
    for at in (5, 6):
        step(of, at)
        for reducer in of.reducers:
            commit(reducer.feedback, at)
    assert [counts(of, rank) for rank in range(2)] == [{2.0}, {2.0}]
    assert set(of.reducers[0].feedback.by_parameter()) == {"a", "b"}, "buffers have no state"


def test_a_step_that_is_done_again_counts_once_and_one_that_was_skipped_not_at_all() -> None:
    of = reduction()
    for at in (5, 5, 5):
        step(of, at)
    commit(of.reducers[0].feedback, 5)
    commit(of.reducers[0].feedback, 5)
    step(of, 6)  # Its update is skipped: nobody commits the state.
    step(of, 7)
    commit(of.reducers[0].feedback, 7)
    assert counts(of, 0) == {2.0}


def test_a_gradient_without_weight_leaves_no_trace_but_in_the_means_that_its_worker_owns() -> None:
    of = reduction()
    for at in (5, 6, 7):
        step(of, at, [1.0, 0.0] if at == 6 else None)
        for reducer in of.reducers:
            commit(reducer.feedback, at)
    assert [counts(of, rank) for rank in range(2)] == [{3.0}, {2.0, 3.0}]


def test_a_step_first_tried_with_a_share_and_committed_without_one_leaves_no_trace() -> None:
    of = reduction()
    step(of, 5)
    first = of.reducers[1].feedback
    states = [reducer.feedback for reducer in of.reducers]
    again = Reduction(record_of([1, 0], codec="counting"), LAYOUT, states)
    step(again, 5, [1.0, 0.0])
    commit(first, 5)
    assert counts(of, 1) == {0.0, 1.0}, "of what it owns, once"


def test_what_was_saved_by_name_is_loaded_and_what_is_missing_begins_anew() -> None:
    of = reduction()
    step(of, 5)
    states = of.reducers[0].feedback
    commit(states, 5)
    saved = states.by_parameter()
    assert saved["a"]["count"].shape == (15,)
    step(of, 6)
    commit(states, 6)
    assert float(saved["a"]["count"][0]) == 1.0, "a copy"
    states.load({"a": saved["a"], "nobody": saved["b"], "b": {"other": saved["b"]["count"]}})
    assert {name: set(state["count"].tolist()) for name, state in states.by_parameter().items()} == {
        "a": {1.0},
        "b": {0.0},
    }


def test_another_codec_begins_anew_and_the_same_one_goes_on() -> None:
    of = reduction()
    step(of, 5)
    states = of.reducers[0].feedback
    commit(states, 5)
    states.use_codec(codec_of("counting"), torch.device("cpu"))
    states.begin_step()
    assert counts(of, 0) == {1.0}
    states.use_codec(codec_of("none"), torch.device("cpu"))
    states.begin_step()
    assert states.by_parameter() == {}
    states.use_codec(codec_of("counting"), torch.device("cpu"))
    states.begin_step()
    assert counts(of, 0) == {0.0}
