"""Connections, threads and storage are held up while all processes live: no worker is lost, and no step done again."""

import ctypes
import dataclasses
import random
import time

import pytest
from labs import run

from raytrain_het.testing.cuts import cut
from raytrain_het.testing.regression import SMALL_BUCKETS, Regression, traces
from raytrain_het.worker.session import current
from raytrain_het.worker.state.checkpoint import LocalStorage

TASK = Regression(patience_s=0.25, pace_s=0.005, epochs=6)
NOTHING_LOST = ("lost", "evicted", "suspended", "void", "given_up")


class Cutting:
    """Cuts connections each time that training has gone on for some steps."""

    def __init__(self, times, slots=None, seed=0):
        self.left, self.slots = times, slots
        self.chance = random.Random(seed)
        self.num_cut = 0
        self.next_step = 4

    def __call__(self, lab):
        if self.left and max((step for step, *_ in traces(lab.directory)), default=0) >= self.next_step:
            self.next_step += self.chance.randint(1, 4)
            self.left -= 1
            self.num_cut += cut(lab.hub, self.slots)


@pytest.mark.parametrize("slots", [[1], None], ids=["of one worker", "of all"])
def test_connections_that_are_cut_cost_no_worker_and_no_step(tmp_path, slots):
    cutting = Cutting(10, slots)
    done = run(TASK, tmp_path, on_poll=cutting)
    report = done.check(TASK)
    assert cutting.num_cut >= 10
    assert done.kinds(*NOTHING_LOST) == []
    assert report.num_redone_steps == 0
    assert len(done.kinds("formed")) == 1 and done.lab.restarts == 0


class HoldsTheLock:
    """A worker's interpreter is held by a call into C, as by a large sort, before some of its steps."""

    def __init__(self, task, slot, steps, seconds):
        self.task, self.slot, self.steps, self.seconds = task, slot, steps, seconds

    def __call__(self, directory):
        hold = ctypes.PyDLL(None).usleep

        def at(point, step):
            if point == "slice" and current().slot == self.slot and step in self.steps:
                hold(int(self.seconds * 1e6))

        current().points.listeners.append(at)
        return self.task(directory)


def test_a_worker_whose_interpreter_is_held_by_a_call_is_waited_for(tmp_path):
    started = time.monotonic()
    done = run(HoldsTheLock(TASK, 1, (8, 20, 31), 1.5), tmp_path)
    done.check(TASK)
    assert time.monotonic() - started > 3 * 1.5
    assert done.kinds(*NOTHING_LOST) == []


class SlowStorage(LocalStorage):
    """Takes twice the hang limit for each checkpoint; `false_alarms` has ten times."""

    def persist(self, local_dir, name, staged=None):
        time.sleep(2 * HANG_LIMIT_S)
        return super().persist(local_dir, name, staged)


HANG_LIMIT_S = 1.5


def test_a_storage_that_takes_longer_than_the_hang_limit_costs_no_worker_and_no_checkpoint(tmp_path):
    config = dataclasses.replace(SMALL_BUCKETS, hang_limit_s=HANG_LIMIT_S)
    task = dataclasses.replace(TASK, epochs=3)
    done = run(task, tmp_path, config=config, storage=lambda: SlowStorage(tmp_path / "storage"))
    done.check(task)
    assert done.kinds(*NOTHING_LOST, "failed") == []
