"""Slow processes: never faster than they may be, and never left stopped."""

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from raytrain_het.testing.cgroups import CpuQuota, available
from raytrain_het.testing.stop_and_go import SAVED_S
from raytrain_het.testing.throttle import StopAndGo, slow_workers, throttle

pytest_plugins = ["raytrain_het.testing.plugin"]

KINDS = [StopAndGo, pytest.param(CpuQuota, marks=pytest.mark.skipif(not available(), reason="needs root"))]
# Two threads that compute outside of the interpreter's lock, and so want two cores.
SPIN = """
import hashlib, threading
def spin():
    while True:
        hashlib.pbkdf2_hmac("sha256", b"a", b"b", 1000)
threading.Thread(target=spin).start()
spin()
"""


@contextlib.contextmanager
def spinner():
    """The process id of one that computes all the time."""
    process = subprocess.Popen([sys.executable, "-c", SPIN])
    try:
        yield process.pid
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def spinning():
    with spinner() as pid:
        yield pid


def state(pid):
    """R, S, T (stopped), Z ..."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]


def eventually(condition, timeout_s=20):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def ended(pid, timeout_s=20):
    """Wait for the end of a process; one that is gone has ended."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    readable, _, _ = select.select([handle], [], [], timeout_s)
    os.close(handle)
    return bool(readable)


@pytest.mark.parametrize("kind", KINDS)
def test_a_process_with_two_threads_gets_no_more_than_it_may(kind):
    """A slow and a less slow one side by side: together they want less than there is."""
    with contextlib.ExitStack() as stack:
        spinning = {cores: stack.enter_context(spinner()) for cores in (0.1, 0.5)}
        for cores, pid in spinning.items():
            stack.enter_context(contextlib.closing(kind(cores))).add(pid)
        before = {cores: (cpu_s(pid), time.monotonic()) for cores, pid in spinning.items()}
        time.sleep(3.0)
        for cores, (used, began) in before.items():
            used, passed = cpu_s(spinning[cores]) - used, time.monotonic() - began
            # With what it had saved up, and what it owes if the one that stops it comes late on a busy machine.
            assert 0 < used <= cores * (passed + SAVED_S) + 0.6


def cpu_s(pid):
    """What a process has used of the CPU, in seconds."""
    return time.clock_gettime((~pid << 3) | 2)


def test_a_new_speed_holds_at_once(spinning):
    with contextlib.closing(StopAndGo(1.0)) as slow:
        slow.add(spinning)
        slow.set(0.05)
        eventually(lambda: state(spinning) == "T")
        slow.set(1000.0)
        eventually(lambda: state(spinning) != "T")
        # It is not stopped again.
        assert all(state(spinning) != "T" for _ in range(100) if not time.sleep(0.001))


def helpers_of(slow):
    """The process that stops and continues, and its guard."""
    pid = slow._helper.pid
    children = Path(f"/proc/{pid}/task/{pid}/children")
    eventually(lambda: children.read_text().split())
    return pid, int(children.read_text())


def test_closing_lets_the_process_go_and_leaves_no_helper(spinning):
    slow = StopAndGo(0.05)
    slow.add(spinning)
    helpers = helpers_of(slow)
    eventually(lambda: state(spinning) == "T")
    slow.close()
    assert state(spinning) != "T"
    assert all(ended(pid) for pid in helpers)


OWNER = """
import sys, time
from raytrain_het.testing.throttle import StopAndGo
slow = StopAndGo(0.05)
slow.add(int(sys.argv[1]))
print(slow._helper.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("victim", ["owner", "stopper", "guard"])
def test_whoever_is_killed_the_process_goes_on(victim, spinning):
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(spinning)], stdout=subprocess.PIPE, text=True)
    try:
        stopper = int(owner.stdout.readline())
        children = Path(f"/proc/{stopper}/task/{stopper}/children")
        eventually(lambda: children.read_text().split() and state(spinning) == "T")
        guard = int(children.read_text())
        os.kill({"owner": owner.pid, "stopper": stopper, "guard": guard}[victim], signal.SIGKILL)
        assert ended(guard)
        assert ended(stopper)
        assert state(spinning) != "T"
    finally:
        owner.kill()
        owner.wait()


def test_a_process_that_ends_ends_nothing_else(spinning):
    short = subprocess.Popen(["sleep", "600"])
    with contextlib.closing(StopAndGo(0.05)) as slow:
        slow.add(short.pid)
        slow.add(spinning)
        short.kill()
        assert short.wait() == -signal.SIGKILL
        eventually(lambda: state(spinning) == "T")
        eventually(lambda: state(spinning) != "T")
    assert state(spinning) != "T"


@pytest.mark.parametrize("kind", [StopAndGo, CpuQuota])
@pytest.mark.parametrize("cores", [0.0, -1.0, float("nan"), float("inf")])
def test_what_is_no_speed_is_refused(kind, cores):
    with pytest.raises(ValueError, match=r"cores=.* is not valid: allowed is a number from 0.01"):
        kind(cores)


@pytest.mark.skipif(not available(), reason="needs root")
def test_a_quota_below_the_kernels_least_is_kept_by_a_longer_period():
    with contextlib.closing(CpuQuota(0.02)) as quota:
        v1 = quota.path / "cpu.cfs_quota_us"
        if v1.exists():
            limits = [v1.read_text(), (quota.path / "cpu.cfs_period_us").read_text()]
        else:
            limits = (quota.path / "cpu.max").read_text().split()
        assert int(limits[0]) / int(limits[1]) == pytest.approx(0.02)


@pytest.mark.skipif(not available(), reason="needs root")
def test_slow_workers_join_the_group_of_their_rank_and_the_groups_go(spinning):
    with slow_workers([0.5, 0.25]) as slow:
        enter = f"import pickle; pickle.loads({__import__('pickle').dumps(slow)!r})(1); input()"
        worker = subprocess.Popen([sys.executable, "-c", enter], stdin=subprocess.PIPE)
        eventually(lambda: str(worker.pid) in (slow.groups[1] / "cgroup.procs").read_text().split(), 60)
    assert not any(group.exists() for group in slow.groups)
    worker.communicate(b"\n")
    assert worker.returncode == 0


def test_the_fixture_slows_processes(slow_cores, spinning):
    slow = slow_cores(0.1, spinning)
    assert type(slow) is type(slow_cores(0.2))
    assert isinstance(slow, CpuQuota if available() else StopAndGo)


def test_without_root_it_is_done_by_stopping(monkeypatch):
    monkeypatch.setattr("raytrain_het.testing.cgroups.available", lambda: False)
    with contextlib.closing(throttle(0.5)) as slow:
        assert isinstance(slow, StopAndGo)
    with slow_workers([0.5]) as workers:
        assert workers.groups is None
        assert "no CPU quotas" in workers.how
