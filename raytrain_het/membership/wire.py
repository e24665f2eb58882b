"""JSON lines over a socket: how members and the hub talk.

Messages are small; nothing on it is executed or unpickled.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

MAX_LINE_BYTES = 16 * 1024 * 1024


def encode(message: dict[str, Any]) -> bytes:
    """One message as one line."""
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


def tune(sock: socket.socket) -> None:
    """Send small messages at once, and notice a machine that has vanished."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


class Connection:
    """A member's end: sends from any thread, reads from one."""

    def __init__(self, host: str, port: int, timeout_s: float = 10.0) -> None:
        self._sock = socket.create_connection((host, port), timeout=timeout_s)
        self._sock.settimeout(None)
        tune(self._sock)
        self._lock = threading.Lock()

    def send(self, message: dict[str, Any]) -> None:
        """Raises:
        OSError: the connection is lost.
        """
        data = encode(message)
        with self._lock:
            self._sock.sendall(data)

    def messages(self) -> Iterator[dict[str, Any]]:
        """Messages until the connection ends."""
        with self._sock.makefile("rb") as lines:
            for line in lines:
                yield json.loads(line)

    @property
    def local_host(self) -> str:
        """The address of this machine as the connection sees it."""
        return str(self._sock.getsockname()[0])

    def close(self) -> None:
        """Close it; the reader ends."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()
