"""TLS on a run's own connections, where Ray's are encrypted too: by the certificates that Ray's settings name.

========================  =====================================
environment variable      what it says
========================  =====================================
``RAY_USE_TLS``           ``1`` or ``true``: connections are encrypted
``RAY_TLS_SERVER_CERT``   this node's certificate, a PEM file
``RAY_TLS_SERVER_KEY``    its private key
``RAY_TLS_CA_CERT``       the authority that has signed the certificates of all nodes
========================  =====================================

Both ends show a certificate of that authority. Host names are not compared: who takes part proves by the run's token
that it belongs to the run (:mod:`~raytrain_het.membership.handshake`).
"""

from __future__ import annotations

import contextlib
import io
import os
import select
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from raytrain_het.errors import ConfigError

_FILES = ("RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT")
_READ, _WRITE = select.POLLIN, select.POLLOUT


def is_on() -> bool:
    """Whether connections are encrypted in this process."""
    return os.environ.get("RAY_USE_TLS", "").lower() in ("1", "true")


def context(*, serves: bool) -> ssl.SSLContext:
    """What one end of a connection shows and asks for.

    Raises:
        ConfigError: Ray's settings name no certificate that can be used.
    """
    names = [os.environ.get(name, "") for name in _FILES]
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if serves else ssl.PROTOCOL_TLS_CLIENT)
    made.check_hostname = False
    made.verify_mode = ssl.CERT_REQUIRED
    made.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        made.load_cert_chain(names[0], names[1])
        made.load_verify_locations(names[2])
    except OSError as error:
        settings = ", ".join(f"{name}={value!r}" for name, value in zip(_FILES, names, strict=True))
        raise ConfigError(
            f"RAY_USE_TLS is set, and the certificates cannot be used ({error}): {settings}. Allowed are PEM files "
            "that this process can read; set all three on every node, or unset RAY_USE_TLS."
        ) from None
    return made


def secured(sock: socket.socket, *, serves: bool) -> Socket:
    """The connected socket itself, or the same encrypted, if encryption is on.

    Raises:
        ConfigError: Ray's settings name no certificate that can be used.
    """
    return TlsSocket(sock, context(serves=serves), serves=serves) if is_on() else sock


def limit_sending(sock: Socket, seconds: float) -> None:
    """From now on only sending has a limit."""
    if isinstance(sock, TlsSocket):
        sock.limit_sending(seconds)
    else:
        limit = struct.pack("@ll", *divmod(int(seconds * 1e6), 1_000_000))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)


class TlsSocket:
    """A connected socket with TLS, used as a plain one: one thread may read while another one writes.

    The first call that reads or writes does TLS's own greeting. What fails in TLS is an ``OSError``, as what fails in a
    plain socket is.

    Args:
        sock: the connection; it belongs to this object from now on.
        context: what this end shows and asks for.
        serves: whether this end was called.
    """

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, *, serves: bool) -> None:
        self._timeout_s = self._send_timeout_s = sock.gettimeout()
        # TLS keeps one state for both directions: no thread may wait while it holds it, so the socket never blocks.
        self._lock = threading.Lock()
        self._sock = context.wrap_socket(
            sock, server_side=serves, do_handshake_on_connect=False, suppress_ragged_eofs=False
        )
        self._sock.setblocking(False)

    # ---------------------------------------------------------------- as a socket has it

    def fileno(self) -> int:
        """The descriptor."""
        return self._sock.fileno()

    def gettimeout(self) -> float | None:
        """Seconds that a call may take; 0 if none waits, None if each waits as long as it takes."""
        return self._timeout_s

    def settimeout(self, seconds: float | None) -> None:
        """See :meth:`gettimeout`."""
        self._timeout_s = self._send_timeout_s = seconds

    def setblocking(self, blocks: bool) -> None:
        """Whether calls wait."""
        self.settimeout(None if blocks else 0.0)

    def limit_sending(self, seconds: float) -> None:
        """Only sending has a limit from now on."""
        self._send_timeout_s = seconds

    def setsockopt(self, level: int, name: int, value: Any) -> None:
        """Set an option of the connection."""
        # Of what the kernel has of a message TLS may have taken the beginning: a low-water mark would wait for ever.
        if (level, name) != (socket.SOL_SOCKET, socket.SO_RCVLOWAT):
            self._sock.setsockopt(level, name, value)

    def getsockopt(self, level: int, name: int, size: int) -> bytes:
        """An option of the connection."""
        return self._sock.getsockopt(level, name, size)

    def greet(self) -> None:
        """Begin TLS's own greeting, or go on with it, as far as that goes without waiting."""
        with contextlib.suppress(BlockingIOError):
            self._call(self._sock.do_handshake, 0)

    def recv_into(self, buffer: memoryview | bytearray, size: int = 0) -> int:
        """Receive into a buffer; 0 at the connection's end."""
        view = memoryview(buffer)
        view = view[:size] if size else view
        try:
            return int(self._call(lambda: self._sock.recv_into(view), self._timeout_s)) if len(view) else 0
        except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
            return 0

    def recv(self, size: int) -> bytes:
        """Receive so many bytes at most; none at the connection's end."""
        buffer = bytearray(size)
        return bytes(buffer[: self.recv_into(buffer)])

    def send(self, data: bytes | memoryview) -> int:
        """Send a part of it, or all; returns how many bytes."""
        return int(self._call(lambda: self._sock.send(data), self._send_timeout_s)) if len(data) else 0

    def sendmsg(self, parts: Sequence[bytes | memoryview]) -> int:
        """Send parts one after the other, as far as they can be sent."""
        sent = 0
        for part in parts:
            try:
                taken = self.send(part)
            except BlockingIOError:
                if sent:
                    break
                raise
            sent += taken
            if taken < len(part):
                break
        return sent

    def sendall(self, data: bytes | memoryview) -> None:
        """Send all of it."""
        rest = memoryview(data).cast("B")
        while len(rest):
            rest = rest[self.send(rest) :]

    def makefile(self, mode: str = "rb") -> io.BufferedReader:
        """A file to read from."""
        return io.BufferedReader(_Reader(self))

    def shutdown(self, how: int) -> None:
        """End the connection below TLS, which wakes whoever waits for it."""
        socket.socket.shutdown(self._sock, how)

    def close(self) -> None:
        """Free it."""
        self._sock.close()

    def __enter__(self) -> TlsSocket:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---------------------------------------------------------------- waiting

    def _call(self, what: Callable[[], Any], timeout_s: float | None) -> Any:
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            with self._lock:
                try:
                    return what()
                except ssl.SSLWantReadError:
                    event = _READ
                except ssl.SSLWantWriteError:
                    event = _WRITE
            if timeout_s == 0:
                raise BlockingIOError("the other end has to do something first")
            self._wait(event, deadline)

    def _wait(self, event: int, deadline: float | None) -> None:
        poll = select.poll()
        poll.register(self.fileno(), event)
        left = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000
        if not poll.poll(left):
            raise TimeoutError("timed out")


class _Reader(io.RawIOBase):
    """What a buffered reader reads from."""

    def __init__(self, sock: TlsSocket) -> None:
        self._sock = sock

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self._sock.recv_into(memoryview(buffer).cast("B"))


Socket = socket.socket | TlsSocket
"""A connection, encrypted or not."""
