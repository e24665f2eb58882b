"""What a worker says of its steps: what counts as its own time, and what as waiting for its peers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

from raytrain_het.allreduce import jobs, waiting
from raytrain_het.allreduce.communicator import Communicator
from raytrain_het.allreduce.jobs import Contribution, LocalBucket, StepJob
from raytrain_het.allreduce.layout import Layout
from raytrain_het.balance.batch_shares import StepCost
from raytrain_het.balance.profile import Profile
from raytrain_het.membership.message_parts import Known
from raytrain_het.membership.protocol import Timing
from raytrain_het.worker.step import timings
from raytrain_het.worker.step.timings import NUM_FIRST, NUM_WORTH_KEEPING, CpuSplit, KnownSpeed, Timings

TWO_BUCKETS = Layout([("a", torch.zeros(4)), ("b", torch.zeros(4))], [], 16)


class Clock:
    """Seconds that pass only when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


class Scripted:
    """An operation that ends after some events, each at its time."""

    def __init__(self, clock: Clock, wake: Callable[[], None], events: list[tuple[float, Any]]) -> None:
        self.clock, self.wake, self.events = clock, wake, events

    @property
    def done(self) -> bool:
        if not self.events:
            return True
        at, action = self.events.pop(0)
        self.clock.now = at
        action()
        self.wake()
        return False

    def result(self) -> None:
        pass


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(jobs, "time", clock)
    monkeypatch.setattr(waiting, "time", clock)
    return clock


