"""How the members of a generation connect, each with each. A helper thread does it, since a peer may not answer."""

from __future__ import annotations

import contextlib
import functools
import math
import secrets
import selectors
import socket
import struct
import threading
import time
from collections.abc import Callable

import torch

from raytrain_het.allreduce.transport.group import Group, GroupError
from raytrain_het.allreduce.transport.nccl import NcclGroup
from raytrain_het.allreduce.transport.tcp import TcpGroup
from raytrain_het.membership import handshake
from raytrain_het.membership.encryption import Socket, TlsSocket, secured
from raytrain_het.membership.meeting import Meeting

_RANK = struct.Struct("<I")
"""Of the member that connects; it says that before it proves that it knows the group's secret."""
_REPLY_BYTES = _RANK.size + handshake.REPLY_BYTES
_LOOK_S = 0.05
"""How often a wait looks whether the group is still wanted."""
_CONNECT_S = 5.0
"""A host that does not answer for so long is taken for gone."""


def connect(meeting: Meeting, rank: int, size: int, host: str, wanted: Callable[[], bool]) -> dict[int, Socket]:
    """A connection with every other member, by rank. Higher ranks connect to lower ones.

    Args:
        meeting: where members publish their addresses, and learn a secret that strangers do not know.
        rank: of this member.
        size: number of members.
        host: this member's address for others.
        wanted: whether to go on waiting.

    Raises:
        GroupError: a member has gone, or the group is not wanted any more.
    """
    sockets: dict[int, Socket] = {}
    try:
        family = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][0]
        with socket.create_server((host, 0), family=family, backlog=size) as listener:
            if rank == 0:
                meeting.set("secret", secrets.token_hex(16).encode())
            meeting.set(f"{rank}", f"{host} {listener.getsockname()[1]}")
            with contextlib.closing(_Greetings(listener, meeting.get("secret").decode())) as greetings:
                for peer in range(rank):
                    address, port = meeting.get(f"{peer}").decode().split()
                    sock = _called((address, int(port)), wanted)
                    greetings.begin(secured(sock, serves=False), _Called(peer, rank))
                while len(sockets) < size - 1:
                    if not wanted():
                        raise GroupError("the group is not wanted any more")
                    sockets.update(greetings.ended(_LOOK_S))
    except BaseException as error:
        for made in sockets.values():
            made.close()
        if isinstance(error, OSError):
            raise GroupError(f"members cannot connect: {error}") from error
        raise
    return sockets


def _called(address: tuple[str, int], wanted: Callable[[], bool]) -> socket.socket:
    """A connection to a member. A route that fails for a moment is tried again: else one generation after the other
    would fail within milliseconds.

    Raises:
        OSError: there is none within :data:`_CONNECT_S`, or the group is not wanted any more.
    """
    until = time.monotonic() + _CONNECT_S
    while True:
        try:
            return socket.create_connection(address, timeout=_CONNECT_S)
        except OSError:
            if time.monotonic() > until or not wanted():
                raise
            time.sleep(_LOOK_S)


class _Called:
    """A member of a lower rank, which this one has called.

    Args:
        rank: the member's.
        own_rank: this member's.
    """

    until, first = math.inf, b""

    def __init__(self, rank: int, own_rank: int) -> None:
        self._rank, self._own_rank = rank, own_rank
        self._call: handshake.Call | None = None

    @property
    def awaited(self) -> int:
        """Bytes that it sends next."""
        return handshake.NONCE_BYTES if self._call is None else handshake.PROOF_BYTES

    def hear(self, said: bytes, secret: str) -> tuple[bytes, int | None]:
        """What to send it, and its rank once it has proved itself.

        Raises:
            OSError: it is no member, or it is gone.
        """
        if len(said) < self.awaited:
            raise ConnectionError(f"the connection to rank {self._rank} was closed")
        if self._call is None:
            self._call = handshake.Call(said, secret)
            return _RANK.pack(self._own_rank) + self._call.reply, None
        if not self._call.is_proved_by(said):
            raise ConnectionError(f"who answers for rank {self._rank} does not know the group's secret")
        return b"", self._rank


class _Caller:
    """Somebody who has called: a member of a higher rank, or a stranger."""

    awaited = _RANK.size + handshake.REPLY_BYTES

    def __init__(self) -> None:
        self._challenge = handshake.Challenge()
        self.first = self._challenge.nonce
        self.until = time.monotonic() + handshake.LIMIT_S

    def hear(self, said: bytes, secret: str) -> tuple[bytes, int | None]:
        """As :meth:`_Called.hear`; no rank for a stranger."""
        if len(said) < self.awaited:
            return b"", None
        answer = self._challenge.answer(said[_RANK.size :], secret)
        return (answer, int(_RANK.unpack_from(said)[0])) if answer is not None else (b"", None)


