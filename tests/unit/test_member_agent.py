"""A member's side of membership against a hub that says what a test wants: nothing is lost, and nobody goes deaf."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from collectives_fakes import record_of

from raytrain_het.errors import EvictedError, RunFailedError
from raytrain_het.membership import handshake, wire
from raytrain_het.membership.agent import MemberAgent
from raytrain_het.membership.cursor import Cursor
from raytrain_het.membership.protocol import Acknowledged, Evaluate, Hello, Message, Reply
from raytrain_het.membership.record import Member
from raytrain_het.membership.wire import Connection

PATIENCE_S = 20.0


class ScriptedHub:
    """Accepts connections and reads and writes when a test asks for it."""

    def __init__(self) -> None:
        self.server = socket.create_server(("127.0.0.1", 0))
        self.server.settimeout(PATIENCE_S)

    def locate(self) -> dict[str, Any]:
        return {"host": "127.0.0.1", "port": self.server.getsockname()[1], "token": "t"}

    def accept(self) -> dict[str, Any]:
        """The hello of the next connection."""
        self.peer, _ = self.server.accept()
        self.peer.settimeout(PATIENCE_S)
        handshake.serve(self.peer, "t")
        self.lines = self.peer.makefile("rb")
        return self.read()

    def read(self) -> dict[str, Any]:
        return json.loads(self.lines.readline())

    def say(self, kind: str, **values: Any) -> None:
        self.peer.sendall(json.dumps({"type": kind, **values}).encode() + b"\n")

    def hang_up(self) -> None:
        self.lines.close()
        self.peer.close()


@pytest.fixture
def hub() -> Iterator[ScriptedHub]:
    hub = ScriptedHub()
    yield hub
    hub.server.close()


@pytest.fixture
def agent(hub: ScriptedHub) -> Iterator[MemberAgent]:
    agent = MemberAgent(Member(uid="0-a", slot=0, host="h", state_port=1, device="cpu"), hub.locate)
    yield agent
    agent.close()


def in_thread(fn: Callable[[], Any]) -> threading.Thread:
    thread = threading.Thread(target=fn, daemon=True)
    thread.start()
    return thread


def test_an_error_of_the_listening_thread_is_raised_where_a_worker_waits(hub: ScriptedHub, agent: MemberAgent) -> None:
    def fail(message: Acknowledged) -> None:
        raise ZeroDivisionError("in a handler")

    agent.on_message[Acknowledged] = fail
    agent.join()
    hub.accept()
    hub.say("acknowledged", keys=[])
    with pytest.raises(RunFailedError, match="worker 0 .* ZeroDivisionError: in a handler") as caught:
        agent.wait_for(lambda: False, timeout=PATIENCE_S)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert hub.lines.readline() == b"", "to the hub it is dead, not silent"


def test_what_is_told_while_the_connection_is_made_is_not_lost(
    hub: ScriptedHub, agent: MemberAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The moment between a hello that says nothing of it yet and the connection through which it is told."""
    answering: list[threading.Thread] = []

    class Slow(Connection):
        def send(self, message: Message) -> None:
            super().send(message)
            if isinstance(message, Hello):
                answering.append(in_thread(lambda: agent.answer_want(7)))
                answering[0].join(0.1)

    monkeypatch.setattr(wire, "Connection", Slow)
    agent.join()
    assert hub.accept()["answered"] == 0
    answer = hub.read()
    assert (answer["type"], answer["number"]) == ("answer", 7)
    answering[0].join(PATIENCE_S)


def test_the_newest_checkpoint_is_in_every_members_hello(hub: ScriptedHub, agent: MemberAgent) -> None:
    agent.join()
    assert hub.accept()["checkpoint"] is None
    cursor = {"epoch": 1, "offset": 0, "step": 20}
    hub.say("checkpoint", path="path", cursor=cursor)
    hub.hang_up()
    hello = hub.accept()
    assert (hello["checkpoint"], hello["checkpoint_cursor"]) == ("path", cursor)


def test_a_reply_that_nobody_waits_for_any_more_is_dropped(hub: ScriptedHub, agent: MemberAgent) -> None:
    agent.join()
    hub.accept()
    agent.wait_for(lambda: agent._connection is not None, PATIENCE_S)
    replies: list[Any] = []
    first = in_thread(lambda: replies.append(agent.request(Evaluate(key="k", num_chunks=2))))
    lost = hub.read()["id"]
    hub.hang_up()
    first.join(PATIENCE_S)
    hub.accept()
    agent.wait_for(lambda: agent._connection is not None, PATIENCE_S)
    second = in_thread(lambda: replies.append(agent.request(Evaluate(key="k", num_chunks=2))))
    number = hub.read()["id"]
    hub.say("reply", id=lost, chunk=0)
    hub.say("reply", id=number, chunk=1)
    second.join(PATIENCE_S)
    assert replies == [None, Reply(id=number, chunk=1)]
    assert agent._replies == {}


def test_a_commit_wakes_those_who_wait_for_its_step(agent: MemberAgent) -> None:
    looked = threading.Event()

    def committed() -> bool:
        looked.set()
        return agent.cursor.step == 5

    agent.record = record_of([1.0], number=3)
    waiting = in_thread(lambda: agent.wait_for(committed))
    assert looked.wait(PATIENCE_S)
    with agent.committing(3) as allowed:
        assert allowed
        agent.advance(Cursor(step=5))
    waiting.join(PATIENCE_S)
    assert not waiting.is_alive()


def test_a_member_that_does_not_reach_the_hub_for_the_hang_limit_goes_by_itself(hub: ScriptedHub) -> None:
    member = Member(uid="0-a", slot=0, host="h", state_port=1, device="cpu")
    agent = MemberAgent(member, hub.locate, hang_limit_s=0.2)
    agent.record = record_of([1.0])
    agent.join()
    hub.accept()
    hub.server.close()
    hub.hang_up()
    with pytest.raises(EvictedError, match="worker 0 has not reached the membership actor for 0 s"):
        agent.wait_for(lambda: False, timeout=PATIENCE_S)
    agent.close()
