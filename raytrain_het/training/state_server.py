"""Snapshots from peer to peer: a small server in every worker, asked by those that heal."""

from __future__ import annotations

import contextlib
import hmac
import io
import json
import socket
import struct
import threading
from collections.abc import Callable
from typing import Any

import torch

from raytrain_het.membership.wire import tune

_LENGTH = struct.Struct("<Q")
WAIT_S = 600.0


class StateServer:
    """Serves what its worker offers. Values are made when asked for, in the server's threads.

    Args:
        host: the address on which it listens.
        token: what a peer has to show; values are pickled, so nobody else may ask or be asked.
    """

    def __init__(self, host: str, token: Callable[[], str]) -> None:
        self._sock = socket.create_server((host, 0), backlog=64)
        self.port = int(self._sock.getsockname()[1])
        self._token = token
        self._offers: dict[str, Callable[[dict[str, Any]], Any]] = {}
        self._refused = 0
        self._changed = threading.Condition()
        self._closed = False
        threading.Thread(target=self._accept, name="het-state", daemon=True).start()

    def offer(self, name: str, make: Callable[[dict[str, Any]], Any]) -> None:
        """Serve ``make(request)`` under this name. A request that came earlier is answered now."""
        with self._changed:
            self._offers[name] = make
            self._changed.notify_all()

    def withdraw(self, prefix: str) -> None:
        """Serve names with this prefix no longer."""
        with self._changed:
            for name in [n for n in self._offers if n.startswith(prefix)]:
                del self._offers[name]

    def close(self) -> None:
        """Stop serving."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()

    def _accept(self) -> None:
        while not self._closed:
            try:
                connection, _ = self._sock.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), name="het-state-serve", daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError, ValueError, KeyError):
            tune(connection)
            with connection.makefile("rb") as lines:
                request = json.loads(lines.readline())
            if not hmac.compare_digest(str(request["token"]), self._token()):
                return
            name = request["name"]
            with self._changed:
                self._changed.wait_for(lambda: self._closed or name in self._offers, timeout=WAIT_S)
                make = self._offers.get(name)
            if make is None or self._closed:
                return
            buffer = io.BytesIO()
            torch.save(make(request), buffer)
            view = buffer.getbuffer()
            connection.sendall(_LENGTH.pack(len(view)))
            connection.sendall(view)


def ask(host: str, port: int, token: str, name: str, *, give_up: Callable[[], bool], **values: Any) -> Any | None:
    """Ask a peer's state server; None if the peer is gone or ``give_up()`` became true meanwhile."""
    try:
        with socket.create_connection((host, port), timeout=10) as sock:
            tune(sock)
            sock.sendall(json.dumps({"token": token, "name": name, **values}).encode() + b"\n")
            sock.settimeout(0.05)
            head = _receive(sock, _LENGTH.size, give_up)
            body = _receive(sock, _LENGTH.unpack(head)[0], give_up)
    except (OSError, EOFError):
        return None
    return torch.load(io.BytesIO(body), map_location="cpu", weights_only=False)


def _receive(sock: socket.socket, size: int, give_up: Callable[[], bool]) -> bytearray:
    data = bytearray(size)
    view, done = memoryview(data), 0
    while done < size:
        try:
            count = sock.recv_into(view[done:], min(size - done, 1 << 20))
        except TimeoutError:
            if give_up():
                raise EOFError("no longer wanted") from None
            continue
        if count == 0:
            raise EOFError("the peer closed the connection")
        done += count
    return data
