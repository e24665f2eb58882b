import os
import pickle
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytrain_het.membership.cursor import Cursor
from raytrain_het.testing.ledger import LedgerEntry, LedgerError, LedgerWriter, check_exactly_once, read_ledgers
from raytrain_het.worker.data.data_plan import DataPlan, slice_of


def plan_of(size=23, batch=5, drop_last=False):
    return DataPlan(dataset_size=size, global_batch_size=batch, shuffle=True, drop_last=drop_last, seed=1)


def step_entries(plan, cursor, shares, generation):
    """What all members write about a step that went well."""
    batch, order = plan.batch_at(cursor), plan.permutation(cursor.epoch)
    slices = {f"{m}-ab": slice_of(batch, list(shares.values()), i) for i, m in enumerate(shares)}
    return [
        LedgerEntry(
            step=cursor.step,
            generation=generation,
            epoch=cursor.epoch,
            offset=batch.start,
            batch_size=len(batch),
            slices={u: (s.start, s.stop) for u, s in slices.items()},
            writer=uid,
            own_samples=order[own.start : own.stop],
        )
        for uid, own in slices.items()
    ]


def run(plan, epochs, shares_at=lambda step: {0: 2, 1: 1, 2: 0}, redone=()):
    entries, cursor = [], Cursor()
    for _ in range(epochs):
        while not plan.is_epoch_end(cursor):
            if cursor.step in redone:
                entries += step_entries(plan, cursor, {0: 1, 1: 1, 7: 5}, generation=cursor.step * 2)[:1]
            entries += step_entries(plan, cursor, shares_at(cursor.step), generation=cursor.step * 2 + 1)
            cursor = plan.advance(cursor)
        cursor = plan.next_epoch(cursor)
    return entries


def at(entries, step, **changes):
    """The entries with one of the step's changed."""
    place = next(i for i, e in enumerate(entries) if e.step == step)
    return [*entries[:place], replace(entries[place], **changes), *entries[place + 1 :]]


@given(
    st.integers(5, 60),
    st.integers(1, 5),
    st.booleans(),
    st.integers(1, 3),
    st.lists(st.dictionaries(st.integers(0, 4), st.integers(1, 9), min_size=1), min_size=1),
    st.sets(st.integers(0, 40)),
)
def test_a_run_that_lost_nothing_passes_whatever_the_membership_did(size, batch, drop_last, epochs, shares, redone):
    plan = plan_of(size, batch, drop_last)
    entries = run(plan, epochs, lambda step: shares[step % len(shares)], redone)
    report = check_exactly_once(reversed(entries), plan, epochs=epochs)
    assert report.num_steps == epochs * plan.steps_per_epoch
    assert report.num_samples == epochs * (size - size % batch if drop_last else size)
    assert report.num_redone_steps == sum(step < report.num_steps for step in redone)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda e: [x for x in e if x.step != 3], r"step 3: lost.*epoch 0, offset 15"),
        (lambda e: [x for x in e if x.step < 4], r"step 4: lost"),
        (lambda e: [*e, replace(e[-1], step=10)], r"step 10: beyond the end.*10 steps"),
        (lambda e: at(e, 1, slices={"0-ab": (5, 10)}), r"step 1: generation 3: 0-ab and 1-ab tell different"),
        (lambda e: at(e, 2, epoch=1), r"step 2: \(epoch, offset, batch_size\) is \(1, 10, 5\), by the plan \(0, 10, 5"),
        (lambda e: at(e, 0, slices={"0-ab": (0, 3), "1-ab": (2, 5)}), r"slice \[2, 5\) of 1-ab does not follow on 3"),
        (lambda e: at(e, 0, slices={"0-ab": (0, 3), "1-ab": (4, 5)}), r"slice \[4, 5\) of 1-ab does not follow on 3"),
        (lambda e: at(e, 0, slices={"0-ab": (0, 4)}), r"the slices end at 4, the global batch at 5"),
        (lambda e: at(e, 0, slices={"0-ab": (0, 4)}), r"epoch 0: 1 sample\(s\) were used never: \[\d+\]"),
        (lambda e: at(e, 0, slices={"0-ab": (0, 5), "1-ab": (4, 5)}), r"epoch 0: 1 sample\(s\) were used too often"),
        (lambda e: at(e, 0, own_samples=(1, 2, 3)), r"step 0: 0-ab trained on \[1, 2, 3\], its slice \[0, 3\) is"),
        (lambda e: at(e, 0, writer="9-zz"), r"step 0: 9-zz wrote an entry but has no slice"),
    ],
)
def test_each_way_to_lose_or_repeat_a_sample_is_named(spoil, message):
    plan = plan_of()
    with pytest.raises(LedgerError, match=message):
        check_exactly_once(spoil(run(plan, 2)), plan, epochs=2)


def test_only_the_highest_generation_of_a_step_counts():
    plan = plan_of()
    entries = run(plan, 1)
    abandoned = replace(entries[0], generation=0, slices={"0-ab": (0, 1)}, own_samples=(99,))
    assert check_exactly_once([*entries, abandoned], plan, epochs=1).num_redone_steps == 1
    with pytest.raises(LedgerError):
        check_exactly_once([*entries, replace(abandoned, generation=99)], plan, epochs=1)


def test_an_error_lists_five_violations_and_counts_the_rest():
    plan = plan_of(100, 5)
    with pytest.raises(LedgerError, match="and 16 more") as caught:
        check_exactly_once([], plan, epochs=1)
    assert str(caught.value).count("lost") == 5 and len(caught.value.violations) == 21
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_ledgers_are_read_as_they_were_written(tmp_path):
    entries = run(plan_of(), 1)
    entries[0] = replace(entries[0], own_samples=None)
    for entry in entries:
        writer = LedgerWriter(tmp_path / "ledgers" / f"{entry.writer}.jsonl")
        writer.append(entry)
        writer.close()
    assert read_ledgers(tmp_path / "ledgers") == sorted(entries, key=lambda e: (e.writer, e.step))


def test_a_torn_last_line_is_left_out_and_another_bad_line_is_named(tmp_path):
    entry, path = run(plan_of(), 1)[0], tmp_path / "a.jsonl"
    path.write_text(entry.to_json() + "\n" + entry.to_json()[:-9])
    assert read_ledgers(tmp_path) == [entry]
    LedgerWriter(path).append(entry)
    assert read_ledgers(tmp_path) == [entry, entry]
    path.write_text(entry.to_json() + '\n{"step": 1}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl:2: not a ledger entry"):
        read_ledgers(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_ledgers(tmp_path / "elsewhere")


def test_a_process_killed_right_after_a_step_has_left_a_whole_line(tmp_path):
    script = textwrap.dedent(f"""
        import os, signal
        from raytrain_het.testing.ledger import LedgerEntry, LedgerWriter
        entry = {run(plan_of(), 1)[0]!r}
        LedgerWriter({str(tmp_path / "a.jsonl")!r}).append(entry)
        os.kill(os.getpid(), signal.SIGKILL)
    """)
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    assert subprocess.run([sys.executable, "-c", script], env=env).returncode == -9
    assert read_ledgers(tmp_path) == run(plan_of(), 1)[:1]
