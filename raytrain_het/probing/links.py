"""Measurements between two machines, over TCP: latency, and bandwidth each way."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from raytrain_het.balance.profile import Measurement

ROUND_TRIPS = 50
TRANSFERS = 5
TRANSFER_BYTES = 4 * 2**20
TIMEOUT_S = 10.0
TRANSFERS_S = 1.0
"""A slow link has no more transfers in a direction once they have taken so long together."""

_REQUEST = struct.Struct("!cI")
"""What to do, and with how many bytes: ``>`` takes them in, ``<`` sends them, each answered or begun at once."""

T = TypeVar("T")
Address = tuple[str, int]


@dataclass(frozen=True)
class Link:
    """From one member to another."""

    latency_s: Measurement
    """Seconds of a round trip of a few bytes."""
    send: Measurement
    """Bytes per second to the other."""
    receive: Measurement
    """Bytes per second from the other."""

    @property
    def bandwidth(self) -> float:
        """The slower direction, bytes per second."""
        return min(self.send.median, self.receive.median)


class LinkServer:
    """Answers :func:`probe_link` on a port of its own until it is closed, one caller at a time.

    Args:
        host: the address to listen on: the one by which peers reach this machine.
    """

    def __init__(self, host: str) -> None:
        try:
            self._socket = socket.create_server((host, 0))
        except OSError:  # Behind address translation a machine does not have the address by which it is reached.
            self._socket = socket.create_server(("", 0))
        self.address: Address = (host, self._socket.getsockname()[1])
        self._thread = threading.Thread(target=self._serve, name="link-probe", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """No further callers."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # Wakes `accept`, which `close` alone does not.
        self._socket.close()
        self._thread.join(TIMEOUT_S)

    def _serve(self) -> None:
        while True:
            try:
                caller, _ = self._socket.accept()
            except OSError:
                return
            with caller, contextlib.suppress(OSError, struct.error):
                _set_up(caller)
                while True:
                    what, size = _REQUEST.unpack(_read(caller, _REQUEST.size))
                    if what == b">":
                        _skip(caller, size)
                        caller.sendall(b"!")
                    elif what == b"<":
                        caller.sendall(bytes(min(size, TRANSFER_BYTES)))
                    else:
                        break


def probe_link(address: Address) -> Link:
    """Measure the link to a :class:`LinkServer`: the round trips' median, and transfers of 4 MiB each way.

    Raises:
        OSError: nobody answers there, or not within ``TIMEOUT_S``.
    """
    with socket.create_connection(address, timeout=TIMEOUT_S) as peer:
        _set_up(peer)

        def send(size: int) -> None:
            peer.sendall(_REQUEST.pack(b">", size) + bytes(size))
            _read(peer, 1)

        def receive(size: int) -> None:
            peer.sendall(_REQUEST.pack(b"<", size))
            _skip(peer, size)

        for _ in range(3):
            send(1)
        latency = Measurement.of([_timed(send, 1) for _ in range(ROUND_TRIPS)])
        return Link(latency, *(_speed(transfer, latency.median) for transfer in (send, receive)))


class LinkEnd(Protocol):
    """One end of links, here or in another process."""

    def listen(self) -> Address:
        """Start a :class:`LinkServer` there, unless there is one."""

    def link_to(self, address: Address) -> Link | None:
        """:func:`probe_link` from there; None if it fails."""


def probe_links(members: Sequence[LinkEnd]) -> dict[tuple[int, int], Link | None]:
    """Each member's link with the next in a ring, one after another, since they may share a wire.

    By positions of its two ends. Two members have one link, a single one has none; None stands for a link over which
    nothing comes.
    """
    if len(members) < 2:
        return {}
    ring = [(i, (i + 1) % len(members)) for i in range(len(members) if len(members) > 2 else 1)]
    return {(i, j): members[i].link_to(members[j].listen()) for i, j in ring}


def slowest_link(member: T, links: Mapping[tuple[T, T], Link | None]) -> tuple[float, float] | None:
    """A member's latency, seconds of a round trip, and bandwidth, bytes per second: the worst of its links.

    None if nothing is known of them.
    """
    own = [link for ends, link in links.items() if member in ends and link is not None]
    if not own:
        return None
    return max(link.latency_s.median for link in own), min(link.bandwidth for link in own)


def _speed(transfer: Callable[[int], None], latency_s: float) -> Measurement:
    transfer(TRANSFER_BYTES // 4)  # Opens the congestion window.
    speeds: list[float] = []
    began = time.perf_counter()
    while len(speeds) < TRANSFERS and (not speeds or time.perf_counter() - began < TRANSFERS_S):
        # The answer's way back is no part of the transfer.
        elapsed = _timed(transfer, TRANSFER_BYTES)
        speeds.append(TRANSFER_BYTES / max(elapsed - latency_s, elapsed / 10))
    return Measurement.of(speeds)


def _timed(transfer: Callable[[int], None], size: int) -> float:
    began = time.perf_counter()
    transfer(size)
    return time.perf_counter() - began


def _set_up(peer: socket.socket) -> None:
    peer.settimeout(TIMEOUT_S)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _read(peer: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = peer.recv(size - len(data))
        if not part:
            raise ConnectionResetError("the peer has closed")
        data += part
    return data


def _skip(peer: socket.socket, size: int) -> None:
    buffer = bytearray(min(max(size, 1), 2**18))
    while size > 0:
        got = peer.recv_into(buffer, min(size, len(buffer)))
        if not got:
            raise ConnectionResetError("the peer has closed")
        size -= got
