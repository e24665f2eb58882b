"""Workers that share a machine add up their gradients there: the mean is the same, and one of them crosses the link."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from collectives_fakes import Reduction, record_of
from hypothesis import given
from hypothesis import strategies as st

from raytrain_het.allreduce import kept_step
from raytrain_het.allreduce.codecs import RESIDUAL
from raytrain_het.allreduce.error_feedback import ErrorFeedback
from raytrain_het.allreduce.header import Header
from raytrain_het.allreduce.layout import Layout
from raytrain_het.allreduce.reducers.by_machine import ByMachineReducer
from raytrain_het.allreduce.step_summary import SummarySoFar

pytestmark = pytest.mark.usefixtures("shards_of_any_size")

LAYOUT = Layout(
    [("a", torch.zeros(30, 50)), ("b", torch.zeros(700)), ("c", torch.zeros(9))], [("m", torch.zeros(3))], 4000
)
NUMEL = sum(bucket.numel for bucket in LAYOUT.buckets)


@given(
    st.text("xyz", min_size=2, max_size=6),
    st.lists(st.integers(0, 9), min_size=6, max_size=6).filter(lambda w: w[0] > 0),
    st.lists(st.sampled_from([0.0, 1.0, 2.5, 7.0]), min_size=6, max_size=6).filter(lambda o: o[0] > 0),
)
def test_the_mean_is_exact_and_the_same_on_every_rank(hosts: str, weights: list[int], owners: list[float]) -> None:
    size = len(hosts)
    record = record_of([float(w) for w in weights[:size]], owners[:size], hosts=hosts)
    raw = [torch.randint(-50, 50, (NUMEL,)).float() for _ in hosts]
    reduction = Reduction(record, LAYOUT)
    gradients = [w * g if w else None for w, g in zip(weights, raw, strict=False)]
    outs, summary = reduction.run(gradients, [float(w) for w in weights[:size]])
    expected = sum(w * g for w, g in zip(weights, raw, strict=False)) / sum(weights[:size])
    for out, total in zip(outs, summary, strict=True):
        assert torch.equal(torch.cat(out), expected)
        assert total.total_weight == sum(weights[:size])
        assert len(total.used) == len(LAYOUT.buckets)


@pytest.mark.parametrize(
    "codec", ["topk(density=0.05)", "topk(density=0.05, all_gather=true)", "int4(error_feedback=true)", "lowrank"]
)
def test_nothing_of_any_gradient_is_lost_and_leaders_hold_what_is_left_out(codec: str) -> None:
    record = record_of([1, 2, 1, 3], [1, 2, 1, 1], codec=codec, hosts="xxyy")
    states = [ErrorFeedback(LAYOUT) for _ in range(4)]
    reduction, applied = Reduction(record, LAYOUT, states), torch.zeros(NUMEL).double()
    generator = torch.Generator().manual_seed(1)
    wanted = torch.zeros(NUMEL).double()
    for step in range(6):
        gradients = [torch.randn(NUMEL, generator=generator) * w for w in (1, 2, 1, 3)]
        wanted += sum(g.double() for g in gradients) / 7
        outs, _ = reduction.run([g.clone() for g in gradients], [1.0, 2.0, 1.0, 3.0], at=step, num_samples=7)
        flat = [torch.cat(out) for out in outs]
        assert all(torch.equal(flat[0], other) for other in flat[1:])
        reduction.commit()
        applied += flat[0].double()
    held, holders = torch.zeros(NUMEL).double(), []
    for rank, of_worker in enumerate(states):
        by_name = of_worker.by_parameter()
        parts = [
            by_name.get(s.name, {}).get(RESIDUAL, torch.zeros(s.numel)) for b in LAYOUT.buckets for s in b.segments
        ]
        held += torch.cat(parts)
        holders += [rank] * bool(torch.cat(parts).any())
    torch.testing.assert_close(applied + held, wanted, rtol=0, atol=1e-4)
    assert holders == ([0, 1, 2, 3] if codec == "lowrank" else [1, 3]), "who owns most leads, else who has most samples"


def test_what_a_leader_has_left_out_is_sent_when_another_one_leads() -> None:
    states = [ErrorFeedback(LAYOUT) for _ in range(4)]
    one, applied = torch.arange(1.0, NUMEL + 1), torch.zeros(NUMEL)
    for step, owners in enumerate([[1, 0, 1, 0], [1, 0, 1, 0], [0, 1, 1, 0], [0, 1, 0, 1], [0, 1, 0, 1]]):
        codec = "topk(density=0.05)" if step < 4 else "none"
        reduction = Reduction(record_of([1] * 4, owners, codec=codec, hosts="xxyy"), LAYOUT, states)
        outs, _ = reduction.run([one.clone() for _ in range(4)], [1.0] * 4, at=step, num_samples=4)
        reduction.commit()
        applied += torch.cat(outs[0])
    held = sum(float(s[RESIDUAL].abs().sum()) for of in states for s in of.by_parameter().values())
    torch.testing.assert_close(applied, 5 * one, rtol=1e-4, atol=1e-2)
    assert held < 1e-3


def test_only_one_worker_of_a_machine_sends_to_others_but_for_headers() -> None:
    reduction = Reduction(record_of([1] * 4, [1, 0, 1, 0], hosts="xxyy"), LAYOUT)
    across = dict.fromkeys(range(4), 0)
    carry = reduction.wire.carry

    def counting() -> None:
        for sender, (_, inp) in reduction.wire.launched.items():
            across[sender] += sum(n for rank, n in enumerate(inp.lengths) if rank // 2 != sender // 2)
        carry()

    reduction.wire.carry = counting  # type: ignore[method-assign]
    reduction.run([torch.ones(NUMEL)] * 4, [1.0] * 4)
    headers = 3 * 2 * 64 * len(LAYOUT.buckets)
    assert across[1] == across[3] <= headers
    assert 4 * NUMEL <= across[0] == across[2] <= 4 * NUMEL + headers, "half of it to add up, and the mean of half"
    flat = Reduction(record_of([1] * 4), LAYOUT)
    flat.run([torch.ones(NUMEL)] * 4, [1.0] * 4)
    assert flat.reducers[0].traffic.sent > 1.4 * across[0]


def test_the_kept_step_can_be_packed_by_any_member() -> None:
    reduction = Reduction(record_of([1] * 3, hosts="xxy", codec="int8"), LAYOUT)
    outs, summary = reduction.run([torch.randn(NUMEL)] * 3, [1.0] * 3)
    for reducer, seen in zip(reduction.reducers, summary, strict=True):
        again = [torch.empty(b.numel, dtype=b.dtype) for b in LAYOUT.buckets]
        kept_step.unpack(kept_step.pack(seen, reducer, LAYOUT), LAYOUT, 5, again)
        assert torch.equal(torch.cat(again), torch.cat(outs[0]))


def test_without_machines_in_common_and_on_a_single_one_there_is_no_hierarchy() -> None:
    assert record_of([1] * 3, hosts="xxy").is_hierarchical
    assert not record_of([1] * 3, hosts="xyz").is_hierarchical
    assert not record_of([1] * 3, hosts="xxx").is_hierarchical
    assert not dataclasses.replace(record_of([1] * 3, hosts="xxy"), hierarchy=False).is_hierarchical
    assert record_of([1] * 5, [1, 2, 2, 0, 0], hosts="xxxyy").leaders == [1, 1, 1, 3, 3]
    by_bucket = Reduction(record_of([1] * 3, hosts="xxy"), LAYOUT).reducers[0].by_bucket
    assert all(isinstance(reducer, ByMachineReducer) for reducer in by_bucket)


def test_no_worker_that_is_healing_leads_while_another_one_is_healed() -> None:
    record = record_of([1, 1, 0, 1], [1, 1, 0, 0], hosts="xxyy", unhealed=("2-a",))
    assert record.leaders == [0, 0, 3, 3]
    assert record_of([1, 1, 0, 0], [1, 1, 0, 0], hosts="xxyy", unhealed=("2-a", "3-a")).leaders == [0, 0, 2, 2]
    assert record_of([1, 1, 0, 1], [1, 1, 0, 0], hosts="xxyy").leaders == [0, 0, 3, 3], "who has something to send"


def test_a_leader_whose_machine_sends_nothing_keeps_what_it_held_though_others_commit_first() -> None:
    """Its headers of all buckets are sent, and others go on; it takes the step over."""
    states = [ErrorFeedback(LAYOUT) for _ in range(4)]
    first = Reduction(record_of([1] * 4, [1] * 4, codec="topk(density=0.05)", hosts="xxyy"), LAYOUT, states)
    first.run([torch.randn(NUMEL) for _ in range(4)], [1.0] * 4, at=1)
    first.commit()
    before = states[2].by_parameter()
    record = record_of([1, 1, 0, 0], [1, 1, 0, 0], codec="topk(density=0.05)", hosts="xxyy")
    idle = Reduction(record, LAYOUT, states).reducers[2]
    idle.expect_step()
    summary = SummarySoFar(step=2)
    for bucket in LAYOUT.buckets:
        header = Header(2, 3, bucket.index, 3, 0.0, False, used=0)
        next(idle.all_reduce(bucket, header, None, torch.empty(bucket.numel), summary, expected_weight=2.0))
    first_bucket = LAYOUT.buckets[0]  # The sum of nothing goes to the other leaders.
    header = Header(2, 3, 0, 3, 0.0, False, used=0)
    among_leaders = idle.by_bucket[0]._among_leaders  # type: ignore[attr-defined]
    next(among_leaders.all_reduce(header, torch.zeros(first_bucket.numel), 2.0))
    states[2].commit(2, 2.0, [2 ** len(b.segments) - 1 for b in LAYOUT.buckets])
    after = states[2].by_parameter()
    assert any(state[RESIDUAL].any() for state in before.values())
    assert all(torch.equal(before[name][RESIDUAL], after[name][RESIDUAL]) for name in before)
