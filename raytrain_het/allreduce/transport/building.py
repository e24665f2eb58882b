"""How the members of a generation connect, each with each."""

from __future__ import annotations

import contextlib
import functools
import hmac
import secrets
import selectors
import socket
import struct
import threading
from collections.abc import Callable

import torch

from raytrain_het.allreduce.transport.group import Group, GroupError
from raytrain_het.allreduce.transport.nccl import NcclGroup
from raytrain_het.allreduce.transport.tcp import TcpGroup
from raytrain_het.membership.meeting import Meeting

_HELLO = struct.Struct("<16sI")
"""The group's secret, and the rank of who connects."""
_LOOK_S = 0.05
"""How soon a wait notices that the group is not wanted any more."""
_CONNECT_S = 5.0
"""A host that does not answer for so long is gone."""


def connect(meeting: Meeting, rank: int, size: int, host: str, wanted: Callable[[], bool]) -> dict[int, socket.socket]:
    """A connection with every other member, by rank. Higher ranks connect to lower ones.

    Args:
        meeting: where members say their addresses, and hear a secret that strangers do not.
        rank: of this member.
        size: number of members.
        host: this member's address for others.
        wanted: waiting ends once this is false.

    Raises:
        GroupError: a member is not there any more, or the group is not wanted any more.
    """
    sockets: dict[int, socket.socket] = {}
    try:
        family = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][0]
        with socket.create_server((host, 0), family=family, backlog=size) as listener:
            if rank == 0:
                meeting.set("secret", secrets.token_bytes(16))
            meeting.set(f"{rank}", f"{host} {listener.getsockname()[1]}")
            secret = meeting.get("secret")
            for peer in range(rank):
                address, port = meeting.get(f"{peer}").decode().split()
                sockets[peer] = socket.create_connection((address, int(port)), timeout=_CONNECT_S)
                sockets[peer].sendall(_HELLO.pack(secret, rank))
            with contextlib.closing(_Callers(listener, secret)) as callers:
                while len(sockets) < size - 1:
                    if not wanted():
                        raise GroupError("the group is not wanted any more")
                    sockets.update(callers.heard(_LOOK_S))
    except BaseException as error:
        for sock in sockets.values():
            sock.close()
        if isinstance(error, OSError):
            raise GroupError(f"members cannot connect: {error}") from error
        raise
    return sockets


class _Callers:
    """Who connects here. Who does not know the secret, or says nothing, holds up nobody else."""

    def __init__(self, listener: socket.socket, secret: bytes) -> None:
        self._listener, self._secret = listener, secret
        self._said: dict[socket.socket, bytes] = {}
        self._selector = selectors.DefaultSelector()
        listener.setblocking(False)
        self._selector.register(listener, selectors.EVENT_READ)

    def heard(self, timeout_s: float) -> dict[int, socket.socket]:
        """Members that have said hello, by rank."""
        members = {}
        for key, _ in self._selector.select(timeout_s):
            sock = key.fileobj
            assert isinstance(sock, socket.socket)
            with contextlib.suppress(BlockingIOError):
                if sock is self._listener:
                    caller, _ = sock.accept()
                    caller.setblocking(False)
                    self._said[caller] = b""
                    self._selector.register(caller, selectors.EVENT_READ)
                elif self._listen(sock):
                    members[_HELLO.unpack(self._said.pop(sock))[1]] = sock
        return members

    def close(self) -> None:
        """The others are none of ours."""
        for sock in self._said:
            sock.close()
        self._selector.close()

    def _listen(self, sock: socket.socket) -> bool:
        """Whether it has said its hello. Who says something else is let go."""
        try:
            part = sock.recv(_HELLO.size - len(self._said[sock]))
        except ConnectionError:
            part = b""
        self._said[sock] += part
        if part and len(self._said[sock]) < _HELLO.size:
            return False
        self._selector.unregister(sock)
        if part and hmac.compare_digest(self._said[sock][:16], self._secret):
            return True
        del self._said[sock]
        sock.close()
        return False


class GroupBuilder:
    """Makes a group in a helper thread, which is left to itself when the group is no longer wanted."""

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
        self._make = functools.partial(self._made, key, rank, size, host, device)
        threading.Thread(target=self._run, name="het-group", daemon=True).start()

    @property
    def done(self) -> bool:
        """Whether there is a group or an error."""
        return self.group is not None or self.error is not None

    def abandon(self) -> None:
        """Nobody wants the group any more."""
        self._meeting.abandon()
        with self._lock:
            self._wanted = False
            if self.group is not None:
                self.group.leave()

    def _made(self, key: str, rank: int, size: int, host: str, device: torch.device) -> Group:
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
