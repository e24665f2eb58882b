"""Machines that cannot reach each other for a while, in a network namespace for each worker."""

import dataclasses
import os
import signal
import time

import pytest

from raytrain_het.config import HetConfig
from raytrain_het.testing.ledger import check_exactly_once, read_ledgers
from raytrain_het.testing.processes import LabSlots, ProcessLab
from raytrain_het.testing.regression import SMALL_BUCKETS, Regression, differing_replicas, relative_error, traces

pytestmark = pytest.mark.lab
TASK = Regression(pace_s=0.02, epochs=30, report=False)
CABLES = LabSlots(num_slots=3, rates_mbit=[None, None, None])


class Partition:
    """Cuts something at a step, and mends it once the others have gone on for a while and some time has passed.

    Args:
        cut: takes the network.
        mend: too; None leaves it as it is.
        seconds: at least so long it stays cut.
    """

    def __init__(self, cut, mend=None, *, seconds=0.0):
        self.cut, self.mend, self.seconds = cut, mend, seconds
        self.at = self.mended_at = None
        self.step = 0

    def __call__(self, lab):
        step = max((step for step, *_ in traces(lab.directory)), default=0)
        if self.at is None and step >= 10:
            self.cut(lab)
            self.at, self.step = time.time(), step
        elif self.mend and self.at and not self.mended_at and time.time() - self.at >= self.seconds:
            self.mend(lab)
            self.mended_at = time.time()


def run(tmp_path, partition, *, config: HetConfig = SMALL_BUCKETS, task=TASK, slots=CABLES):
    lab = ProcessLab(task, tmp_path, slots, config=config)
    results = lab.run(100.0, on_poll=lambda: partition(lab))
    report = check_exactly_once(read_ledgers(tmp_path), task.plan, epochs=task.epochs)
    assert differing_replicas(tmp_path) == []
    assert partition.at is not None
    for result in filter(None, results.values()):
        assert relative_error(result["parameters"], task.plain()) < 1e-9
    return lab, results, report


def kinds(lab, *wanted):
    return [e for e in lab.events if e["kind"] in wanted]


@pytest.mark.parametrize(
    ("cut", "mend"), [("unplug", "plug_in"), ("mute", "unmute")], ids=["nothing passes", "it is not heard"]
)
def test_a_worker_that_is_not_reached_for_a_while_comes_back_in_place(tmp_path, cut, mend):
    partition = Partition(
        lambda lab: getattr(lab.network, cut)(2), lambda lab: getattr(lab.network, mend)(2), seconds=2
    )
    lab, results, _ = run(tmp_path, partition, task=dataclasses.replace(TASK, patience_s=0.25))
    assert kinds(lab, "lost", "evicted") == [] and lab.restarts == 0
    assert {e["slot"] for e in kinds(lab, "suspended")} == {2}
    assert {e["slot"] for e in kinds(lab, "came_back")} == {2}
    assert sorted(results) == [0, 1, 2]


def test_training_goes_on_while_the_hub_is_not_reached(tmp_path):
    partition = Partition(lambda lab: lab.network.hide_host(), lambda lab: lab.network.show_host(), seconds=3.0)
    lab, results, report = run(tmp_path, partition)
    assert kinds(lab, "lost", "evicted", "suspended", "void") == [] and lab.restarts == 0
    assert report.num_redone_steps == 0
    meanwhile = {step for step, *_, at in traces(tmp_path) if partition.at < at < partition.mended_at}
    assert len(meanwhile) > 10
    assert sorted(results) == [0, 1, 2]


def test_a_machine_without_power_is_left_behind_and_lost_after_the_hang_limit(tmp_path):
    """Its link is gone, so no reset arrives when its process ends."""

    def power_off(lab):
        lab.network.unplug(2)
        os.kill(lab.processes[2].pid, signal.SIGKILL)

    partition = Partition(power_off)
    config = dataclasses.replace(SMALL_BUCKETS, hang_limit_s=3.0)
    slots = dataclasses.replace(CABLES, refill=False)
    lab, results, _ = run(tmp_path, partition, config=config, task=dataclasses.replace(TASK, epochs=60), slots=slots)
    (suspended,) = kinds(lab, "suspended")
    assert suspended["slot"] == 2
    assert sorted(results) == [0, 1]
    after = min(at for *_, at in traces(tmp_path) if at > suspended["time"])
    assert after - suspended["time"] < 5.0
