"""Whatever happens to workers, and whenever: nothing is lost, nothing counts twice, and the result is the same."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import pytest
from labs import run, wait_until

from raytrain_het.allreduce import layout
from raytrain_het.membership.points import POINTS
from raytrain_het.testing.faults import Fault, happened
from raytrain_het.testing.regression import SMALL_BUCKETS, Regression, traces
from raytrain_het.worker.session import current
from raytrain_het.worker.state.checkpoint import LocalStorage

TASK = Regression(patience_s=0.05, epochs=3)
"""An epoch before that of the faults, and one after it."""
LONGER = dataclasses.replace(TASK, epochs=4)
STEPS = TASK.plan.steps_per_epoch


def at(point, epoch=1, step=3):
    """A step in the middle of an epoch; for reports the epoch's end."""
    return STEPS * (epoch + 1) if point == "report" else STEPS * epoch + step


@pytest.mark.parametrize("kind", ["kill", "leave"])
@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("slot", [0, 2])
def test_a_worker_that_goes_costs_no_step_and_its_slot_is_refilled(tmp_path, point, kind, slot):
    faults = [Fault(slot=slot, step=at(point), point=point, kind=kind)]
    done = run(UntilRefilled(TASK, slot), tmp_path, faults=faults)
    done.check(TASK)
    assert len(happened(tmp_path)) == 1
    assert [e["slot"] for e in done.kinds("lost", "left")] == [slot]
    assert [e["slot"] for e in done.kinds("healed")] == [slot]
    assert sorted(done.results) == [0, 1, 2]


class UntilRefilled:
    """After the first fault goes on only with steps that a change of membership needs, until the new process is healed.

    Else the run may have ended before that.
    """

    def __init__(self, task, slot, has_happened=happened):
        self.task, self.slot, self.has_happened = task, slot, has_happened

    def __call__(self, directory):
        session, first = current(), Path(directory) / "first_uid"

        def hold(point, step):
            if point == "opened" and session.slot == self.slot and not first.exists():
                first.write_text(session.worker.agent.uid)
            elif point == "opened" and self.has_happened(
                directory
            ):  # What a healing worker needs has been offered here.
                uid, number = first.read_text(), session.worker.engine.opened.record.number
                session.worker.agent.wait_for(lambda: self.is_needed(session.worker.agent, uid, number))

        session.points.listeners.append(hold)
        return self.task(directory)

    def is_needed(self, agent, first, number):
        """Whether the slot is healed, or a change waits for this step, which was opened in generation ``number``."""
        record = agent.record
        if record.number > number:
            return True
        back = [m for m in record.members if m.slot == self.slot and m.uid not in (first, *record.unhealed)]
        return back or agent.want > record.number or not agent.is_current(record.number)


@pytest.mark.parametrize("point", [p for p in POINTS if p != "report"])
def test_a_worker_killed_in_the_last_step_of_an_epoch(tmp_path, point):
    for step in (STEPS, STEPS + 1):
        directory = tmp_path / str(step)
        run(TASK, directory, faults=[Fault(slot=1, step=step, point=point)]).check(TASK)
        assert len(happened(directory)) == 1


@pytest.mark.parametrize("point", POINTS)
def test_a_worker_killed_in_the_last_step_of_the_run(tmp_path, point):
    run(TASK, tmp_path, faults=[Fault(slot=1, step=TASK.num_steps, point=point)]).check(TASK)
    assert len(happened(tmp_path)) == 1


@pytest.mark.parametrize("point", ["backward", "decoded"])
def test_a_worker_killed_in_the_first_step_of_the_run(tmp_path, point):
    run(TASK, tmp_path, faults=[Fault(slot=0, step=1, point=point)]).check(TASK)


def test_several_faults_in_one_run(tmp_path):
    faults = [
        Fault(slot=0, step=4, point="decoded"),
        Fault(slot=1, step=11, point="updated", when_stored=True),
        Fault(slot=2, step=12, point="backward", kind="leave"),
        Fault(slot=0, step=22, point="slice", when_stored=True),
        Fault(slot=1, step=30, point="between_buckets", when_stored=True),
    ]
    run(LONGER, tmp_path, faults=faults).check(LONGER)


