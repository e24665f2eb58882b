"""Where the communication thread waits: for sockets, for other threads, and for a time."""

from __future__ import annotations

import contextlib
import selectors
import socket
from collections.abc import Callable

from raytrain_het.membership.encryption import Socket


class Poller:
    """Serves sockets in the thread that waits here. There are no further threads to hand over to."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._inner, self._outer = socket.socketpair()
        for end in (self._inner, self._outer):
            end.setblocking(False)
        self._woken = False
        self._selector.register(self._inner, selectors.EVENT_READ, self._drain)

    def wake(self) -> None:
        """End the wait of the waiting thread. From any thread."""
        if not self._woken:
            self._woken = True
            with contextlib.suppress(OSError):  # It is closed, or full of such calls.
                self._outer.send(b"\0")

    def wait(self, timeout_s: float) -> None:
        """Wait until sockets are ready, and serve them; or until woken, or until the time is over."""
        for key, events in self._selector.select(max(timeout_s, 0.0)):
            key.data(events)

    def watch(self, sock: Socket, events: int, serve: Callable[[int], None]) -> None:
        """Call ``serve`` whenever one of these events happens; 0 stops that."""
        known = sock in self._selector.get_map()
        if events and known:
            self._selector.modify(sock, events, serve)
        elif events:
            self._selector.register(sock, events, serve)
        elif known:
            self._selector.unregister(sock)

    def close(self) -> None:
        """Free the sockets. Nobody may wait here after that."""
        self._selector.close()
        self._inner.close()
        self._outer.close()

    def _drain(self, events: int) -> None:
        # In this order: a wake-up in between is not lost, since the thread returns from its wait now anyway.
        self._inner.recv(4096)
        self._woken = False
