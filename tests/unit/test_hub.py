"""The hub's own part, with members that are no more than a socket: who is told what, and what an error in it does."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import Mock

import pytest
from runs import run_of

from raytrain_het.balance.profile import Measurement, Profile
from raytrain_het.membership.server import Hub
from raytrain_het.membership.wire import connect, encode
from raytrain_het.ray_train import hub as controller

ZERO = {"epoch": 0, "offset": 0, "step": 0}


class Client:
    """A member's connection, read when a test asks for it."""

    def __init__(self, hub: Hub, slot: int, life: str = "a", **values: Any) -> None:
        self.uid, self.slot = f"{slot}-{life}", slot
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.connection = connect("127.0.0.1", hub.address()["port"], hub.token)
        self.messages = (json.loads(encode(message)) for message in self.connection.messages())
        member = {"uid": self.uid, "slot": slot, "host": "127.0.0.1", "device": "cpu"}
        member["state_port"] = self.listener.getsockname()[1]
        hello = {
            "type": "hello",
            "member": member,
            "cursor": ZERO,
            "healed": False,
            "fresh": False,
            "record": None,
            "answered": 0,
            "want": 0,
            "fingerprint": "",
            "checkpoint": None,
            "checkpoint_cursor": None,
            "known": None,
        }
        self.send(hello | values)

    def die(self) -> None:
        """As if its process had ended."""
        self.listener.close()
        self.connection.close()

    def send(self, message: dict[str, Any]) -> None:
        """As it stands on the wire, be it right or wrong."""
        self.connection._sock.sendall(json.dumps(message).encode() + b"\n")

    def tell(self, kind: str, **values: Any) -> None:
        self.send({"type": kind, **values})

    def answer(self, number: int, *, step: int) -> None:
        cursor = ZERO | {"step": step}
        self.tell("answer", number=number, cursor=cursor, healed=True, fresh=False, batch=None)

    def until(self, kind: str) -> dict[str, Any]:
        """The next message of this kind."""
        return next(m for m in self.messages if m["type"] == kind)

    def report(self, key: str, **values: Any) -> None:
        message = {
            "key": key,
            "step": int(key.split(".")[-2]),
            "epoch": 0,
            "metrics": {"loss": 1.0},
            "reduce": {},
            "samples": 8,
            "checkpoint": False,
            "holds_snapshot": False,
        }
        self.tell("report", **(message | values))


@pytest.fixture
def make_hub() -> Iterator[Callable[..., Hub]]:
    hubs: list[Hub] = []

    def make(num_slots: int = 2, **settings: Any) -> Hub:
        hubs.append(Hub(*run_of(num_slots, **settings)))
        return hubs[-1]

    yield make
    for hub in hubs:
        hub.shutdown()


def started(hub: Hub) -> tuple[list[Client], dict[str, Any]]:
    """All members, and the first record."""
    members = [Client(hub, slot) for slot in range(hub.context.num_slots)]
    records = [m.until("record")["record"] for m in members]
    return members, records[0]


def test_two_members_that_wait_for_the_same_checkpoint_leave_when_it_is_stored(make_hub: Any) -> None:
    hub = make_hub()
    (first, second), record = started(hub)
    key = "1.5.0"
    for member in (first, second):
        member.report(key, checkpoint=True, holds_snapshot=True)
        member.tell("leave")
    asked = first.until("write")
    while len(hub._switchboard.reporting.leaving) < 2:
        hub.status()
    first.tell("stored", key=asked["key"], path="path", error=None, cursor=ZERO | {"step": 5})
    for member in (first, second):
        member.answer(member.until("want")["number"], step=5)
    assert [m.until("bye")["how"] for m in (first, second)] == ["left", "left"]
    assert hub.status()["failure"] is None


def test_a_checkpoint_that_a_member_was_asked_for_is_asked_for_again_if_its_connection_was_cut(make_hub: Any) -> None:
    hub = make_hub()
    (first, second), record = started(hub)
    for member in (first, second):
        member.report("1.5.0", checkpoint=True, holds_snapshot=True)
    assert first.until("write")
    first.connection.close()
    again = Client(hub, 0, record=record, cursor=ZERO, healed=True)
    assert again.until("write")["key"] == "1.5.0"


def test_every_member_is_told_of_the_newest_checkpoint_and_a_new_hub_learns_of_it_from_any(make_hub: Any) -> None:
    hub = make_hub()
    (writer, other), record = started(hub)
    cursor = ZERO | {"step": 20}
    writer.tell("stored", key="1.20.0", path="newest", error=None, cursor=cursor)
    told = other.until("checkpoint")
    writer.tell("stored", key="1.10.0", path="older", error=None, cursor=ZERO | {"step": 10})
    hub.slot_lost(0, "its machine is gone")
    assert (told["path"], told["cursor"]) == ("newest", cursor)
    assert Client(hub, 0, "b").until("checkpoint") == told
    new = make_hub()
    Client(new, 1, record=record, cursor=cursor, healed=True, checkpoint=told["path"], checkpoint_cursor=told["cursor"])
    joined = Client(new, 0, "c")
    assert joined.until("checkpoint") == told