@pytest.mark.parametrize("second", ["backward", "updated", "decoded"])
def test_two_workers_killed_in_the_same_step(tmp_path, second):
    faults = [Fault(slot=0, step=13, point="updated"), Fault(slot=2, step=13, point=second)]
    run(TASK, tmp_path, faults=faults).check(TASK)
    assert len(happened(tmp_path)) == 2


@pytest.mark.parametrize("epoch", [0, 2])
def test_all_workers_killed_at_once_start_again_from_the_last_checkpoint(tmp_path, epoch):
    """Before the first checkpoint, that is the beginning."""
    killed = []

    def power_cut(lab):
        wanted = epoch == 0 or any(r["epoch"] == epoch - 1 for r in lab.hub.reports(0))
        step = max((step for step, *_ in traces(tmp_path)), default=0)
        if not killed and wanted and step > epoch * STEPS + 2:
            killed.append(step)
            lab.kill()

    done = run(dataclasses.replace(LONGER, pace_s=0.02), tmp_path, on_poll=power_cut)
    done.check(LONGER)
    assert killed
    first, second = [e["base"] for e in done.kinds("formed") if e["reset"]]
    assert first == 0
    assert second >= epoch * STEPS
    assert second % STEPS == 0


@pytest.mark.parametrize("point", ["slice", "decoded", "updated"])
@pytest.mark.parametrize("slot", [0, 1])
def test_a_worker_killed_while_another_is_healing(tmp_path, point, slot):
    """It goes at the very step in which the refilled slot has come: slot 0 is then its source."""
    task = dataclasses.replace(TASK, epochs=6)
    lab_faults = [Fault(slot=2, step=5, point="backward")]
    waiting = [Fault(slot=slot, step=step, point=point) for step in range(6, 59)]
    done = run(OnceSomebodyHeals(task), tmp_path, faults=lab_faults + waiting)
    done.check(task)
    assert len(happened(tmp_path)) == 2
    formed = done.kinds("formed")
    pairs = zip(formed, formed[1:], strict=False)
    assert any(2 in before["unhealed"] and slot not in after["slots"] for before, after in pairs)


class OnceSomebodyHeals:
    """Holds all faults after the first back until a member is unhealed, then lets one happen."""

    def __init__(self, task):
        self.task = task

    def __call__(self, directory):
        session, reached = current(), current().points.listeners[:]

        def hold(point, step):
            record = session.worker.agent.record
            num_happened = len(happened(directory))
            if (num_happened == 0) or (num_happened == 1 and record is not None and record.unhealed):
                for listener in reached:
                    listener(point, step)

        if reached:
            session.points.listeners[:] = [hold]
        return self.task(directory)


def test_a_worker_that_is_killed_again_while_it_heals(tmp_path):
    """The communication thread of the one that heals passes these points too."""
    task = dataclasses.replace(TASK, epochs=6)
    faults = [Fault(slot=2, step=5, point="backward")]
    faults += [Fault(slot=2, step=step, point="decoded") for step in range(6, 59)]
    run(OnceSomebodyHeals(task), tmp_path, faults=faults).check(task)
    assert len(happened(tmp_path)) == 2


def test_slots_that_are_not_refilled_leave_the_others_training(tmp_path):
    faults = [Fault(slot=0, step=8, point="decoded"), Fault(slot=1, step=25, point="backward")]
    task = Regression()
    done = run(task, tmp_path, faults=faults, refill=False)
    done.check(task)
    assert sorted(done.results) == [2]


@dataclass(frozen=True, kw_only=True)
class Compressed(Regression):
    """Parameters as small as its are compressed too."""

    def __call__(self, directory):
        layout.SMALL = 1
        return super().__call__(directory)


@pytest.mark.parametrize(
    ("point", "codec"),
    [
        ("backward", "int8"),
        ("updated", "topk(density=0.5)"),
        ("decoded", "topk(density=0.5, all_gather=true)"),
        ("between_buckets", "topk(density=0.5, all_gather=true)"),
    ],
)
def test_replicas_stay_identical_under_codecs_and_faults(tmp_path, point, codec):
    config = dataclasses.replace(SMALL_BUCKETS, compression=codec, shares=(3, 2, 1))
    faults = [Fault(slot=0, step=13, point=point), Fault(slot=1, step=21, point=point, kind="leave")]
    run(Compressed(), tmp_path, faults=faults, config=config).check(Compressed(), error=5e-2)


