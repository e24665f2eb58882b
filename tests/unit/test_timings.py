"""What a worker says of its steps: what counts as its own time, and what as waiting for its peers."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from raytrain_het.collectives import communicator
from raytrain_het.collectives.communicator import Communicator
from raytrain_het.collectives.jobs import StepJob
from raytrain_het.collectives.layout import Layout

TWO_BUCKETS = Layout([("a", torch.zeros(4)), ("b", torch.zeros(4))], [], 16)


class Clock:
    """Seconds that pass only when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


class Scripted:
    """An operation that ends after some events, each at its time."""

    def __init__(self, clock: Clock, wake: threading.Event, events: list[tuple[float, Any]]) -> None:
        self.clock, self.wake, self.events = clock, wake, events

    @property
    def done(self) -> bool:
        if not self.events:
            return True
        at, action = self.events.pop(0)
        self.clock.now = at
        action()
        self.wake.set()
        return False

    def result(self) -> None:
        pass


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(communicator, "time", clock)
    return clock


@pytest.fixture
def comm(clock: Clock) -> Any:
    """Its thread stands still, for there is no record: operations are awaited by the test."""
    agent = SimpleNamespace(
        record=None, void=0, answered=0, gone=None, condition=threading.Condition(), on_message={}, on_reconnect=[],
        suspect=lambda *_: None,
    )  # fmt: skip
    comm = Communicator(agent, TWO_BUCKETS, advance=None, resync_bytes=0, hang_limit_s=1e9)  # type: ignore[arg-type]
    yield comm
    comm.close()


def test_waiting_is_counted_from_when_the_last_bucket_was_ready(comm: Communicator, clock: Clock) -> None:
    """A wait for an early bucket that began during the backward pass is no wait until that pass is over."""
    job = StepJob(0, 1)
    comm.bucket_ready(job, 1)
    ends = [(103.0, lambda: comm.bucket_ready(job, 2)), (104.0, lambda: None)]
    comm._finish_of_step(Scripted(clock, comm._wake, ends), job)  # type: ignore[arg-type]
    assert job.waited_s == pytest.approx(1.0)
    comm._finish_of_step(Scripted(clock, comm._wake, [(104.5, lambda: None)]), job)  # type: ignore[arg-type]
    assert job.waited_s == pytest.approx(1.5)


def test_a_wait_that_is_over_before_the_last_bucket_is_ready_is_none(comm: Communicator, clock: Clock) -> None:
    job = StepJob(0, 1)
    comm.bucket_ready(job, 1)
    comm._finish_of_step(Scripted(clock, comm._wake, [(103.0, lambda: None)]), job)  # type: ignore[arg-type]
    assert job.waited_s == 0.0
