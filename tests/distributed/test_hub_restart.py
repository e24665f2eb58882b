"""The membership actor can die: training goes on, and the new one knows what it must."""

import dataclasses

import pytest
from labs import run

from raytrain_het.testing.faults import Fault, happened
from raytrain_het.testing.regression import Regression, go_on, traces

TASK = Regression(patience_s=0.25, pace_s=0.005, epochs=6)
STEPS = TASK.plan.steps_per_epoch
HEAD_START = 6


def last_step(lab):
    return max((step for step, *_ in traces(lab.directory)), default=0)


class RestartAt:
    """Restarts the hub when training has come to each of these steps."""

    def __init__(self, *steps):
        self.steps = list(steps)
        self.restarts = 0

    def holding(self, task):
        """The task, held up a little after each of the steps until the hub has been restarted."""
        return dataclasses.replace(task, waits_at=tuple(step + HEAD_START for step in self.steps))

    def is_due(self, lab):
        return bool(self.steps) and last_step(lab) >= self.steps[0]

    def __call__(self, lab):
        if self.is_due(lab):
            lab.restart_hub()
            go_on(lab.directory, self.steps.pop(0) + HEAD_START)
            self.restarts += 1


def test_training_goes_on_without_the_hub_and_no_generation_follows(tmp_path):
    restart = RestartAt(12)
    done = run(restart.holding(TASK), tmp_path, on_poll=restart)
    done.check(TASK)
    assert restart.restarts == 1
    assert len(done.kinds("formed")) == 1
    assert len(done.kinds("recovered")) == 1
    assert len({generation for _, generation, *_ in traces(tmp_path)}) == 1


@pytest.mark.parametrize("kind", ["kill", "leave"])
def test_a_worker_that_goes_after_a_restart_is_healed(tmp_path, kind):
    faults = [Fault(slot=1, step=35, point="backward", kind=kind)]
    restart = RestartAt(12)
    done = run(restart.holding(TASK), tmp_path, faults=faults, on_poll=restart)
    done.check(TASK)
    assert [e["slot"] for e in done.kinds("healed")] == [1]


def test_restarts_again_and_again_with_faults_between(tmp_path):
    task = dataclasses.replace(TASK, epochs=8)
    faults = [Fault(slot=slot, step=step, point="decoded") for slot, step in ((0, 14), (1, 33), (2, 52))]
    restart = RestartAt(8, 22, 40, 60)
    done = run(restart.holding(task), tmp_path, faults=faults, on_poll=restart)
    done.check(task)
    assert len(happened(tmp_path)) == 3


def test_a_worker_killed_in_the_moment_of_the_restart(tmp_path):
    """The new hub waits for every member of the highest record, or for word of its death."""

    def restart_and_kill(lab):
        if restart.is_due(lab):
            lab.kill(1)
        restart(lab)

    restart = RestartAt(15)
    done = run(restart.holding(TASK), tmp_path, on_poll=restart_and_kill)
    done.check(TASK)
    assert [e["slot"] for e in done.kinds("healed")] == [1]


def test_a_restarted_hub_knows_the_last_checkpoint(tmp_path):
    killed = []

    def restart_then_power_cut(lab):
        restart(lab)
        step = last_step(lab)
        stored = [r["epoch"] for r in lab.hub.reports(0) + lab.reports if r["checkpoint"]]
        if restart.restarts and not killed and step > 4 * STEPS + 2 and 3 in stored:
            killed.append(step)
            lab.kill()
            go_on(lab.directory, 5 * STEPS)

    restart = RestartAt(35)
    held = restart.holding(TASK)
    held = dataclasses.replace(held, waits_at=(*held.waits_at, 5 * STEPS))
    done = run(held, tmp_path, on_poll=restart_then_power_cut)
    done.check(TASK)
    resets = [e["base"] for e in done.kinds("formed") if e["reset"]]
    assert resets[0] == 0
    assert len(resets) == 2
    assert resets[1] >= 4 * STEPS


def test_a_restarted_hub_knows_the_last_checkpoint_though_its_writer_is_gone(tmp_path):
    """Whoever is left tells it."""
    done_so_far = []

    def proceed(lab):
        did, status = len(done_so_far), lab.hub.status()
        stored = [r["step"] for r in lab.hub.reports(0) if r["checkpoint"]]
        healed = any(e["kind"] == "healed" for e in lab.hub.events(0))
        if did == 0 and stored:
            lab.kill(0)
        elif did == 1 and healed:
            lab.restart_hub()
        elif did == 2 and status["state"] == "running":
            lab.kill()
            go_on(lab.directory, 5 * STEPS)
        else:
            return
        done_so_far.append(max(stored, default=0))

    task = dataclasses.replace(TASK, pace_s=0.02, waits_at=(5 * STEPS,))
    done = run(task, tmp_path, num_slots=2, on_poll=proceed)
    done.check(task)
    resets = [e["base"] for e in done.kinds("formed") if e["reset"]]
    assert len(done_so_far) == 3
    assert resets[0] == 0
    assert resets[-1] >= done_so_far[1] >= STEPS
