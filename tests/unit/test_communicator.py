"""The communication thread's odd corners, with the thread left out where a test takes its place."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from raytrain_het.allreduce import waiting
from raytrain_het.allreduce.collectives import Collectives
from raytrain_het.allreduce.communicator import Communicator
from raytrain_het.allreduce.jobs import Contribution, LocalBucket, StepJob
from raytrain_het.allreduce.layout import Layout
from raytrain_het.allreduce.waiting import Waiter
from raytrain_het.membership.points import StepPoints


def new_agent() -> Any:
    return SimpleNamespace(
        record=None,
        void=0,
        answered=0,
        gone=None,
        condition=threading.Condition(),
        on_message={},
        on_reconnect=[],
        suspect=lambda *_: None,
        member=SimpleNamespace(slot=3),
    )


def new_communicator() -> Communicator:
    layout = Layout([("a", torch.zeros(4))], [], 16)
    return Communicator(new_agent(), layout, advance=None, hang_limit_s=1e9)  # type: ignore[arg-type]


@pytest.fixture
def comm(monkeypatch: pytest.MonkeyPatch) -> Communicator:
    monkeypatch.setattr(Communicator, "_run", lambda self: None)
    return new_communicator()


def test_a_long_wait_for_the_own_backward_pass_is_one_wait_and_not_a_thousand(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, waits = SimpleNamespace(now=0.0), []
    monkeypatch.setattr(waiting, "time", SimpleNamespace(monotonic=lambda: clock.now))

    def wait(timeout_s: float) -> None:
        waits.append(timeout_s)
        clock.now += 100.0

    waiter = Waiter(new_agent(), SimpleNamespace(wait=wait), hang_limit_s=1e9)  # type: ignore[arg-type]
    waiter.until(lambda: len(waits) == 3, 0, 1, peers=False)
    assert waits == [1.0, 1.0, 1.0]
    waits.clear()
    waiter.until(lambda: len(waits) == 2, 0, 1, peers=True)
    assert 0 < waits[0] <= 1.0


def test_a_job_may_be_submitted_while_others_are_given_up(comm: Communicator) -> None:
    class Old(StepJob):
        """The training thread submits the next one just when this one is looked at."""

        def __getattribute__(self, name: str) -> Any:
            if name == "generation":
                comm.submit(StepJob(7, 2))
            return object.__getattribute__(self, name)

    jobs = [Old(3, 1), Old(3, 2)]
    comm._jobs.extend(jobs)
    comm._abort_jobs(before=5)
    assert [job.aborted for job in jobs] == [True, True]
    assert {job.generation for job in comm._jobs} == {7}


@pytest.mark.parametrize("fails", [False, True])
def test_the_thread_leaves_its_group_and_its_sockets_however_it_ends(
    fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()

    def turn(self: Communicator) -> bool:
        go_on.wait(10)
        if fails:
            raise MemoryError("no more")
        return False

    monkeypatch.setattr(Communicator, "_turn", turn)
    comm = new_communicator()
    left = threading.Event()
    comm._group = SimpleNamespace(leave=left.set)  # type: ignore[assignment]
    go_on.set()
    if not fails:
        comm.close()
    assert left.wait(10)
    comm._thread.join(10)
    assert comm._poller._inner.fileno() == -1
    assert (comm.agent.gone is not None) == fails


class Done:
    done = True

    def result(self) -> None:
        """Nothing has failed."""


class Places:
    """Stands for the waiter: notes each position that a member says it has come to."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "position":
            self.seen.append(value)
        object.__setattr__(self, name, value)

    def until(self, condition: Any, *_: Any, **__: Any) -> None:
        assert condition()

    def finish_of_step(self, *_: Any) -> float:
        return 0.0


def test_who_is_behind_is_seen_with_more_than_a_thousand_buckets_too() -> None:
    """A member in a step's last bucket is behind one that has begun the next step."""
    layout = Layout([(f"p{k}", torch.zeros(1)) for k in range(1500)], [], 4)
    assert len(layout.buckets) == 1500
    reducer = SimpleNamespace(
        expect_step=lambda: None,
        feedback=SimpleNamespace(expected_weight=lambda _: 1.0, observe_weight=lambda *_: None),
        all_reduce=lambda *_, **__: iter([Done()]),
    )
    agent = SimpleNamespace(want=0, points=StepPoints())
    waiter = Places()
    reducers = SimpleNamespace(open=lambda epoch: reducer)
    collectives = Collectives(reducers, layout, agent, waiter)  # type: ignore[arg-type]
    for step in (7, 8):
        job = StepJob(1, step)
        job.hand_over(Contribution(means=[torch.zeros(1)] * 1500), [LocalBucket()] * 1500, last=True)
        collectives.all_reduce(job)
    assert waiter.seen == sorted(set(waiter.seen)), "each position is behind all that come later"


def test_bytes_of_a_group_that_is_left_are_counted(comm: Communicator) -> None:
    traffic = SimpleNamespace(sent=5, received=7)
    comm._collectives = SimpleNamespace(reducer=SimpleNamespace(traffic=traffic))  # type: ignore[assignment]
    comm._leave_group()
    assert comm.moved == (5, 7)


def test_no_deadline_is_shorter_than_the_one_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, told = SimpleNamespace(now=0.0), []
    monkeypatch.setattr(waiting, "time", SimpleNamespace(monotonic=lambda: clock.now))

    def wait(timeout_s: float) -> None:
        clock.now += timeout_s

    agent = new_agent()
    agent.suspect = lambda *_: told.append(clock.now)
    waiter = Waiter(agent, SimpleNamespace(wait=wait), hang_limit_s=600.0)  # type: ignore[arg-type]
    waiter.step_s = 200.0
    waiter.until(lambda: len(told) == 3, 0, 1, peers=True)
    first, *others = (after - before for before, after in zip([0.0, *told], told, strict=False))
    assert all(other >= first for other in others)
