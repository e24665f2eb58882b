"""The hub: sockets and clock around the pure membership logic. Runs in a thread of whatever process hosts it.

Each member keeps one connection open to it. The kernel closes that connection when the process dies, so a death is
known within a millisecond, the same way with Ray and without; what Ray knows besides (a vanished machine) comes by
:meth:`Hub.slot_lost`. :mod:`~raytrain_het.membership.switchboard` has what is done with messages.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hmac
import json
import logging
import secrets
import threading
import time
from collections.abc import Callable
from typing import Any

from raytrain_het.config import HetConfig
from raytrain_het.membership import protocol
from raytrain_het.membership.record import Member
from raytrain_het.membership.run_context import RunContext
from raytrain_het.membership.status import RunStatus
from raytrain_het.membership.switchboard import Switchboard
from raytrain_het.membership.wire import MAX_LINE_BYTES, decoded, encode, tune

logger = logging.getLogger("raytrain_het")

TICK_S = 0.025
STANDSTILL_S = 0.1
"""More than this between two ticks is a standstill of this process, and no member's silence."""


class FairClock:
    """Seconds that count only while this process was able to listen."""

    def __init__(self) -> None:
        self._last = time.monotonic()
        self._now = 0.0

    def now(self) -> float:
        """The time, advanced by at most ``STANDSTILL_S`` since the last call."""
        real = time.monotonic()
        self._now += min(real - self._last, STANDSTILL_S)
        self._last = real
        return self._now


class Hub:
    """Serves one run. All state is touched by its own thread only."""

    def __init__(self, config: HetConfig, context: RunContext, *, token: str | None = None, port: int = 0) -> None:
        self.context = context
        self.token = token or secrets.token_hex(16)
        self._clock = FairClock()
        self._connections: dict[str, asyncio.StreamWriter] = {}
        """By uid."""
        self._switchboard = Switchboard(
            config, context, now=self._clock.now, send=self._send, connected=lambda: list(self._connections)
        )
        self._loop = asyncio.new_event_loop()
        self._port = port
        ready = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(ready,), name="het-hub", daemon=True)
        self._thread.start()
        ready.wait()

    # ---------------------------------------------------------------- for whoever hosts it

    def address(self) -> dict[str, Any]:
        """Where members find it, and which run it serves."""
        return {
            "host": self.context.host,
            "port": self._port,
            "token": self.token,
            "run": self.context.run_id,
        }

    def slot_lost(self, slot: int, reason: str) -> None:
        """Ray's word that the worker in a slot is dead."""
        self._call(lambda: self._switchboard.slot_lost(slot, reason))

    def slot_vacant(self, slot: int, reason: str) -> None:
        """No worker can be placed in this slot at the moment."""
        self._call(lambda: self._switchboard.slot_vacant(slot, reason))

    def take_reports(self) -> list[dict[str, Any]]:
        """Whole reports that were not acknowledged yet, oldest first."""
        return [r.to_json() for r in self._call(self._switchboard.reporting.collector.untaken)]

    def acknowledge(self, keys: list[str]) -> None:
        """Those reports are registered; the workers may forget them."""
        self._call(lambda: self._switchboard.reporting.acknowledge(keys))

    def reports(self, since: int) -> list[dict[str, Any]]:
        """All whole reports with a sequence number of ``since`` or more."""
        return [r.to_json() for r in self._call(lambda: self._switchboard.reporting.collector.since(since))]

    def events(self, since: int) -> list[dict[str, Any]]:
        """Membership events with a sequence number of ``since`` or more."""
        return [e.to_json() for e in self._call(lambda: self._switchboard.core.run.log.since(since))]

    def status(self) -> RunStatus:
        """Who takes part and how far they are."""
        return self._call(self._switchboard.status)

    def shutdown(self) -> None:
        """Close everything."""

        def stop() -> None:
            for writer in self._connections.values():
                writer.close()
            self._loop.stop()

        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(stop)
        self._thread.join(timeout=5)

    def _call(self, fn: Callable[[], Any]) -> Any:
        async def run() -> Any:
            return self._decide(fn)

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(timeout=30)

    def _decide(self, fn: Callable[[], Any], about: str = "") -> Any:
        """Let the logic decide something, and send it.

        An error in it fails the run: what it says afterwards is not to be trusted, and members would wait for it.
        ``about`` names what it was about.
        """
        try:
            result = fn()
            self._switchboard.settle()
            return result
        except Exception as error:
            logger.exception("an error in the membership actor; the run fails")
            self._switchboard.core.broken(f"{type(error).__name__}: {error}", about)
            self._switchboard.send_all()
            raise

    # ---------------------------------------------------------------- its thread

    def _run(self, ready: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)

        async def start() -> None:
            # Every interface of one family: with both, a free port would be another one for each.
            every = "::" if ":" in self.context.host else "0.0.0.0"
            server = await asyncio.start_server(self._serve, host=every, port=self._port, limit=MAX_LINE_BYTES)
            self._port = server.sockets[0].getsockname()[1]
            self._server = server
            self._ticker = asyncio.ensure_future(self._tick())

        self._loop.run_until_complete(start())
        self._loop.call_soon(ready.set)  # Not before it runs for good: a stop that came earlier would be lost.
        self._loop.run_forever()
        self._ticker.cancel()
        self._server.close()
        with contextlib.suppress(Exception):
            self._loop.run_until_complete(asyncio.sleep(0))

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            with contextlib.suppress(Exception):  # The run has failed by it, and everybody was told.
                self._decide(self._switchboard.tick)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        uid: str | None = None
        try:
            greeting = await asyncio.wait_for(_read(reader), timeout=10)
            if greeting is None or not hmac.compare_digest(str(greeting.get("token", "")), self.token):
                return
            # One that does not fit would come again and again: the run fails, and says by what.
            hello: protocol.Hello = self._decide(lambda: decoded(greeting, protocol.Hello), " when a worker said hello")
            member = hello.member
            uid = member.uid
            self._connections[uid] = writer
            tune(writer.get_extra_info("socket"))
            self._decide(lambda: self._switchboard.hello(hello), f" when worker {member.slot} said hello")
            while (said := await _read(reader)) is not None:
                with contextlib.suppress(Exception):  # As in _tick.
                    about = f" when worker {member.slot} told it {said.get('type')!r}"
                    self._decide(functools.partial(self._hear, member, said), about)
        except Exception:
            logger.debug("a connection has ended", exc_info=True)
        finally:
            writer.close()
            if uid is not None and self._connections.get(uid) is writer:
                del self._connections[uid]
                with contextlib.suppress(Exception):
                    self._decide(lambda: self._switchboard.closed(member.uid))

    def _hear(self, member: Member, said: dict[str, Any]) -> None:
        self._switchboard.hear(member, decoded(said, protocol.FromMember))

    def _send(self, uid: str, message: protocol.Message) -> None:
        writer = self._connections.get(uid)
        if writer is not None and not writer.is_closing():
            writer.write(encode(message))


async def _read(reader: asyncio.StreamReader) -> dict[str, Any] | None:
    """What comes next; None at the end of a connection, which a torn line is too."""
    try:
        line = await reader.readline()
        said = json.loads(line) if line else None
    except (OSError, ValueError):
        return None
    return said if isinstance(said, dict) else None