@pytest.fixture
def comm(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Without its thread: operations are awaited by the test."""
    monkeypatch.setattr(Communicator, "_run", lambda self: None)
    agent = SimpleNamespace(
        record=None,
        void=0,
        answered=0,
        gone=None,
        condition=threading.Condition(),
        on_message={},
        on_reconnect=[],
        suspect=lambda *_: None,
    )
    comm = Communicator(agent, TWO_BUCKETS, advance=None, hang_limit_s=1e9)  # type: ignore[arg-type]
    yield comm
    comm.close()


def waited(comm: Communicator, clock: Clock, job: StepJob, events: list[tuple[float, Any]]) -> float:
    return comm._waiter.finish_of_step(Scripted(clock, comm._poller.wake, events), job)


def test_waiting_is_counted_from_when_the_last_bucket_was_ready(comm: Communicator, clock: Clock) -> None:
    """A wait for an early bucket that began during the backward pass is no wait until that pass is over."""
    job = StepJob(0, 1)
    job.hand_over(Contribution(), [LocalBucket()], last=False)
    ends = [(103.0, lambda: job.hand_over(Contribution(), [LocalBucket()], last=True)), (104.0, lambda: None)]
    assert waited(comm, clock, job, ends) == pytest.approx(1.0)
    assert waited(comm, clock, job, [(104.5, lambda: None)]) == pytest.approx(0.5)


def test_a_wait_that_is_over_before_the_last_bucket_is_ready_is_none(comm: Communicator, clock: Clock) -> None:
    job = StepJob(0, 1)
    job.hand_over(Contribution(), [LocalBucket()], last=False)
    assert waited(comm, clock, job, [(103.0, lambda: None)]) == 0.0


# ---------------------------------------------------------------- the part of the waiting that is own work


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> Cpu:
    cpu = Cpu()
    monkeypatch.setattr(timings, "time", cpu)
    return cpu


class Cpu(Clock):
    """The process's CPU time passes only when told."""

    def process_time(self) -> float:
        return self.now


def split_of(cpu: Cpu, *, busy_s: float, waiting_s: float) -> CpuSplit:
    """A step with so much CPU time before the wait and in it."""
    split = CpuSplit()
    cpu.now += busy_s
    split.waiting_begins()
    cpu.now += waiting_s
    split.waiting_ends()
    return split


def test_cpu_time_spent_on_messages_while_waiting_is_own_work(cpu: Cpu) -> None:
    split = split_of(cpu, busy_s=3.0, waiting_s=0.5)
    assert split.own_part_s(waited_s=2.0, cycle_s=5.0) == pytest.approx(0.5)


def test_a_process_that_gets_a_part_of_a_core_needs_longer_for_its_messages(cpu: Cpu) -> None:
    """One CPU second in four of being busy: a quarter of a core, on which half a second takes two."""
    split = split_of(cpu, busy_s=1.0, waiting_s=0.5)
    assert split.own_part_s(waited_s=3.0, cycle_s=7.0) == pytest.approx(2.0)


def test_own_work_is_never_more_than_the_wait_nor_made_faster_by_several_cores(cpu: Cpu) -> None:
    assert split_of(cpu, busy_s=1.0, waiting_s=0.5).own_part_s(waited_s=1.0, cycle_s=5.0) == 1.0
    assert split_of(cpu, busy_s=8.0, waiting_s=0.5).own_part_s(waited_s=1.0, cycle_s=3.0) == pytest.approx(0.5)


def test_without_any_busy_time_there_is_nothing_to_go_by(cpu: Cpu) -> None:
    assert split_of(cpu, busy_s=0.0, waiting_s=0.5).own_part_s(waited_s=1.0, cycle_s=3.0) == 0.0
    assert split_of(cpu, busy_s=1.0, waiting_s=0.5).own_part_s(waited_s=3.0, cycle_s=3.0) == 0.0


def test_what_a_process_does_between_two_epochs_is_not_its_steps_work(cpu: Cpu) -> None:
    split = split_of(cpu, busy_s=1.0, waiting_s=0.5)
    split.pauses()
    cpu.now += 3.0
    split.goes_on()
    assert split.own_part_s(waited_s=3.0, cycle_s=7.0) == pytest.approx(2.0)


# ---------------------------------------------------------------- what is told, and what is kept


class Agent:
    """Keeps what it is to tell."""

    def __init__(self) -> None:
        self.told: list[dict[str, Any]] = []
        self.record = None

    def tell(self, message: Timing) -> None:
        self.told.append(msgspec.structs.asdict(message))


def timings_of(agent: Agent) -> Timings:
    return Timings(agent, 64)  # type: ignore[arg-type]


def test_short_steps_are_told_of_together_and_none_twice(cpu: Cpu) -> None:
    agent = Agent()
    told = timings_of(agent)
    for step in range(10):
        cpu.now += 0.02
        told.step_done(step, 0.005, 0.02)
    sent = [samples for message in agent.told for samples, _, _ in message["steps"]]
    assert sent == list(range(NUM_FIRST, 9)), "the first ones load and compile, the last ones wait for their company"
    assert len(agent.told) == 3
    assert {message["global_batch_size"] for message in agent.told} == {64}


def test_own_seconds_are_those_of_the_whole_step_without_the_waiting(cpu: Cpu) -> None:
    agent = Agent()
    told = timings_of(agent)
    for waited_s in (0.0, 0.0, 0.25, 2.0):
        cpu.now += 1.0
        told.step_done(8, waited_s, 1.0)
    (_, own_s, cycle_s), (_, least, _) = (step for message in agent.told for step in message["steps"])
    assert (own_s, cycle_s) == (0.75, 1.0)
    assert 0 < least < 1e-6, "above 0, since it is a time"


def test_what_is_learnt_needs_some_steps_with_samples(cpu: Cpu) -> None:
    told = timings_of(Agent())
    for _ in range(NUM_FIRST + NUM_WORTH_KEEPING - 1):
        told.step_done(10, 0.1, 0.6)
    for _ in range(50):
        told.step_done(0, 0.1, 0.6)
    assert told.learnt(None) is None
    told.step_done(10, 0.1, 0.6)
    assert told.learnt(None) == StepCost(0.0, pytest.approx(0.05))
    start = StepCost(0.25, 0.05)
    learnt = told.learnt(start)
    assert learnt is not None
    assert learnt.fixed_s == pytest.approx(0.5 / 3), "the fixed part of five samples' worth stays in proportion"
    assert learnt.step_s(10) == pytest.approx(0.5)


def test_a_stand_in_is_told_of_and_not_kept(cpu: Cpu) -> None:
    agent = Agent()
    told = timings_of(agent)
    for _ in range(NUM_FIRST + NUM_WORTH_KEEPING):
        cpu.now += 1.0
        told.step_done(2, 0.5, 1.5, stand_in=True)
    assert [step for message in agent.told for step in message["steps"]] == [(2, 1.0, 1.5)] * NUM_WORTH_KEEPING
    assert told.learnt(None) is None


def test_a_models_step_time_is_known_to_the_next_run_on_such_hardware_and_to_no_other_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cpu: Cpu
) -> None:
    profile = Profile(hardware="a CPU", device="cpu", cores=2.0, num_threads=2)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(timings, "known_or_probed", lambda device, *, store: profile)
    known = KnownSpeed(torch.device("cpu"), "a model")
    assert known.told(64) == Known(profile=profile, global_batch_size=64)
    told = timings_of(Agent())
    known.keep(told)
    assert KnownSpeed(torch.device("cpu"), "a model").told(64).profile.step is None, "too few steps"
    for _ in range(NUM_FIRST + NUM_WORTH_KEEPING):
        told.step_done(10, 0.1, 0.6)
    known.keep(told)
    again = KnownSpeed(torch.device("cpu"), "a model").told(64).profile
    assert again.step == StepCost(0.0, pytest.approx(0.05))
    assert KnownSpeed(torch.device("cpu"), "another").told(64).profile.step is None
