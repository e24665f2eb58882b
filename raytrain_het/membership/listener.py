"""The hub's end of its members' connections: lines come in, are dated when they arrive, and wait in one queue.

Reading is apart from deciding. What a member has sent counts as heard when it arrives, however much there is to decide
before it; after each message the sockets are looked at again. A member that sends faster than the hub decides is not
read for a while, so that no queue grows without end.
"""

from __future__ import annotations

import asyncio
import collections
import logging
from collections.abc import Callable
from typing import Any

from raytrain_het.membership.handshake import LIMIT_S, MAX_STRANGERS, REPLY_BYTES, Challenge
from raytrain_het.membership.wire import MAX_LINE_BYTES, tune

logger = logging.getLogger("raytrain_het")

MAX_WAITING_BYTES = 32 * 1024 * 1024
"""So much of one member's may wait to be decided."""


class Link(asyncio.Protocol):
    """One connection. Used by the hub's thread only.

    Args:
        inbox: where its lines go.
        token: the run's.
    """

    def __init__(self, inbox: Inbox, token: str) -> None:
        self.member: Any = None
        """Who is at its other end, once that has said hello."""
        self._inbox, self._token = inbox, token
        self._challenge: Challenge | None = Challenge()
        self._received = bytearray()
        self._waiting_bytes = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Somebody calls."""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        if not self._inbox.admits():
            transport.abort()
            return
        tune(transport.get_extra_info("socket"))
        self._inbox.strangers.add(self)
        self._limit = asyncio.get_running_loop().call_later(LIMIT_S, self._turn_away)
        if self._challenge is not None:
            transport.write(self._challenge.nonce)

    def data_received(self, data: bytes) -> None:
        """Bytes have arrived."""
        self._received += data
        if self._challenge is not None and not self._is_proved(self._challenge):
            return
        if self.member is not None:
            self._inbox.on_arrival(self)
        *lines, rest = self._received.split(b"\n")
        self._received = bytearray(rest)
        for line in lines:
            self._waiting_bytes += len(line)
            self._inbox.put(self, bytes(line))
        if len(rest) > MAX_LINE_BYTES:
            logger.warning("a message to the membership actor has over %d bytes: its connection is closed", len(rest))
            self.transport.abort()
        elif self._waiting_bytes > MAX_WAITING_BYTES:
            self.transport.pause_reading()

    def taken(self, line: bytes) -> None:
        """One of its lines was decided."""
        self._waiting_bytes -= len(line)
        if self._waiting_bytes <= MAX_WAITING_BYTES // 2 and not self.transport.is_closing():
            self.transport.resume_reading()

    def connection_lost(self, error: Exception | None) -> None:
        """It is closed; what it has brought is decided first."""
        self._is_no_stranger()
        self._inbox.put(self, None)

    def _is_proved(self, challenge: Challenge) -> bool:
        """Whether the caller has proved that it belongs to the run; what it sent for that is taken off."""
        if len(self._received) < REPLY_BYTES:
            return False
        reply = bytes(self._received[:REPLY_BYTES])
        del self._received[:REPLY_BYTES]
        answer = challenge.answer(reply, self._token)
        if answer is None:
            self._turn_away()
            return False
        self._challenge = None
        self._is_no_stranger()
        self.transport.write(answer)
        return True

    def _is_no_stranger(self) -> None:
        if self in self._inbox.strangers:
            self._inbox.strangers.discard(self)
            self._limit.cancel()

    def _turn_away(self) -> None:
        self.transport.abort()


class Inbox:
    """The lines of all connections, in the order in which they came.

    Args:
        on_line: decides one; None is the end of a connection.
        on_arrival: told at once when something arrives from a member.
    """

    def __init__(self, on_line: Callable[[Link, bytes | None], None], on_arrival: Callable[[Link], None]) -> None:
        self.on_arrival = on_arrival
        self.strangers: set[Link] = set()
        """Connections whose caller has yet to prove itself."""
        self._on_line = on_line
        self._lines: collections.deque[tuple[Link, bytes | None]] = collections.deque()
        self._works = False

    def admits(self) -> bool:
        """Whether there is room for another stranger."""
        return len(self.strangers) < MAX_STRANGERS

    def put(self, link: Link, line: bytes | None) -> None:
        """A line has come."""
        self._lines.append((link, line))
        if not self._works:
            self._works = True
            asyncio.get_running_loop().call_soon(self._work)

    def _work(self) -> None:
        """Decide one line. The next one's turn comes after the sockets were looked at."""
        link, line = self._lines.popleft()
        try:
            self._on_line(link, line)
            if line is not None:
                link.taken(line)
        finally:
            self._works = bool(self._lines)
            if self._works:
                asyncio.get_running_loop().call_soon(self._work)
