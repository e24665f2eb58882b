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
"""Once the transfers of one direction have taken so long, no more follow: a slow link is not measured for minutes."""

_REQUEST = struct.Struct("!cI")
"""A request and a number of bytes. ``>``: the server reads them, then answers with a byte. ``<``: it sends them."""

T = TypeVar("T")
Address = tuple[str, int]


@dataclass(frozen=True)
class Link:
    """The measured link between two machines."""

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
        host: The address to listen on, by which peers reach this machine.
    """

    def __init__(self, host: str) -> None:
        try:
            self._socket = socket.create_server((host, 0))
        except OSError:  # Behind address translation no interface of the machine has this address.
            self._socket = socket.create_server(("", 0))
        self.address: Address = (host, self._socket.getsockname()[1])
        self._thread = threading.Thread(target=self._serve, name="link-probe", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop answering."""
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
    """Measure the link to a :class:`LinkServer`: round trips of a few bytes, and transfers of 4 MiB each way.

    Raises:
        OSError: Nothing answers there, or not within ``TIMEOUT_S``.
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
    """A machine's end of its links, in this process or in another."""

    def listen(self) -> Address:
        """Start a :class:`LinkServer` there, unless it runs already; returns its address."""

    def link_to(self, address: Address) -> Link | None:
        """:func:`probe_link` from there; None if it fails."""


def probe_links(members: Sequence[LinkEnd]) -> dict[tuple[int, int], Link | None]:
    """Measure each member's link to the next one in a ring. They take turns, since links may share a wire.

    Returns:
        The links, by the positions of their two ends. Two members have one link, a single member has none. None stands
        for a link that could not be measured.
    """
    if len(members) < 2:
        return {}
    ring = [(i, (i + 1) % len(members)) for i in range(len(members) if len(members) > 2 else 1)]
    return {(i, j): members[i].link_to(members[j].listen()) for i, j in ring}


def slowest_link(member: T, links: Mapping[tuple[T, T], Link | None]) -> tuple[float, float] | None:
    """A member's worst latency, in seconds of a round trip, and worst bandwidth, in bytes per second.

    None if none of its links was measured.
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
        # The time that the answer takes to come back is taken off.
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
