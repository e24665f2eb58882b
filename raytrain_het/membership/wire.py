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

import msgspec

from raytrain_het.membership import handshake
from raytrain_het.membership.encryption import Socket, limit_sending, secured
from raytrain_het.membership.protocol import FromHub, Message

MAX_LINE_BYTES = 16 * 1024 * 1024
SEND_TIMEOUT_S = 10.0
"""A peer that does not take a message for so long is taken for gone, since the sender may be the training thread."""
KEEPALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}
"""Seconds of silence, seconds between probes, and probes: a machine that has vanished is noticed within 20 s."""
USER_TIMEOUT_MS = 20_000
"""The same while data is under way: no probes are sent then."""


def encode(message: Message) -> bytes:
    """One message as one line. Numbers that are not finite are JSON's in Python's spelling."""
    return json.dumps(msgspec.to_builtins(message, enc_hook=_as_json_takes_it), separators=(",", ":")).encode() + b"\n"


def _as_json_takes_it(value: Any) -> Any:
    """Numbers and texts of other classes, such as numpy's, as JSON takes them."""
    for kind in (int, float, str):
        if isinstance(value, kind):
            return kind(value)
    raise TypeError(f"a {type(value).__name__} can't be sent in a message")


def decoded(said: Any, kinds: Any) -> Any:
    """A message of what its line says.

    Args:
        said: JSON's values.
        kinds: the messages that may come, such as :data:`~raytrain_het.membership.protocol.FromHub`.

    Raises:
        ValueError: it is none of them.
    """
    return msgspec.convert(said, kinds)


def tune(sock: Socket) -> None:
    """Send small messages at once, and notice a machine that has vanished."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in {**KEEPALIVE, "TCP_USER_TIMEOUT": USER_TIMEOUT_MS}.items():
        if hasattr(socket, name):  # Linux has them all.
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def connect(host: str, port: int, token: str, timeout_s: float = 10.0) -> Connection:
    """Connect to the hub; both ends prove that they know the run's token.

    Raises:
        OSError: there is no hub, or it is another run's.
    """
    sock = secured(socket.create_connection((host, port), timeout=timeout_s), serves=False)
    try:
        handshake.call(sock, token)
    except OSError:
        sock.close()
        raise
    return Connection(sock)


class Connection:
    """A member's end: sends from any thread, reads from one.

    Args:
        sock: connected.
        send_timeout_s: a hub that takes nothing for so long is taken for gone.
    """

    def __init__(self, sock: Socket, send_timeout_s: float = SEND_TIMEOUT_S) -> None:
        self._sock = sock
        self._sock.settimeout(None)
        tune(self._sock)
        limit_sending(self._sock, send_timeout_s)  # A reader waits for as long as nothing is said.
        self._lock = threading.Lock()

    def send(self, message: Message) -> None:
        """Raises:
        OSError: the connection is lost, or its other end took nothing for too long; it is closed then, since a part
            of the message may have gone out.
        """
        data = encode(message)
        with self._lock:
            try:
                self._sock.sendall(data)
            except OSError:
                self.close()
                raise

    def messages(self) -> Iterator[Any]:
        """Messages until the connection ends, in the middle of one too."""
        try:
            with self._sock.makefile("rb") as lines:
                for line in lines:
                    if not line.endswith(b"\n"):
                        return
                    yield decoded(json.loads(line), FromHub)
        except OSError:
            return

    def close(self) -> None:
        """Close it; the reader ends."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()
