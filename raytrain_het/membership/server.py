"""The hub: sockets and clock around the pure membership logic. Runs in a thread of whatever process hosts it.

Each member keeps one connection open to it. The kernel closes that connection when the process dies, and then its
machine is asked whether it has (:mod:`~raytrain_het.membership.watchman`): so a death is known within milliseconds, and
is not taken for a cable that was pulled. What Ray knows besides (a vanished machine) comes by :meth:`Hub.slot_lost`.
:mod:`~raytrain_het.membership.listener` reads, and :mod:`~raytrain_het.membership.switchboard` has what is done with
messages.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
import queue
import secrets
import threading
import time
from collections.abc import Callable
from typing import Any

from raytrain_het.config import HetConfig
from raytrain_het.errors import HubError
from raytrain_het.membership import encryption, handshake, protocol
from raytrain_het.membership.listener import Inbox, Link
from raytrain_het.membership.record import Member
from raytrain_het.membership.run_context import RunContext
from raytrain_het.membership.status import RunStatus
from raytrain_het.membership.switchboard import Switchboard
from raytrain_het.membership.watchman import Life, life_of
from raytrain_het.membership.wire import decoded, encode

logger = logging.getLogger("raytrain_het")

TICK_S = 0.025
STANDSTILL_S = 0.1
"""More than this between two ticks is a standstill of this process, and no member's silence."""
ASK_LIMIT_S = 1.0
"""A machine that does not answer for so long is asked again."""
SETTLING_S = (0.0, 0.005, 0.01, 0.02, 0.04, 0.08)
"""A process whose connection has closed, and that seems to run, may be on its way out: it is asked after again soon."""
BACKLOG = 1024
START_LIMIT_S = 30.0


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
        self._links: dict[str, Link] = {}
        """By uid."""
        self._inbox = Inbox(self._hear, self._arrived)
        self._asking: dict[str, asyncio.Future[None]] = {}
        """By uid, processes whose machine is being asked for them."""
        self._ending = False
        self._encoded: tuple[protocol.Message | None, bytes] = (None, b"")
        """The message that was sent last, and its bytes."""
        self._switchboard = Switchboard(
            config, context, now=self._clock.now, send=self._send, connected=lambda: list(self._links)
        )
        self._loop = asyncio.new_event_loop()
        self._port = port
        started: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, args=(started,), name="het-hub", daemon=True)
        self._thread.start()
        error = started.get(timeout=START_LIMIT_S)
        if error is not None:
            raise HubError(
                f"the membership actor cannot listen on host={context.host!r}, port={port} "
                f"({type(error).__name__}: {error}). Every worker connects to it there: see that this machine has the "
                "address, and that the process may open more files (ulimit -n)."
            ) from error

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

    def slot_drains(self, slot: int, reason: str) -> None:
        """The machine of a slot's worker will be taken away. To be told again and again until the worker has left."""
        self._call(lambda: self._switchboard.slot_drains(slot, reason))

    def slot_vacant(self, slot: int, reason: str) -> None:
        """No worker can be placed in this slot at the moment."""
        self._call(lambda: self._switchboard.slot_vacant(slot, reason))

    def take_reports(self) -> list[dict[str, Any]]:
        """Whole reports that were not acknowledged yet, oldest first."""
        return [r.to_json() for r in self._call(self._switchboard.reporting.collector.untaken)]

    def acknowledge(self, keys: list[str]) -> None:
        """Those reports are registered; the workers may forget them."""
        self._call(lambda: self._switchboard.acknowledge(keys))

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
            self._ending = True
            for link in list(self._links.values()):
                link.transport.close()
            self._loop.stop()

        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(stop)
        self._thread.join(timeout=5)

    def _call(self, fn: Callable[[], Any]) -> Any:
        async def run() -> Any:
            return self._decide(fn)

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(timeout=30)

    def _decide(self, fn: Callable[[], Any], about: str = "") -> Any:
        """Let the switchboard decide something, and send it.

        An error in it fails the run: what it says afterwards is not to be trusted, and members would wait for it.
        ``about`` names what it was about.
        """
        try:
            return fn()
        except Exception as error:
            logger.exception("an error in the membership actor; the run fails")
            self._switchboard.core.broken(f"{type(error).__name__}: {error}", about)
            self._switchboard.send_all()
            raise

    # ---------------------------------------------------------------- its thread

    def _run(self, started: queue.SimpleQueue[BaseException | None]) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._start())
        except BaseException as error:
            started.put(error)
            return
        self._loop.call_soon(started.put, None)  # Not before it runs for good: a stop that came earlier would be lost.
        self._loop.run_forever()
        self._server.close()
        under_way = asyncio.all_tasks(self._loop)
        for task in under_way:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*under_way, return_exceptions=True))
        self._loop.close()

    async def _start(self) -> None:
        # Every interface of one family: with both, a free port would be another one for each.
        every = "::" if ":" in self.context.host else "0.0.0.0"
        self._server = await self._loop.create_server(
            lambda: Link(self._inbox, self.token),
            host=every,
            port=self._port,
            backlog=BACKLOG,
            ssl=encryption.context(serves=True) if encryption.is_on() else None,
            ssl_handshake_timeout=handshake.LIMIT_S if encryption.is_on() else None,
        )
        self._port = self._server.sockets[0].getsockname()[1]
        self._ticker = asyncio.ensure_future(self._tick())

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            with contextlib.suppress(Exception):  # The run has failed by it, and everybody was told.
                self._decide(self._switchboard.tick)
            with contextlib.suppress(Exception):
                for member in self._decide(self._switchboard.in_doubt):
                    self._ask_after(member)

    def _arrived(self, link: Link) -> None:
        self._switchboard.heard(link.member.uid)

    def _hear(self, link: Link, line: bytes | None) -> None:
        """Decide what one line is about; None is the end of a connection."""
        member: Member | None = link.member
        if line is None:
            if member is not None and self._links.get(member.uid) is link:
                del self._links[member.uid]
                with contextlib.suppress(Exception):
                    self._decide(lambda: self._switchboard.disconnected(member.uid))
                if self._switchboard.expects(member.uid):
                    self._ask_after(member)
            return
        if link.transport.is_closing() and member is None:
            return
        said = _values(line)
        if said is None:  # A torn line.
            link.transport.abort()
            return
        with contextlib.suppress(Exception):  # As in _tick.
            if member is None:
                self._greeted(link, said)
            else:
                about = f" when worker {member.slot} told it {said.get('type')!r}"
                self._decide(lambda: self._switchboard.hear(member, decoded(said, protocol.FromMember)), about)

    def _greeted(self, link: Link, said: Any) -> None:
        # One that does not fit would come again and again: the run fails, and says by what.
        hello: protocol.Hello = self._decide(lambda: decoded(said, protocol.Hello), " when a worker said hello")
        member = link.member = hello.member
        self._links[member.uid] = link
        self._decide(lambda: self._switchboard.hello(hello), f" when worker {member.slot} said hello")

    def _ask_after(self, member: Member) -> None:
        """Ask a member's machine how its process is, unless it was asked already."""
        if member.uid not in self._asking and not self._ending:
            self._asking[member.uid] = asyncio.ensure_future(self._look_after(member))

    async def _look_after(self, member: Member) -> None:
        try:
            for pause_s in SETTLING_S:
                await asyncio.sleep(pause_s)
                life = await life_of(member, self.token, ASK_LIMIT_S)
                with contextlib.suppress(Exception):  # As in _tick.
                    self._decide(functools.partial(self._switchboard.learn, member, life))
                if life not in (Life.RUNS, Life.LISTENS) or member.uid in self._links:
                    break
        finally:
            del self._asking[member.uid]

    def _send(self, uid: str, message: protocol.Message) -> None:
        link = self._links.get(uid)
        if link is None or link.transport.is_closing():
            return
        if message is not self._encoded[0]:  # One message often goes to many.
            self._encoded = message, encode(message)
        link.transport.write(self._encoded[1])


def _values(line: bytes) -> dict[str, Any] | None:
    """What a line says; None where it is no message."""
    try:
        said = json.loads(line)
    except ValueError:
        return None
    return said if isinstance(said, dict) else None
