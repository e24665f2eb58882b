"""The others soon go on without a stopped worker, never without a slow one; and one that wakes comes back in place."""

import contextlib
import dataclasses
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from labs import run, wait_until

import raytrain_het as het
from raytrain_het.membership.points import POINTS
from raytrain_het.testing.campaign import Waker
from raytrain_het.testing.faults import Fault, happened
from raytrain_het.testing.ledger import check_exactly_once, read_ledgers
from raytrain_het.testing.regression import SMALL_BUCKETS, Regression, differing_replicas, traces
from raytrain_het.worker.session import current

TASK = Regression(patience_s=0.05)
STEPS = TASK.plan.steps_per_epoch


@pytest.mark.parametrize("point", [p for p in POINTS if p != "report"])
def test_a_stopped_worker_holds_nobody_up_for_two_step_times_and_a_second_and_comes_back_in_place(tmp_path, point):
    done = run(TASK, tmp_path, faults=[Fault(slot=1, step=14, point=point, kind="stop")], on_poll=waking)
    done.check(TASK)
    assert [e["slot"] for e in done.kinds("came_back")] == [1]
    assert [e["slot"] for e in done.kinds("healed")] == [1]
    assert done.kinds("lost", "evicted") == []
    assert sorted(done.results) == [0, 1, 2] and done.lab.restarts == 0
    stopped_at = happened(tmp_path)[0].time
    commits = sorted(at for *_, at in traces(tmp_path))
    step_s = max(b - a for a, b in zip(commits, commits[1:], strict=False) if b < stopped_at)
    (suspended,) = done.kinds("suspended")
    resumed = next(e["time"] for e in done.kinds("formed") if e["time"] > suspended["time"] - 1e-3)
    assert resumed - stopped_at < 2 * step_s + 1.0


def waking(lab):
    if not hasattr(lab, "waker"):
        lab.waker = Waker(lab)
    lab.waker()


class WakesAfterSteps:
    """Wakes stopped workers once the others have gone on for so many steps without them."""

    def __init__(self, steps):
        self.steps = steps

    def __call__(self, lab):
        for fault in happened(lab.directory):
            gone_on = max((step for step, *_ in traces(lab.directory)), default=0)
            if gone_on >= fault.step + self.steps and fault.slot in lab.processes:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(lab.processes[fault.slot].pid, signal.SIGCONT)


@pytest.mark.parametrize("point", ["slice", "backward", "updated"])
def test_a_worker_that_was_away_at_the_end_of_epochs_comes_back_into_a_later_one(tmp_path, point):
    """What its program does at an epoch's end was done by the others: nothing of it is done or reported twice."""
    task = dataclasses.replace(TASK, epochs=8, scheduled=True, batch_norm=True, dtype=torch.float64)
    faults = [Fault(slot=1, step=14, point=point, kind="stop")]
    done = run(task, tmp_path, faults=faults, on_poll=WakesAfterSteps(2 * STEPS + 3))
    check_exactly_once(read_ledgers(tmp_path), task.plan, epochs=task.epochs)
    assert differing_replicas(tmp_path) == []
    done.check_reports(task)
    assert [e["missed"] for e in done.kinds("came_back")] == [True]
    assert done.kinds("lost", "evicted", "failed") == [] and sorted(done.results) == [0, 1, 2]
    assert done.parameters is not None, "they are the same to the bit"
    rates = {slot: dict(result["rates"]) for slot, result in done.results.items()}
    assert all(rates[1][step] == rate for step, rate in rates[0].items() if step in rates[1])
    assert max(rates[1]) == task.num_steps - 1 and len(rates[1]) < len(rates[0])