class _Greeting:
    """One connection whose ends are to prove themselves to each other. It never waits.

    Args:
        sock: the connection.
        other: who is at its other end.
        secret: the group's.
    """

    def __init__(self, sock: Socket, other: _Called | _Caller, secret: str) -> None:
        self.sock, self.other, self._secret = sock, other, secret
        self._said, self._unsent = b"", other.first
        self.rank: int | None = None
        """The other end's, once it has proved itself."""
        self.is_over = False
        sock.setblocking(False)
        if isinstance(sock, TlsSocket):
            sock.greet()
        self._flush()

    def go_on(self) -> None:
        """Something has come, perhaps.

        Raises:
            OSError: a member that was called is none, or is gone.
        """
        while not self.is_over:
            self._flush()
            try:
                part = self.sock.recv(self.other.awaited - len(self._said))
            except BlockingIOError:
                self._flush()  # TLS may have come along.
                return
            except OSError:
                part = b""
            self._said += part
            if part and len(self._said) < self.other.awaited:
                continue
            self._unsent, self.rank = self.other.hear(self._said, self._secret)
            self._said = b""
            self._flush()
            self.is_over = self.rank is not None or isinstance(self.other, _Caller)

    def _flush(self) -> None:
        """Some bytes, for which a new connection has room; where it has failed it shows when it is read."""
        with contextlib.suppress(OSError):
            while self._unsent:
                self._unsent = self._unsent[self.sock.send(self._unsent) :]


class _Greetings:
    """All of one group. None of them delays another one."""

    def __init__(self, listener: socket.socket, secret: str) -> None:
        self._listener, self._secret = listener, secret
        self._under_way: set[_Greeting] = set()
        self._selector = selectors.DefaultSelector()
        listener.setblocking(False)
        self._selector.register(listener, selectors.EVENT_READ)

    def begin(self, sock: Socket, other: _Called | _Caller) -> None:
        """A connection is there."""
        greeting = _Greeting(sock, other, self._secret)
        self._under_way.add(greeting)
        self._selector.register(sock, selectors.EVENT_READ, greeting)

    def ended(self, timeout_s: float) -> dict[int, Socket]:
        """Members that have proved themselves, by rank.

        Raises:
            OSError: a member that was called has not.
        """
        members = {}
        for key, _ in self._selector.select(timeout_s):
            greeting: _Greeting | None = key.data
            if greeting is None:
                self._admit()
                continue
            greeting.go_on()
            if greeting.is_over:
                self._forget(greeting)
                if greeting.rank is not None:
                    members[greeting.rank] = greeting.sock
                else:
                    greeting.sock.close()
        now = time.monotonic()
        for late in [greeting for greeting in self._under_way if now > greeting.other.until]:
            self._forget(late)
            late.sock.close()
        return members

    def close(self) -> None:
        """Close the connections of all that have not proved themselves."""
        for greeting in self._under_way:
            greeting.sock.close()
        self._selector.close()

    def _admit(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError:  # It has gone again.
            return
        if sum(isinstance(greeting.other, _Caller) for greeting in self._under_way) >= handshake.MAX_STRANGERS:
            sock.close()
            return
        self.begin(secured(sock, serves=True), _Caller())

    def _forget(self, greeting: _Greeting) -> None:
        self._selector.unregister(greeting.sock)
        self._under_way.discard(greeting)


class GroupBuilder:
    """Makes a group in a helper thread.

    Args:
        key: names the group.
        meeting: where its members publish their addresses.
        rank: of this member.
        size: number of members.
        host: this member's address for others.
        device: where messages are.
        wake: called from the helper thread when the group, or an error, is there.
    """

    def __init__(
        self,
        key: str,
        meeting: Meeting,
        rank: int,
        size: int,
        host: str,
        device: torch.device,
        wake: Callable[[], None],
    ) -> None:
        self.group: Group | None = None
        self.error: Exception | None = None
        self._wanted = True
        self._lock = threading.Lock()
        self._meeting, self._wake = meeting, wake
        self._make = functools.partial(self._connected_group, key, rank, size, host, device)
        threading.Thread(target=self._run, name="het-group", daemon=True).start()

    @property
    def done(self) -> bool:
        """Whether there is a group or an error."""
        return self.group is not None or self.error is not None

    def abandon(self) -> None:
        """The group is not wanted any more. The helper thread drops it when it is there."""
        self._meeting.abandon()
        with self._lock:
            self._wanted = False
            if self.group is not None:
                self.group.leave()

    def _connected_group(self, key: str, rank: int, size: int, host: str, device: torch.device) -> Group:
        if device.type == "cuda":
            return NcclGroup(key, self._meeting, rank, size, device)
        return TcpGroup(key, rank, connect(self._meeting, rank, size, host, lambda: self._wanted))

    def _run(self) -> None:
        try:
            group = self._make()
        except Exception as error:
            self.error = error
        else:
            with self._lock:
                self.group = group
                if not self._wanted:
                    group.leave()
        self._wake()
