import hashlib
import pickle
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytrain_het.errors import ConfigError
from raytrain_het.membership.cursor import Cursor
from raytrain_het.worker.data.data_plan import DataPlan, micro_batches, slice_of


@st.composite
def plans(draw):
    drop_last = draw(st.booleans())
    size = draw(st.integers(1, 200))
    batch = draw(st.integers(1, size if drop_last else 250))
    return DataPlan(
        dataset_size=size,
        global_batch_size=batch,
        shuffle=draw(st.booleans()),
        drop_last=drop_last,
        seed=draw(st.integers(0, 2**70)),
    )


def plan_of(size, batch, **fields):
    return DataPlan(
        **{"dataset_size": size, "global_batch_size": batch, "shuffle": True, "drop_last": False, "seed": 0, **fields}
    )


shares_lists = st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any)


@given(plans(), st.data())
def test_an_epoch_uses_every_sample_once_whatever_the_shares_do(plan, data):
    cursor, used = Cursor(epoch=3, step=17), []
    order = plan.permutation(cursor.epoch)
    while not plan.is_epoch_end(cursor):
        shares = data.draw(shares_lists)
        for member in range(len(shares)):
            used.extend(order[i] for i in slice_of(plan.batch_at(cursor), shares, member))
        cursor = plan.advance(cursor)
    num_used = plan.dataset_size
    if plan.drop_last:
        num_used -= plan.dataset_size % plan.global_batch_size
    assert sorted(used) == sorted(order[:num_used]) and len(set(used)) == num_used
    assert cursor == Cursor(epoch=3, offset=num_used, step=17 + plan.steps_per_epoch)


@given(plans(), shares_lists)
def test_the_members_slices_tile_the_global_batch_in_order(plan, shares):
    batch = plan.batch_at(Cursor())
    slices = [slice_of(batch, shares, member) for member in range(len(shares))]
    assert [i for s in slices for i in s] == list(batch)


def test_the_last_batch_of_an_epoch_is_smaller_unless_dropped():
    at_last = Cursor(offset=8, step=2)
    assert plan_of(10, 4).batch_at(at_last) == range(8, 10)
    assert len(plan_of(10, 4, drop_last=True).batch_at(at_last)) == 0
    assert (plan_of(10, 4).steps_per_epoch, plan_of(10, 4, drop_last=True).steps_per_epoch) == (3, 2)


def test_the_epoch_does_not_roll_over_by_itself():
    plan, end = plan_of(8, 4), Cursor(epoch=1, offset=8, step=4)
    assert plan.advance(Cursor(epoch=1, offset=4, step=3)) == end and plan.is_epoch_end(end)
    with pytest.raises(ValueError, match="next_epoch"):
        plan.advance(end)
    assert plan.next_epoch(end) == Cursor(epoch=2, offset=0, step=4)


@given(plans(), st.integers(0, 1000))
def test_a_permutation_holds_every_index_once(plan, epoch):
    assert np.array_equal(np.sort(plan.permutation(epoch)), np.arange(plan.dataset_size))


GOLDEN_SMALL = [2, 1, 4, 8, 9, 3, 5, 7, 6, 0]
GOLDEN_LARGE = "9b679596f895b655"


def test_the_order_is_the_same_on_every_platform():
    # A golden value: whoever computes another one would train on other samples than its peers.
    assert plan_of(10, 1, seed=7).permutation(3).tolist() == GOLDEN_SMALL
    large = plan_of(100_000, 1, seed=7).permutation(3)
    assert hashlib.sha256(large.astype("<i8").tobytes()).hexdigest()[:16] == GOLDEN_LARGE


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [plan_of(100, 1, seed=s).permutation(e).tolist() for s in (0, 1) for e in (0, 1)]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])
    assert plan_of(100, 1, shuffle=False).permutation(5).tolist() == list(range(100))


def test_the_last_two_permutations_are_kept_and_read_only():
    plan = plan_of(100, 1)
    first, second = plan.permutation(0), plan.permutation(1)
    assert plan.permutation(0) is first and plan.permutation(1) is second
    plan.permutation(2)
    assert plan.permutation(1) is second and plan.permutation(0) is not first
    with pytest.raises(ValueError):
        second[0] = 1


def test_plans_and_cursors_survive_pickling_and_dicts():
    plan, cursor = plan_of(100, 7), Cursor(epoch=1, offset=2, step=3)
    order = plan.permutation(0).tolist()
    for copy in (pickle.loads(pickle.dumps(plan)), DataPlan(**asdict(plan)), replace(plan)):
        assert copy == plan and copy.permutation(0).tolist() == order
    assert len(pickle.dumps(plan)) < 500
    assert Cursor.from_dict(cursor.to_dict()) == cursor
    with pytest.raises(KeyError, match="step"):
        Cursor.from_dict({"epoch": 1, "offset": 2})


@pytest.mark.parametrize(
    "fields", [{"dataset_size": 0}, {"global_batch_size": 0}, {"global_batch_size": 2.0}, {"seed": -1}]
)
def test_a_plan_names_the_wrong_field(fields):
    with pytest.raises(ConfigError, match=next(iter(fields))):
        plan_of(10, 2, **fields)


def test_a_plan_without_any_step_is_refused():
    with pytest.raises(ConfigError, match="drop_last=False"):
        plan_of(10, 11, drop_last=True)


@given(st.integers(0, 1000), st.integers(0, 300), st.one_of(st.none(), st.integers(1, 50)))
def test_micro_batches_are_few_near_equal_and_within_the_limit(start, length, size):
    whole = range(start, start + length)
    parts = micro_batches(whole, size)
    assert [i for part in parts for i in part] == list(whole)
    lengths = [len(part) for part in parts]
    if length:
        assert len(parts) == (1 if size is None else -(-length // size))
        assert max(lengths) - min(lengths) <= 1 and min(lengths) > 0
    else:
        assert parts == []


@given(st.integers(1, 300), st.integers(1, 50), st.integers(1, 4))
def test_no_micro_batch_has_fewer_than_the_least_unless_there_are_no_more(length, size, least):
    parts = micro_batches(range(length), size, least=least)
    assert [i for part in parts for i in part] == list(range(length))
    lengths = [len(part) for part in parts]
    assert min(lengths) >= min(least, length)
    assert max(lengths) <= max(size, 2 * least - 1)


def test_a_micro_batch_of_nothing_is_refused():
    with pytest.raises(ValueError, match="size=0"):
        micro_batches(range(3), 0)


@given(plans(), st.integers(0, 300))
def test_a_resumed_cursor_stands_before_a_step_and_loses_no_sample_of_one(plan, offset):
    cursor = Cursor(epoch=2, offset=offset, step=7)
    resumed = plan.resumed(cursor)
    assert not plan.is_epoch_end(resumed)
    assert resumed.step == 7
    assert resumed == (cursor if plan.batch_at(cursor) else Cursor(epoch=3, offset=0, step=7))