class Evaluating:
    """Evaluates before each report. Notes the epoch, what was found, and how many chunks were computed here."""

    def __init__(self, task):
        self.task = task

    def __call__(self, directory):
        found, chunks, report = [], [], het.report

        def evaluate_and_report(metrics):
            session = current()
            model, (_, dataset) = session.joined().replica.model, self.task.build()
            before = len(chunks)

            def fn(batch):
                chunks.append(1)
                x, y = batch
                return {"loss": ((model(x) - y) ** 2).sum()}

            value = het.evaluate(fn, dataset, batch_size=10)
            found.append((session.worker.epoch, value["loss"], len(chunks) - before))
            report(metrics)

        het.report = evaluate_and_report
        return self.task(directory) | {"found": found}


def test_who_was_away_at_the_end_of_epochs_gets_what_the_others_have_found_there(tmp_path):
    """It evaluates nothing of a state that only it is asked for, while the others wait for it."""
    task = dataclasses.replace(TASK, epochs=8)
    faults = [Fault(slot=1, step=14, point="backward", kind="stop")]
    done = run(Evaluating(task), tmp_path, faults=faults, on_poll=WakesAfterSteps(2 * STEPS + 3))
    assert done.kinds("lost", "evicted", "failed") == [] and [e["missed"] for e in done.kinds("came_back")] == [True]
    of_all = {epoch: value for epoch, value, _ in done.results[0]["found"]}
    own = done.results[1]["found"]
    assert {epoch: value for epoch, value, _ in own}.items() <= of_all.items()
    (missed,) = [number for epoch, _, number in own if epoch == 1]
    assert missed == 0


@pytest.mark.parametrize("point", ["decoded", "updated"])
def test_a_worker_that_stops_when_the_others_have_left_the_generation_is_suspended_too(tmp_path, point):
    """They wait for its answer then, and no collective is under way that somebody could suspect."""
    # Long steps, so that word of the leave is there before the step's end.
    task = dataclasses.replace(TASK, pace_s=0.05)
    faults = [
        Fault(slot=0, step=14, point="slice", kind="leave"),
        Fault(slot=1, step=14, point=point, kind="stop"),
    ]
    done = run(task, tmp_path, faults=faults, on_poll=waking)
    done.check(task)
    assert [e["slot"] for e in done.kinds("suspended")] == [1]


@pytest.mark.parametrize("point", POINTS)
def test_a_worker_that_stops_in_the_last_step_is_suspended_too(tmp_path, point):
    """The others wait for the end, and for its part of the last report, in no collective."""
    faults = [Fault(slot=1, step=TASK.num_steps, point=point, kind="stop")]
    done = run(TASK, tmp_path, faults=faults, on_poll=waking)
    done.check(TASK)
    assert [e["slot"] for e in done.kinds("suspended")] == [1]


@pytest.mark.parametrize("kind", ["stop", "kill"])
@pytest.mark.parametrize("checkpoints", [True, False])
def test_the_only_other_worker_goes_while_one_heals_from_it(tmp_path, checkpoints, kind):
    """Who compares its state with the peer's waits for an answer of it, in no collective.

    Nobody holds the state then. One that has only stopped is waited for until the hang limit. Then all begin again,
    from the last checkpoint or, with the first state, from the beginning.
    """
    task = dataclasses.replace(TASK, epochs=6, report=checkpoints)
    faults = [Fault(slot=1, step=STEPS + 5, point="backward", when_stored=True)]
    faults += [Fault(slot=0, step=step, point="slice", kind=kind) for step in range(STEPS + 6, 59)]
    config = dataclasses.replace(SMALL_BUCKETS, hang_limit_s=2.5)
    done = run(OnceOneIsHealed(task), tmp_path, num_slots=2, faults=faults, config=config, on_poll=waking)
    done.check(task, reports=False)  # One that only the second worker held may be lost with it.
    assert len(happened(tmp_path)) == 2
    resets = [e["base"] for e in done.kinds("formed") if e["reset"]]
    assert len(resets) == 2
    assert (resets[1] > 0) == checkpoints
    assert resets[1] % STEPS == 0


