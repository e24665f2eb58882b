"""The lab itself: what becomes of its processes when things go wrong around it."""

import os
import select
import subprocess
import sys

import pytest

from raytrain_het.testing import processes
from raytrain_het.testing.cgroups import LabError
from raytrain_het.testing.processes import LabSlots, ProcessLab

SCRIPT = """
import os, sys, time
from raytrain_het.testing.processes import LabSlots, ProcessLab

def train(directory):
    print(os.getpid(), flush=True)
    time.sleep(600)

{guard}
    ProcessLab(train, sys.argv[1], LabSlots(num_slots=2)).run(60)
"""


def script(tmp_path, guard):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT.format(guard=guard))
    return [sys.executable, str(path), str(tmp_path / "lab")]


def test_workers_end_with_the_lab_even_if_it_is_killed(tmp_path):
    command = script(tmp_path, "if __name__ == '__main__':")
    lab = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    workers = [os.pidfd_open(int(lab.stdout.readline())) for _ in range(2)]
    lab.kill()
    lab.wait()
    for worker in workers:
        ended, _, _ = select.select([worker], [], [], 10)
        os.close(worker)
        assert ended


def test_a_script_without_the_main_guard_is_told_so(tmp_path):
    done = subprocess.run(script(tmp_path, "if True:"), capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "if __name__ == '__main__'" in done.stderr.splitlines()[-1]


class FakeQuota:
    """Notes who is in it, and that it is closed; the third cannot be made."""

    made: list = []

    def __init__(self, cores):
        if len(self.made) == 2:
            raise LabError("no CPU quotas here")
        self.made.append(self)
        self.pids, self.closed = [], False

    def add(self, pid):
        self.pids.append(pid)

    def close(self):
        self.closed = True


def sleep_on(directory):
    import time

    time.sleep(600)


@pytest.mark.parametrize("moment", ["a quota cannot be made", "Ctrl-C while processes are started"])
def test_a_lab_that_does_not_come_to_start_leaves_neither_quotas_nor_processes(tmp_path, monkeypatch, moment):
    monkeypatch.setattr(processes, "CpuQuota", FakeQuota)
    monkeypatch.setattr(FakeQuota, "made", [])
    num_slots = 3 if "quota" in moment else 2
    lab = ProcessLab(sleep_on, tmp_path, LabSlots(num_slots=num_slots, cores=[0.5] * num_slots))
    if num_slots == 2:

        def add(quota, pid):
            quota.pids.append(pid)
            if quota is FakeQuota.made[1]:
                raise KeyboardInterrupt

        monkeypatch.setattr(FakeQuota, "add", add)
    with pytest.raises(LabError if num_slots == 3 else KeyboardInterrupt):
        lab.run(60)
    assert len(FakeQuota.made) == 2 and all(quota.closed for quota in FakeQuota.made)
    assert not lab.processes
    assert not any(os.path.exists(f"/proc/{pid}") for quota in FakeQuota.made for pid in quota.pids)


def test_cores_are_one_per_slot(tmp_path):
    with pytest.raises(ValueError, match="cores has 2 entries: allowed is one per slot, 3"):
        LabSlots(num_slots=3, cores=[0.5, 0.5])
