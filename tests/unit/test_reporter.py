"""A worker's side of reports: their keys, and when making one waits for others."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

import pytest
from collectives_fakes import record_of

from raytrain_het.membership import protocol
from raytrain_het.membership.place import Doing
from raytrain_het.membership.protocol import Message
from raytrain_het.worker.state.reporter import OpenReport, Reporter
from raytrain_het.worker.state.writing import Writer


class WouldWait(Exception):
    """The training thread would stand still here."""


class Agent:
    """Tells nobody; waiting is an error."""

    def __init__(self) -> None:
        self.record = record_of([1.0], life=1)
        self.on_message: dict[type[Message], Callable[[Any], None]] = {}
        self.condition = threading.Condition()
        self.doing = Doing()
        self.told: list[str] = []

    def tell(self, message: Message) -> None:
        self.told.append(getattr(message, "key", message.kind))

    def wait_for_peers(self, predicate: Callable[[], bool]) -> None:
        if not predicate():
            raise WouldWait


class Server:
    """Keeps names as the state server does: it withdraws whatever begins like the name."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def offer(self, name: str, make: Any) -> None:
        self.names.append(name)

    def withdraw(self, prefix: str) -> None:
        self.names = [name for name in self.names if not name.startswith(prefix)]


class Worker:
    """A reporter and what it needs."""

    def __init__(self) -> None:
        self.agent, self.server = Agent(), Server()
        writer = Writer(self.agent, self.server, None)  # type: ignore[arg-type]
        self.reporter = Reporter(self.agent, writer, storage_limit_s=60.0)  # type: ignore[arg-type]

    def report(self, step: int, *, snapshot: bool = True) -> str:
        key = self.key(step)
        message, state = protocol.Report(key=key, step=step, epoch=0, metrics={}), {} if snapshot else None
        self.reporter.add(OpenReport(key, step, message, {}, state, self.agent.record), {})
        return key

    def key(self, step: int, body: object = None) -> str:
        return self.reporter.next_key(self.agent.record, step, body)

    def acknowledge(self, *keys: str) -> None:
        self.agent.on_message[protocol.Acknowledged](protocol.Acknowledged(keys=list(keys)))


def test_a_key_is_of_a_life_a_step_and_a_call() -> None:
    worker = Worker()
    keys = [worker.key(step) for step in (5, 5, 6)]
    worker.agent.record = record_of([1.0], life=4)
    keys += [worker.key(step) for step in (6, 6)]
    assert keys == ["1.5.0", "1.5.1", "1.6.0", "4.6.0", "4.6.1"]


def test_many_reports_of_the_step_under_way_do_not_wait_for_each_other() -> None:
    worker = Worker()
    keys = [worker.report(5) for _ in range(12)]
    assert worker.agent.told == []
    worker.reporter.send_up_to(5)
    assert worker.agent.told == keys


def test_a_third_snapshot_waits_while_two_are_being_stored() -> None:
    worker = Worker()
    first, second = worker.report(5), worker.report(6)
    worker.reporter.send_up_to(6)
    with pytest.raises(WouldWait):
        worker.report(7)
    worker.report(7, snapshot=False)
    worker.acknowledge(first)
    worker.report(8)
    assert second in worker.reporter._open


def test_the_acknowledgement_of_one_report_leaves_the_states_of_others() -> None:
    worker = Worker()
    keys = [worker.report(5) for _ in range(11)]
    worker.acknowledge(keys[1])
    assert keys[10].startswith(keys[1])
    assert len(worker.server.names) == 10
    assert any(keys[10] in name for name in worker.server.names)


def test_a_report_made_in_the_body_of_a_step_has_the_same_key_when_the_step_is_done_again() -> None:
    worker = Worker()
    first, again = object(), object()
    keys = [worker.key(5), worker.key(5, first), worker.key(5, first)]
    keys += [worker.key(5, again), worker.key(6), worker.key(6, object())]
    assert keys == ["1.5.0", "1.5.1", "1.5.2", "1.5.1", "1.6.0", "1.6.1"]


class SilentStorage:
    """Takes a checkpoint only when it is allowed to, at last."""

    def __init__(self) -> None:
        self.allowed = threading.Event()

    def offer(self, key: str, own: dict[str, Any]) -> None:
        pass

    def write(self, name: str, *_: Any) -> str:
        assert self.allowed.wait(60)
        return name


def test_a_checkpoint_that_the_storage_does_not_take_is_skipped_and_counts_if_it_is_stored_after_all() -> None:
    agent, storage, said = Agent(), SilentStorage(), queue.SimpleQueue[Any]()
    agent.tell = said.put  # type: ignore[method-assign]
    reporter = Reporter(agent, storage, storage_limit_s=0.05)  # type: ignore[arg-type]
    message = protocol.Report(key="1.5.0", step=5, epoch=0, metrics={})
    meta = {"cursor": {"epoch": 0, "offset": 0, "step": 5}}
    reporter.add(OpenReport("1.5.0", 5, message, meta, {}, agent.record), {})
    agent.on_message[protocol.Write](protocol.Write(key="1.5.0", uids=[]))
    event, skipped = said.get(timeout=60), said.get(timeout=60)
    assert "storage_limit_s=0.05" in event.event.error
    assert (skipped.path, skipped.error) == (None, event.event.error)
    storage.allowed.set()
    stored = said.get(timeout=60)
    assert (stored.path, stored.error) == ("checkpoint_000000005_0", None)