class OnceOneIsHealed:
    """Holds all faults after the first back until a member has just healed, then lets one happen."""

    def __init__(self, task):
        self.task = task

    def __call__(self, directory):
        session, reached = current(), current().points.listeners[:]

        def hold(point, step):
            record, num_happened = session.worker.agent.record, len(happened(directory))
            if num_happened == 0 or (num_happened == 1 and record is not None and record.fresh):
                for listener in reached:
                    listener(point, step)

        if reached:
            session.points.listeners[:] = [hold]
        return self.task(directory)


class StopsOnceTheOtherIsBack:
    """The first of two workers stops before a step, when the second one's next process is there and not yet let in."""

    def __call__(self, directory):
        session, mark = current(), Path(directory) / "fault_0_0_slice-stop"

        def hold(point, step):
            if point == "slice" and session.slot == 0 and happened(directory) and not mark.exists():
                wait_until((Path(directory) / "joined").exists)
                mark.write_text(f"{time.time()} 0")
                os.kill(os.getpid(), signal.SIGSTOP)

        current().points.listeners.append(hold)
        return TASK(directory)


def test_whoever_waits_to_be_let_in_begins_again_if_the_only_member_has_stopped_for_the_hang_limit(tmp_path):
    def on_poll(lab):
        if lab.hub.status()["num_joined"].get(1, 0) > 1:
            (tmp_path / "joined").touch()
        waking(lab)

    faults = [Fault(slot=1, step=STEPS + 5, point="backward", when_stored=True)]
    config = dataclasses.replace(SMALL_BUCKETS, hang_limit_s=2.5)
    done = run(StopsOnceTheOtherIsBack(), tmp_path, num_slots=2, faults=faults, config=config, on_poll=on_poll)
    done.check(TASK, reports=False)
    assert [e["slot"] for e in done.kinds("evicted")] == [0]


@pytest.mark.parametrize("slot", [0, 2])
def test_a_stopped_worker_that_wakes_after_the_others_have_finished_ends_by_itself(tmp_path, slot):
    def wake_late(lab):
        if {0, 1, 2} - {slot} <= lab.results.keys() and slot in lab.processes:
            os.kill(lab.processes[slot].pid, signal.SIGCONT)

    faults = [Fault(slot=slot, step=14, point="between_buckets", kind="stop")]
    done = run(TASK, tmp_path, faults=faults, on_poll=wake_late)
    done.check(TASK)
    assert sorted(done.results) == sorted({0, 1, 2} - {slot})


def test_a_worker_ten_times_slower_for_twenty_steps_is_never_dropped(tmp_path):
    task = dataclasses.replace(TASK, pace_s=0.01)
    slow = [Fault(slot=2, step=8, point="backward", kind="slow", steps=20, seconds=0.1)]
    done = run(task, tmp_path, faults=slow)
    assert len(happened(tmp_path)) == 20
    done.check(task)
    assert done.kinds("evicted", "lost", "void") == []


def test_one_step_of_many_times_the_usual_length_is_waited_for(tmp_path):
    done = run(TASK, tmp_path, faults=[Fault(slot=0, step=14, point="slice", kind="slow", seconds=2.0)])
    done.check(TASK)
    assert done.kinds("evicted", "lost", "void") == []


@pytest.mark.parametrize("point", ["slice", "backward"])
def test_a_worker_that_answers_but_never_arrives_is_dropped_at_the_hang_limit(tmp_path, point):
    killed = []

    def clear_away(lab):  # As Ray would.
        if not killed and any(e["kind"] == "evicted" for e in lab.hub.events(0)):
            killed.append(lab.kill(1))

    config = dataclasses.replace(SMALL_BUCKETS, hang_limit_s=2.5)
    faults = [Fault(slot=1, step=14, point=point, kind="slow", seconds=60.0)]
    done = run(TASK, tmp_path, faults=faults, config=config, on_poll=clear_away)
    done.check(TASK)
    (evicted,) = done.kinds("evicted")
    assert evicted["slot"] == 1
    assert "waited 2.5 s" in evicted["reason"]
    assert 1.0 <= evicted["time"] - happened(tmp_path)[0].time < 4.0
