"""How the members of a generation connect, each with each."""

from __future__ import annotations

import functools
import hmac
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable

import torch

from raytrain_het.collectives.group import Group, GroupError
from raytrain_het.collectives.nccl import NcclGroup
from raytrain_het.collectives.tcp import TcpGroup
from raytrain_het.membership.meeting import Meeting

_HELLO = struct.Struct("<16sI")
"""The group's secret, and the rank of who connects."""
_LOOK_S = 0.05
"""How soon a wait notices that the group is not wanted any more."""
_HELLO_S = 5.0
"""Who connects and says nothing for so long is none of ours."""


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
    family = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][0]
    try:
        with socket.create_server((host, 0), family=family, backlog=size) as listener:
            if rank == 0:
                meeting.set("secret", secrets.token_bytes(16))
            meeting.set(f"{rank}", f"{host} {listener.getsockname()[1]}")
            secret = meeting.get("secret")
            for peer in range(rank):
                address, port = meeting.get(f"{peer}").decode().split()
                sockets[peer] = socket.create_connection((address, int(port)), timeout=_HELLO_S)
                sockets[peer].sendall(_HELLO.pack(secret, rank))
            listener.settimeout(_LOOK_S)
            while len(sockets) < size - 1:
                if not wanted():
                    raise GroupError("the group is not wanted any more")
                accepted = _accepted(listener, secret, wanted)
                if accepted is not None and rank < accepted[0] < size:
                    sockets[accepted[0]] = accepted[1]
    except BaseException as error:
        for sock in sockets.values():
            sock.close()
        if isinstance(error, OSError):
            raise GroupError(f"members cannot connect: {error}") from error
        raise
    return sockets


def _accepted(listener: socket.socket, secret: bytes, wanted: Callable[[], bool]) -> tuple[int, socket.socket] | None:
    try:
        sock, _ = listener.accept()
    except TimeoutError:
        return None
    sock.settimeout(_LOOK_S)
    data, deadline = b"", time.monotonic() + _HELLO_S
    while len(data) < _HELLO.size and wanted() and time.monotonic() < deadline:
        try:
            part = sock.recv(_HELLO.size - len(data))
        except TimeoutError:
            continue
        except OSError:
            break
        if not part:
            break
        data += part
    if len(data) == _HELLO.size and hmac.compare_digest(data[:16], secret):
        return _HELLO.unpack(data)[1], sock
    sock.close()
    return None


class GroupBuilder:
    """Makes a group in a helper thread, which is left to itself when the group is no longer wanted."""

    def __init__(
        self, key: str, meeting: Meeting, rank: int, size: int, host: str, device: torch.device,
        wake: Callable[[], None],
    ) -> None:  # fmt: skip
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
