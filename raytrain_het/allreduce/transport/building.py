"""How the members of a generation connect, each with each. A helper thread does it, since a peer may not answer."""

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
"""The group's secret, and the rank of the member that connects."""
_LOOK_S = 0.05
"""How often a wait looks whether the group is still wanted."""
_CONNECT_S = 5.0
"""A host that does not answer for so long is taken for gone."""


def connect(meeting: Meeting, rank: int, size: int, host: str, wanted: Callable[[], bool]) -> dict[int, socket.socket]:
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
    """Connections that come in. A caller that does not know the secret, or says nothing, delays no other one."""

    def __init__(self, listener: socket.socket, secret: bytes) -> None:
        self._listener, self._secret = listener, secret
        self._received: dict[socket.socket, bytes] = {}
        """By caller: what it has sent of its hello."""
        self._selector = selectors.DefaultSelector()
        listener.setblocking(False)
        self._watch(listener)

    def heard(self, timeout_s: float) -> dict[int, socket.socket]:
        """Members that have said hello, by rank."""
        members = {}
        for key, _ in self._selector.select(timeout_s):
            sock: socket.socket = key.data
            with contextlib.suppress(BlockingIOError):
                if sock is self._listener:
                    caller, _ = sock.accept()
                    caller.setblocking(False)
                    self._received[caller] = b""
                    self._watch(caller)
                elif self._listen(sock):
                    members[_HELLO.unpack(self._received.pop(sock))[1]] = sock
        return members

    def close(self) -> None:
        """Close the connections of all that have not said hello."""
        for sock in self._received:
            sock.close()
        self._selector.close()

    def _watch(self, sock: socket.socket) -> None:
        self._selector.register(sock, selectors.EVENT_READ, sock)

    def _listen(self, sock: socket.socket) -> bool:
        """Whether the caller has said its hello now. One that says something else is closed."""
        try:
            part = sock.recv(_HELLO.size - len(self._received[sock]))
        except ConnectionError:
            part = b""
        self._received[sock] += part
        if part and len(self._received[sock]) < _HELLO.size:
            return False
        self._selector.unregister(sock)
        if part and hmac.compare_digest(self._received[sock][:16], self._secret):
            return True
        del self._received[sock]
        sock.close()
        return False


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
