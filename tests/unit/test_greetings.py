"""Both ends of a connection prove that they know the run's token, and strangers cost little."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from runs import run_of

from raytrain_het.errors import HubError
from raytrain_het.membership import handshake, listener
from raytrain_het.membership.server import Hub
from raytrain_het.membership.wire import connect
from raytrain_het.worker.device_failures import device_has_failed
from raytrain_het.worker.state.state_server import StateServer, ask


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub(*run_of(2))
    yield hub
    hub.shutdown()


def port_of(hub: Hub) -> int:
    return int(hub.address()["port"])


def test_who_knows_the_token_is_let_in_and_nobody_else(hub: Hub) -> None:
    connect("127.0.0.1", port_of(hub), hub.token).close()
    with pytest.raises(OSError, match=".*"):
        connect("127.0.0.1", port_of(hub), "another")


def test_a_member_does_not_take_another_server_for_its_hub() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            caller, _ = server.accept()
            with caller:
                caller.sendall(b"s" * handshake.NONCE_BYTES)
                handshake.receive_exactly(caller, handshake.REPLY_BYTES)
                caller.sendall(b"p" * handshake.PROOF_BYTES)

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(ConnectionError, match="does not know the run's token"):
            connect("127.0.0.1", server.getsockname()[1], "token")
        thread.join()


def test_the_token_is_never_sent() -> None:
    one, other = socket.socketpair()
    heard = bytearray()

    class Overheard:
        def __init__(self, sock: socket.socket) -> None:
            self.sock = sock

        def sendall(self, data: bytes) -> None:
            heard.extend(data)
            self.sock.sendall(data)

        def recv(self, size: int) -> bytes:
            return self.sock.recv(size)

        def gettimeout(self) -> float | None:
            return self.sock.gettimeout()

    thread = threading.Thread(target=handshake.serve, args=(Overheard(one), "the token"))
    thread.start()
    handshake.call(Overheard(other), "the token")  # type: ignore[arg-type]
    thread.join()
    assert b"the token" not in heard
    one.close()
    other.close()


def test_a_stranger_that_sends_much_before_it_has_proved_anything_is_cut_off(hub: Hub) -> None:
    with socket.create_connection(("127.0.0.1", port_of(hub))) as stranger:
        assert any(not _sends(stranger, b"x" * 2**16) for _ in range(10_000))
    connect("127.0.0.1", port_of(hub), hub.token).close()


def _sends(sock: socket.socket, data: bytes) -> bool:
    try:
        sock.sendall(data)
    except OSError:
        return False
    return True


def test_strangers_beyond_a_limit_are_turned_away_and_members_come_in_again(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener, "MAX_STRANGERS", 2)
    strangers = [socket.create_connection(("127.0.0.1", port_of(hub))) for _ in range(2)]
    for stranger in strangers:
        handshake.receive_exactly(stranger, handshake.NONCE_BYTES)  # The hub has taken it up.
    with pytest.raises(OSError, match=".*"):
        connect("127.0.0.1", port_of(hub), hub.token)
    for stranger in strangers:
        stranger.close()
    deadline = time.monotonic() + 20
    while True:
        try:
            connect("127.0.0.1", port_of(hub), hub.token).close()
            break
        except OSError:
            assert time.monotonic() < deadline


def test_a_stranger_that_says_nothing_is_closed_after_a_while(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "LIMIT_S", 0.05)
    with socket.create_connection(("127.0.0.1", port_of(hub)), timeout=20) as stranger:
        handshake.receive_exactly(stranger, handshake.NONCE_BYTES)
        with pytest.raises(OSError, match=".*"):
            handshake.receive_exactly(stranger, 1)


def test_a_state_server_sends_nothing_to_who_does_not_know_the_token() -> None:
    server = StateServer("127.0.0.1", lambda: "token")
    server.offer("value", lambda request: 1)
    assert ask("127.0.0.1", server.port, "token", "value", give_up=lambda: False) == 1
    assert ask("127.0.0.1", server.port, "another", "value", give_up=lambda: False) is None
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as stranger:
        handshake.receive_exactly(stranger, handshake.NONCE_BYTES)
        stranger.sendall(json.dumps({"name": "value"}).encode().ljust(handshake.REPLY_BYTES, b" ")[:48])
        with pytest.raises(OSError, match=".*"):
            handshake.receive_exactly(stranger, 1)
    server.close()


def test_a_hub_that_cannot_listen_says_so_at_once(hub: Hub) -> None:
    with pytest.raises(HubError, match=r"cannot listen on host='127.0.0.1', port=\d+ \(OSError"):
        Hub(*run_of(2), port=port_of(hub))


def test_what_arrives_counts_as_heard_before_what_is_queued_is_decided(hub: Hub) -> None:
    """A backlog of the hub's own is nobody's silence."""
    arrived: list[str] = []
    decided: list[str] = []
    before = hub._switchboard.heard, hub._switchboard.hear
    hub._switchboard.heard = lambda uid: arrived.append(uid)  # type: ignore[method-assign]

    def slow(member: object, message: object) -> None:
        time.sleep(0.02)
        decided.append(getattr(member, "uid", ""))

    hub._switchboard.hear = slow  # type: ignore[method-assign]
    connections = []
    for slot in range(2):
        with socket.create_server(("127.0.0.1", 0)) as server:
            state_port = server.getsockname()[1]
        member = {"uid": f"{slot}-a", "slot": slot, "host": "192.0.2.1", "state_port": state_port, "device": "cpu"}
        cursor = {"epoch": 0, "offset": 0, "step": 0}
        hello = {"type": "hello", "member": member, "cursor": cursor, "healed": False, "fresh": False, "record": None}
        rest = {"answered": 0, "want": 0, "fingerprint": "", "checkpoint": None, "checkpoint_cursor": None}
        connection = connect("127.0.0.1", port_of(hub), hub.token)
        connection._sock.sendall(json.dumps(hello | rest).encode() + b"\n")
        while f"{slot}-a" not in hub._links:
            hub.status()
        connections.append(connection)
    line = json.dumps({"type": "pong", "position": 1}).encode() + b"\n"
    connections[0]._sock.sendall(line * 60)
    deadline = time.monotonic() + 20
    while "0-a" not in decided:
        assert time.monotonic() < deadline
    connections[1]._sock.sendall(line)
    while "1-a" not in arrived:
        assert time.monotonic() < deadline
    assert decided.count("0-a") < 60, "the second member was heard while the first one's messages wait"
    hub._switchboard.heard, hub._switchboard.hear = before  # type: ignore[method-assign]
    for connection in connections:
        connection.close()


@pytest.mark.parametrize(
    ("text", "failed"),
    [
        ("CUDA error: uncorrectable ECC error encountered", True),
        ("CUDA error: all CUDA-capable devices are busy or unavailable", True),
        ("CUDA error: device-side assert triggered", False),
        ("CUDA error: an illegal memory access was encountered", False),
        ("CUDA out of memory.", False),
        ("the loss is lost", False),
    ],
)
def test_a_failed_device_is_told_from_a_failing_program(text: str, failed: bool) -> None:
    assert device_has_failed(RuntimeError(text)) is failed
    assert not device_has_failed(ValueError(text))


def test_who_sends_its_proof_byte_by_byte_holds_a_thread_no_longer_than_the_limit() -> None:
    one, other = socket.socketpair()
    one.settimeout(0.3)
    over = threading.Event()

    def drip() -> None:
        with contextlib.suppress(OSError):
            while not over.wait(0.02):
                other.send(b"x")

    thread = threading.Thread(target=drip)
    thread.start()
    with pytest.raises(TimeoutError):
        handshake.receive_exactly(one, 1 << 20)
    over.set()
    thread.join()
    one.close()
    other.close()
