"""TLS by the certificates that Ray's settings name."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import trustme
from test_hub import Client, make_hub  # noqa: F401
from test_tcp_group import meetings

from raytrain_het.allreduce.transport.building import connect
from raytrain_het.allreduce.transport.group import PeerBuffers
from raytrain_het.allreduce.transport.poller import Poller
from raytrain_het.allreduce.transport.tcp import TcpGroup
from raytrain_het.errors import ConfigError
from raytrain_het.membership import encryption
from raytrain_het.membership.encryption import TlsSocket, secured
from raytrain_het.worker.state.state_server import StateServer, ask

LIMIT_S = 20.0


def certificates(folder: Path, authority: trustme.CA | None = None) -> dict[str, str]:
    """Ray's settings, for a node with a certificate of an authority."""
    authority = authority or trustme.CA()
    node = authority.issue_cert("a-node")
    folder.mkdir(exist_ok=True)
    files = {name: str(folder / name) for name in ("cert", "key", "ca")}
    node.private_key_pem.write_to_path(files["key"])
    node.cert_chain_pems[0].write_to_path(files["cert"])
    authority.cert_pem.write_to_path(files["ca"])
    names = {"RAY_TLS_SERVER_CERT": "cert", "RAY_TLS_SERVER_KEY": "key", "RAY_TLS_CA_CERT": "ca"}
    return {"RAY_USE_TLS": "1"} | {setting: files[name] for setting, name in names.items()}


@pytest.fixture
def encrypted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in certificates(tmp_path / "own").items():
        monkeypatch.setenv(name, value)


@contextlib.contextmanager
def pair() -> Iterator[tuple[TlsSocket, TlsSocket]]:
    """Both ends of an encrypted connection."""
    one, other = socket.socketpair()
    with secured(one, serves=True) as serves, secured(other, serves=False) as calls:
        assert isinstance(serves, TlsSocket) and isinstance(calls, TlsSocket)
        yield serves, calls


def test_one_thread_reads_while_another_one_writes_on_both_ends(encrypted: None) -> None:
    """Each end sends a megabyte in odd parts and receives one at the same time."""
    data = random.Random(0).randbytes(1 << 20)
    received: dict[int, bytes] = {}

    def send(sock: TlsSocket) -> None:
        place, sizes = 0, random.Random(1)
        while place < len(data):
            part = data[place : place + sizes.randint(1, 100_000)]
            sock.sendall(part)
            place += len(part)

    def receive(number: int, sock: TlsSocket) -> None:
        with sock.makefile("rb") as file:
            received[number] = file.read(len(data))

    with pair() as ends:
        for end in ends:
            end.settimeout(LIMIT_S)
        threads = [threading.Thread(target=send, args=(end,)) for end in ends]
        threads += [threading.Thread(target=receive, args=(k, end)) for k, end in enumerate(ends)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LIMIT_S)
    assert received == {0: data, 1: data}


def test_what_travels_is_not_what_was_said(encrypted: None) -> None:
    one, other = socket.socketpair()
    first, second = socket.socketpair()
    carried = bytearray()

    def carry(source: socket.socket, to: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while part := source.recv(65536):
                carried.extend(part)
                to.sendall(part)

    threads = [threading.Thread(target=carry, args=ends) for ends in ((other, first), (first, other))]
    for thread in threads:
        thread.start()
    serves = secured(one, serves=True)
    answers = threading.Thread(target=lambda: serves.recv(100))
    answers.start()
    with secured(second, serves=False) as calls:
        calls.sendall(b"the model's weights")
        answers.join(LIMIT_S)
    serves.close()
    for thread in threads:
        thread.join(LIMIT_S)
    other.close()
    first.close()
    assert len(carried) > 500 and b"weights" not in carried


def test_the_members_of_a_group_exchange_messages_larger_than_any_buffer(encrypted: None) -> None:
    places, size, num_bytes = meetings(3), 3, 3_000_000
    sums: dict[int, list[int]] = {}

    def run(rank: int) -> None:
        sockets = connect(places[rank], rank, size, "127.0.0.1", lambda: True)  # type: ignore[arg-type]
        assert all(isinstance(sock, TlsSocket) for sock in sockets.values())
        group, poller = TcpGroup("g", rank, sockets), Poller()
        group.join(poller)
        lengths = [num_bytes * (k != rank) for k in range(size)]
        for step in range(3):
            out = PeerBuffers(torch.zeros(sum(lengths), dtype=torch.uint8), lengths)
            sent = PeerBuffers(torch.full((sum(lengths),), 10 * rank + step, dtype=torch.uint8), lengths)
            expected = group.expect(out) if step != rank else None
            operation = group.all_to_all(out, sent, expected)
            while not operation.done:
                poller.wait(1.0)
            operation.result()
            sums.setdefault(rank, []).append(int(out.buffer.long().sum()))
        group.leave()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
    expected_of = {
        rank: [sum(num_bytes * (10 * k + step) for k in range(size) if k != rank) for step in range(3)]
        for rank in range(size)
    }
    assert sums == expected_of


def test_a_peer_is_served_a_snapshot(encrypted: None) -> None:
    server = StateServer("127.0.0.1", lambda: "token")
    weights = torch.arange(1_000_000.0)
    server.offer("snapshot", lambda request: {"w": weights, "step": request["step"]})
    got = ask("127.0.0.1", server.port, "token", "snapshot", give_up=lambda: False, step=7)
    server.close()
    assert got is not None and got["step"] == 7
    assert torch.equal(got["w"], weights)


def test_the_hub_speaks_with_its_members_and_with_nobody_of_another_authority(
    encrypted: None,
    make_hub: Any,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hub = make_hub(num_slots=1)
    member = Client(hub, 0)
    assert member.until("record")["record"]["number"] == 1
    for name, value in certificates(tmp_path / "others").items():
        monkeypatch.setenv(name, value)
    with pytest.raises(OSError):
        Client(hub, 0, life="b")
    monkeypatch.delenv("RAY_USE_TLS")
    with pytest.raises(OSError):
        Client(hub, 0, life="c")
    member.die()


def test_certificates_that_cannot_be_read_are_named(monkeypatch: pytest.MonkeyPatch, encrypted: None) -> None:
    monkeypatch.setenv("RAY_TLS_SERVER_KEY", "/nowhere/key.pem")
    with pytest.raises(ConfigError, match="RAY_TLS_SERVER_KEY='/nowhere/key.pem'"):
        encryption.context(serves=True)


@pytest.mark.parametrize("value", ["", "0", "false"])
def test_without_the_setting_a_connection_is_a_plain_one(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("RAY_USE_TLS", value)
    one, other = socket.socketpair()
    assert secured(one, serves=True) is one
    one.close()
    other.close()
    assert "RAY_USE_TLS" in os.environ