@pytest.mark.parametrize("point", ["backward", "decoded"])
@pytest.mark.parametrize("step", [STEPS, STEPS + 1])
def test_a_worker_killed_where_an_epoch_of_another_density_begins(tmp_path, point, step):
    config = dataclasses.replace(SMALL_BUCKETS, compression="topk(density=0.1, warmup_epochs=2)", shares=(3, 2, 1))
    task = Densities(patience_s=0.05)
    done = run(task, tmp_path, faults=[Fault(slot=1, step=step, point=point)], config=config)
    done.check(task, error=1.0)
    by_epoch = done.results[0]["densities"]
    assert by_epoch == {0: [0.25], 1: [pytest.approx((0.25 * 0.1) ** 0.5)], 2: [0.1], 3: [0.1]}


@dataclass(frozen=True, kw_only=True)
class Densities(Compressed):
    """Also returns, by epoch, the densities that this worker has encoded with."""

    def __call__(self, directory):
        session, seen = current(), {}

        def look(note):
            codec = session.worker.communicator._collectives.reducer.codecs[0]
            epoch = note.step // STEPS
            if codec.density not in seen.setdefault(epoch, []):
                seen[epoch].append(codec.density)

        session.listeners.append(look)
        return super().__call__(directory) | {"densities": seen}


def test_micro_batches_are_done_again_too(tmp_path):
    task = dataclasses.replace(TASK, micro_batch_size=2)
    faults = [Fault(slot=s, step=n, point=p, when_stored=True) for s, n, p in ((0, 13, "backward"), (1, 21, "decoded"))]
    run(task, tmp_path, faults=faults).check(task)


class SlowStorage(LocalStorage):
    """Stores nothing before two faults have happened."""

    def persist(self, local_dir, name, staged=None):
        wait_until(lambda: len(happened(self.root)) >= 2)
        return super().persist(local_dir, name, staged)


def noticed(directory):
    return Path(directory, "noticed").exists()


class Notice:
    """Says from a step on, again and again, that the machines of some slots are taken away."""

    def __init__(self, *slots):
        self.slots = slots

    def __call__(self, lab):
        if max((step for step, *_ in traces(lab.directory)), default=0) >= STEPS + 3:
            Path(lab.directory, "noticed").touch()
            left = [e["slot"] for e in lab.hub.events(0) if e["kind"] == "left"]
            for slot in self.slots:
                if slot not in left:
                    lab.hub.slot_drains(slot, "a notice")


def test_a_worker_whose_machine_is_taken_away_leaves_in_good_order_and_no_step_is_done_again(tmp_path):
    done = run(UntilRefilled(TASK, 1, noticed), tmp_path, on_poll=Notice(1))
    assert done.check(TASK).num_redone_steps == 0
    assert [e["slot"] for e in done.kinds("draining")] == [1]
    assert [e["slot"] for e in done.kinds("lost", "left")] == [1]
    assert [e["slot"] for e in done.kinds("healed")] == [1]
    assert sorted(done.results) == [0, 1, 2]


def test_of_workers_that_are_all_taken_away_one_stays_until_another_holds_the_state(tmp_path):
    """Three of three: two leave at once; the third one when a new worker is healed."""
    done = run(UntilRefilled(LONGER, 2, noticed), tmp_path, on_poll=Notice(0, 1, 2))
    done.check(LONGER)
    assert sorted(e["slot"] for e in done.kinds("draining")) == [0, 1, 2]
    last = done.kinds("left")[2]
    healed = [e for e in done.kinds("healed") if e["time"] < last["time"]]
    assert healed and done.kinds("lost", "evicted") == []


def test_who_holds_a_checkpoint_leaves_only_when_it_is_stored(tmp_path):
    faults = [
        Fault(slot=0, step=STEPS + 2, point="slice", kind="leave"),
        Fault(slot=1, step=STEPS + 3, point="backward"),
    ]
    done = run(TASK, tmp_path, faults=faults, storage=lambda: SlowStorage(tmp_path))
    done.check(TASK)
    assert [e["slot"] for e in done.kinds("lost", "left")] == [1, 0]