def test_what_a_member_says_that_was_let_go_counts_for_nothing(make_hub: Any) -> None:
    hub = make_hub()
    (first, second), record = started(hub)
    key = f"{record['life']}.5.0"
    hub.slot_lost(1, "its machine is gone")
    second.report(key)
    second.tell("stored", key=key, path="path", error=None, cursor=ZERO | {"step": 5})
    second.die()
    while second.uid in hub._links:
        hub.status()
    first.answer(first.until("void")["number"], step=5)
    first.until("record")
    first.report(key)
    while not (whole := hub.take_reports()):
        pass
    assert [r["num_workers"] for r in whole] == [1]
    assert 0 <= time.time() - whole[0]["time"] < 60
    assert hub._switchboard.core.run.checkpoint is None


@pytest.mark.parametrize("name", ["tick", "pong"])
def test_an_error_in_the_logic_fails_the_run_and_everybody_is_told(
    make_hub: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    hub = make_hub()
    (first, second), _ = started(hub)

    def fail(*args: Any) -> None:
        raise KeyError("what is not there")

    monkeypatch.setattr(hub._switchboard.core, name, fail)
    first.tell("pong", position=1)
    for member in (first, second):
        assert "KeyError: 'what is not there'" in member.until("fail")["message"]
    assert hub.status()["state"] == "failed"
    assert "Traceback" in caplog.text
    assert Client(hub, 1, "b").until("fail"), "whoever comes later is told too"


def test_a_message_that_the_hub_cannot_take_names_its_worker_and_its_kind(make_hub: Any) -> None:
    hub = make_hub()
    (first, second), _ = started(hub)
    second.tell("report", key="1.5.0", step="five")
    message = first.until("fail")["message"]
    assert "when worker 1 told it 'report'" in message
    assert hub.status()["state"] == "failed"


def test_a_report_that_only_one_worker_makes_fails_the_run_unless_something_has_happened_before(make_hub: Any) -> None:
    told = {"life": 0, "began": 0, "step": 6, "reported": None, "complete": False}
    for disturbed in (False, True):
        hub = make_hub()
        (first, second), record = started(hub)
        told["life"] = record["life"]
        hub._switchboard.core.run.disturbed = disturbed
        second.tell("stats", step=6, told=told)
        first.report(f"{record['life']}.5.0", at="train.py:7")
        if not disturbed:
            assert "report() was called at step 5 at train.py:7 by worker 0" in first.until("fail")["message"]
            assert hub.take_reports() == []
            continue
        while not (whole := hub.take_reports()):
            pass
        assert [r["num_workers"] for r in whole] == [1]
        (warning,) = [e for e in hub.events(0) if e["kind"] == "warning"]
        assert "worker 1 has gone on to step 6 without it" in warning["text"]
        assert hub.status()["failure"] is None


@pytest.mark.parametrize("line", [b"no json\n", b"[]\n", b'{"type": "po'])
def test_a_torn_message_costs_its_connection_and_nothing_else(make_hub: Any, line: bytes) -> None:
    hub = make_hub()
    (first, second), _ = started(hub)
    second.connection._sock.sendall(line)
    second.die()
    assert first.until("void")
    assert hub.status()["failure"] is None


def hardware(name: str, gflops: float, *, bandwidth: float | None = 1e9) -> dict[str, Any]:
    """What a member's hello says of it."""
    profile = Profile(
        hardware=name,
        device="cpu",
        cores=1,
        num_threads=1,
        flops={"fp32": Measurement(gflops * 1e9, 0.0, 5)},
        memory_bandwidth=Measurement(bandwidth, 0.0, 5) if bandwidth else None,
    )
    return {"profile": profile.to_json(), "global_batch_size": 100}


def test_a_policy_that_fails_at_the_start_ends_the_run_with_the_worker_and_its_error(make_hub: Any) -> None:
    hub = make_hub(shares="auto", score_policy=lambda p: p.host_to_device.median)
    members = [Client(hub, slot, known=hardware("x", 1)) for slot in range(2)]
    message = members[0].until("fail")["message"]
    assert "worker 0 (x, cpu) with AttributeError" in message
    assert "membership actor" not in message


def healed(first: Client, joined: Client) -> dict[str, Any]:
    """The record in which a newcomer has its share, after it has healed."""
    first.answer(first.until("want")["number"], step=5)
    joined.until("record")
    joined.tell("healed")
    number = first.until("want")["number"]
    first.answer(number, step=5)
    joined.tell("answer", number=number, cursor=ZERO | {"step": 5}, healed=True, fresh=True, batch=None)
    return joined.until("record")["record"]


def test_other_hardware_in_a_slot_has_its_own_share_once_it_is_healed(make_hub: Any) -> None:
    hub = make_hub(shares="auto", score_policy="flops")
    first, second = [Client(hub, slot, known=hardware("x", 1)) for slot in range(2)]
    first.until("record")
    second.die()
    first.answer(first.until("void")["number"], step=5)
    record = healed(first, Client(hub, 1, "b", known=hardware("y", 3)))
    assert (record["table"], record["speeds"], record["shares"]) == (2, [0.5, 1.5], [25.0, 75.0])


def test_a_restarted_hub_goes_on_counting_tables_when_somebody_comes(make_hub: Any) -> None:
    hub = make_hub(num_slots=1, shares="auto", score_policy="flops")
    first = Client(hub, 0, known=hardware("x", 1))
    record = first.until("record")["record"]
    new = make_hub(num_slots=2, shares="auto", score_policy="flops")
    first = Client(new, 0, record=record, cursor=ZERO | {"step": 5}, healed=True, known=hardware("x", 1))
    record = healed(first, Client(new, 1, known=hardware("y", 3)))
    assert (record["table"], record["speeds"]) == (2, [0.5, 1.5])


def test_a_policy_that_fails_on_a_newcomer_leaves_the_run_and_its_table_as_they_are(make_hub: Any) -> None:
    hub = make_hub(shares="auto", score_policy=lambda p: p.memory_bandwidth.median)
    first, second = [Client(hub, slot, known=hardware("x", 1)) for slot in range(2)]
    assert first.until("record")["record"]["table"] == 1
    second.die()
    first.answer(first.until("void")["number"], step=5)
    record = healed(first, Client(hub, 1, "b", known=hardware("y", 9, bandwidth=None)))
    assert (record["table"], record["shares"]) == (1, [50.0, 50.0])
    (kept,) = [e for e in hub.events(0) if e["kind"] == "table_kept"]
    assert "worker 1 (y, cpu)" in kept["reason"]
    assert hub.status()["failure"] is None


def tell_of_steps(
    hub: Hub, members: list[Client], own_s: tuple[float, ...], samples: tuple[int, ...], *, step: int = 5
) -> None:
    """Some steps of each, and until the hub has heard of them."""
    for member, seconds, b in zip(members, own_s, samples, strict=True):
        member.tell("timing", global_batch_size=100, steps=[[b, seconds, max(own_s)]] * 5)
        member.tell("stats", step=step)
    while sum(m.get("step", 0) == step for m in hub.status()["members"]) < len(members):
        pass


def test_a_scale_that_no_number_holds_leaves_the_run_as_it_is_and_is_told_once(make_hub: Any) -> None:
    hub = make_hub(alpha=500.0, shares=(1.0, 1.0))
    members, _ = started(hub)
    for step in (5, 10, 15):
        tell_of_steps(hub, members, (0.05, 1.0), (50, 50), step=step)
    kept = [e for e in hub.events(0) if e["kind"] == "table_kept"]
    assert len(kept) == 1
    assert "alpha=500.0" in kept[0]["reason"]
    assert hub.status()["failure"] is None


def test_a_warm_spare_does_not_count_in_the_fraction_of_the_aggregate(make_hub: Any) -> None:
    hub = make_hub(num_slots=3, shares=(1.0, 1.0, 0.0))
    members, _ = started(hub)
    tell_of_steps(hub, members, (0.05, 0.05, 0.03), (50, 50, 2))
    assert hub.status()["fraction_of_aggregate"] == pytest.approx(1.0)


@pytest.mark.parametrize(("normalisation", "expected"), [("mean", 100), ("none", 64)])
def test_the_effective_batch_size_is_that_of_the_sum_that_is_taken(
    make_hub: Any, normalisation: str, expected: int
) -> None:
    hub = make_hub(shares=(4.0, 1.0), lr_scale_normalisation=normalisation)
    members, _ = started(hub)
    tell_of_steps(hub, members, (0.05, 0.05), (80, 20))
    assert hub.status()["effective_batch_size"] == pytest.approx(expected)


def test_the_controller_remembers_the_last_acknowledged_reports_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controller, "MAX_ACKNOWLEDGED", 3)
    hub = object.__new__(controller.HubActor)
    hub.handle, hub._acknowledged = Mock(), {}
    for step in range(8):
        hub.acknowledge([f"1.{step}.0"])
    assert list(hub._acknowledged) == ["1.5.0", "1.6.0", "1.7.0"]
    assert hub.handle.acknowledge.remote.call_count == 8


def test_members_that_tell_unlike_audits_are_told_what_differs(make_hub: Any) -> None:
    hub = make_hub()
    members, record = started(hub)
    for member, digest in zip(members, "ab", strict=True):
        audit = {"kind": "k", "numbers": [], "tensors": [["w", digest]], "samples": {"w": [[1.0], None]}}
        member.tell("audit", step=4, part=0, generation=record["number"], audit=audit)
    assert all("after step 4 w is another one" in member.until("mismatch")["message"] for member in members)
