"""The hub: sockets and clock around the pure membership logic. Runs in a thread of whatever process hosts it.

Each member keeps one connection open to it. The kernel closes that connection when the process dies, so a death is
known within a millisecond, the same way with Ray and without; what Ray knows besides (a vanished machine) comes by
:meth:`Hub.slot_lost`.
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

import msgspec

from raytrain_het.membership import audit, protocol
from raytrain_het.membership.cursor import Cursor
from raytrain_het.membership.evaluation_book import EvaluationBook
from raytrain_het.membership.last_groups import LastGroups
from raytrain_het.membership.peers import Peer
from raytrain_het.membership.record import Member
from raytrain_het.membership.reports import ReportBook
from raytrain_het.membership.settings import HubSettings
from raytrain_het.membership.state import Membership
from raytrain_het.membership.status import fraction_of_aggregate, status
from raytrain_het.membership.table_keeper import TableKeeper
from raytrain_het.membership.whereabouts import Place
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

    def __init__(self, settings: HubSettings, *, token: str | None = None, port: int = 0) -> None:
        self.settings = settings
        self.token = token or secrets.token_hex(16)
        self._core = Membership(settings, incarnation=time.time_ns())
        self._tables = TableKeeper(settings, self._core)
        self._clock = FairClock()
        self._reports = ReportBook(first_seq=self._core.incarnation // 1_000_000)
        self._core.under_way = lambda: self._reports.are_under_way(self._slots())
        self._evaluations = EvaluationBook()
        self._audits = audit.AuditBook()
        self._warned = self._misused = False
        """About calls that not all workers make: said once, or the run has failed by it."""
        self._writers: dict[str, int] = {}
        self._leaving: dict[str, set[str]] = {}
        self._joined: set[str] = set()
        self._meetings: LastGroups[protocol.Meet] = LastGroups()
        """What members have said to each other while they make a process group."""
        self._stats: dict[int, dict[str, Any]] = {}
        self._connections: dict[str, asyncio.StreamWriter] = {}
        self._noted = self._core.log.next_seq
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
            "host": self.settings.host,
            "port": self._port,
            "token": self.token,
            "run": self.settings.run_id,
        }

    def slot_lost(self, slot: int, reason: str) -> None:
        """Ray's word that the worker in a slot is dead."""
        self._call(lambda: self._core.slot_lost(slot, reason, self._clock.now()))

    def slot_vacant(self, slot: int, reason: str) -> None:
        """Nobody will come for this slot for now."""
        self._call(lambda: self._core.slot_vacant(slot, reason, self._clock.now()))

    def take_reports(self) -> list[dict[str, Any]]:
        """Whole reports that were not acknowledged yet, oldest first."""
        return self._call(self._reports.untaken)

    def acknowledge(self, keys: list[str]) -> None:
        """Those reports are registered; the workers may forget them."""
        self._call(lambda: self._acknowledge(keys))

    def reports(self, since: int) -> list[dict[str, Any]]:
        """All whole reports with a sequence number of ``since`` or more."""
        return self._call(lambda: self._reports.since(since))

    def events(self, since: int) -> list[dict[str, Any]]:
        """Membership events with a sequence number of ``since`` or more."""
        return self._call(lambda: self._core.log.since(since))

    def status(self) -> dict[str, Any]:
        """Who takes part and how far they are."""
        return self._call(lambda: status(self._core, self._tables, self._stats, self.settings.num_slots))

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
            self._flush()
            return result
        except Exception as error:
            logger.exception("an error in the membership actor; the run fails")
            self._core.broken(f"{type(error).__name__}: {error}", self._clock.now(), about)
            self._send_all()
            raise

    # ---------------------------------------------------------------- its thread

    def _run(self, ready: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)

        async def start() -> None:
            # Every interface of one family: with both, a free port would be another one for each.
            every = "::" if ":" in self.settings.host else "0.0.0.0"
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
                self._decide(lambda: self._core.tick(self._clock.now()))

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
            self._decide(lambda: self._hello(hello), f" when worker {member.slot} said hello")
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
                    self._decide(lambda: self._core.closed(member.uid, self._clock.now()))

    def _hear(self, member: Member, said: dict[str, Any]) -> None:
        self._handle(member.uid, member.slot, decoded(said, protocol.FromMember))

    def _hello(self, hello: protocol.Hello) -> None:
        member, known, board = hello.member, hello.known, self._tables.board
        if known is not None:
            board.global_batch_size = known.global_batch_size
            board.introduce(member.slot, known.profile)
            if board.compression is not None and known.codecs is not None:
                board.compression.introduce(member.slot, msgspec.structs.asdict(known.codecs))
        self._core.hello(
            member,
            cursor=hello.cursor,
            healed=hello.healed,
            fresh=hello.fresh,
            now=self._clock.now(),
            record=hello.record,
            answered=hello.answered,
            fingerprint=hello.fingerprint,
        )
        if hello.checkpoint and hello.checkpoint_cursor is not None:
            self._note_checkpoint(hello.checkpoint, hello.checkpoint_cursor)
        if self._core.checkpoint is not None:
            self._send(member.uid, self._newest_checkpoint())
        for _, _, said in self._meetings:
            self._send(member.uid, said)

    def _handle(self, uid: str, slot: int, message: protocol.Message) -> None:
        core, now = self._core, self._clock.now()
        if uid not in core.peers:
            return  # It was let go: what it still says belongs to a run that the others have left behind.
        match message:
            case protocol.Answer() as m:
                core.answer(uid, m.number, cursor=m.cursor, healed=m.healed, fresh=m.fresh, batch=m.batch, now=now)
            case protocol.Pong() as m:
                core.pong(uid, m.position, now, m.place or Place())
                self._reports.told(slot, m.told)
            case protocol.Failed() as m:
                core.failed(uid, m.generation, m.reason, now)
            case protocol.Suspect() as m:
                core.suspect(uid, m.generation, m.step, now)
            case protocol.Waiting():
                core.waiting(uid, now)
            case protocol.Healed():
                core.healed(uid, now)
            case protocol.Verified():
                core.verified(uid, now)
            case protocol.Stats() as m:
                core.progress(uid, m.step, now, m.left_out, m.step_s)
                self._reports.told(slot, m.told)
                self._stats[slot] = msgspec.structs.asdict(m) | {"uid": uid, "told": None}
            case protocol.Timing() as m:
                self._tables.heard_of_messages(slot, m)
                self._tables.observe(slot, m.global_batch_size, m.steps, now)
            case protocol.Meet() as m:
                self._pass_on(uid, m)
            case protocol.Event() as m:
                core.log.note({"slot": slot, **m.event})
            case protocol.Leave():
                self._leaving.setdefault(uid, self._reports.waiting_for_storage(slot))
            case protocol.Finish() as m:
                core.finish(uid, cursor=m.cursor, confirmed=m.confirmed, now=now)
                self._reports.told(slot, m.told)
            case protocol.Returning():
                core.returning(uid, now)
            case protocol.Raised() as m:
                core.raised(uid, m.error, now)
            case _:
                self._handle_report(uid, slot, message)
                self._compare(slot, message, now)

    def _handle_report(self, uid: str, slot: int, message: protocol.Message) -> None:
        match message:
            case protocol.Report() as m:
                part = {k: v for k, v in msgspec.structs.asdict(m).items() if v is not None} | {"uid": uid}
                if m.audit is not None:
                    part["audit"] = msgspec.structs.asdict(m.audit)
                known = self._reports.part(slot, part)
                if known is not None:
                    self._send(uid, protocol.Acknowledged(keys=[known]))
            case protocol.Stored() as m:
                self._reports.checkpoint_stored(m.key, m.path, m.error)
                if m.path is not None:
                    self._note_checkpoint(m.path, m.cursor)
            case protocol.Evaluate() as m:
                key = f"{self._core.life}/{m.key}"
                reply = self._evaluations.next(key, m.num_chunks, uid, m.result, m.error)
                self._send(uid, protocol.Reply(id=m.id, **reply))

    def _compare(self, slot: int, message: protocol.Message, now: float) -> None:
        """What workers say of their replicas, and of their losses."""
        core = self._core
        match message:
            case protocol.Audit() as m:
                if core.record is not None and m.generation == core.record.number:
                    slots = [p.member.slot for p in core.peers.values() if p.healed and not p.fresh]
                    told = msgspec.structs.asdict(m) | {"audit": msgspec.structs.asdict(m.audit)}
                    if (what := self._audits.add(slot, told, slots)) is not None:
                        core.replicas_differ(audit.message(m.step, what), now)
            case protocol.Claim() as m:
                if (what := self._audits.claim(slot, f"{m.name}, step {m.step + 1},", m.value)) is not None:
                    core.replicas_differ(audit.message_of_losses(what), now)

    def _flush(self) -> None:
        """Send what the logic has decided, stamp its events, and settle reports under the new membership."""
        for event in self._core.log.since(self._noted):
            event.setdefault("time", time.time())
            if event["kind"] in ("lost", "evicted", "left", "finished", "raised"):
                self._evaluations.forget(event["uid"])
                self._joined.discard(event["uid"])
                if event["kind"] in ("lost", "evicted", "left"):
                    self._reports.forget(event["slot"])
                    self._writers = {key: slot for key, slot in self._writers.items() if slot != event["slot"]}
        self._noted = self._core.log.next_seq
        self._send_all()
        if self._core.recovering:
            return  # Who has not come back yet is not lost: its part of a report may be on its way.
        for peer in self._partners():
            if peer.member.uid not in self._joined:
                self._joined.add(peer.member.uid)
                self._reports.joined(peer.member.slot, self._core.life, peer.reports_after)
        self._look_at_calls()
        if self._misused:
            return
        slots = self._slots()
        by_slot = {p.member.slot: p.member.uid for p in self._core.peers.values()}
        for key, slot in self._reports.writer_wanted(slots).items():
            if self._writers.get(key) not in slots:
                self._writers[key] = slot
                self._send(by_slot[slot], protocol.Write(key=key, uids=self._reports.uids(key)))
        for report in self._reports.settle(slots, ended=self._core.over):
            if "differs" in report:
                self._core.replicas_differ(audit.message(report["step"], report["differs"]), self._clock.now())
                self._send_all()
                continue
            report["time"] = time.time()
            report["fraction_of_aggregate"] = fraction_of_aggregate(self._tables, self._core.record)
        self._let_leave()

    def _partners(self) -> list[Peer]:
        return [p for p in self._core.peers.values() if p.healed and not p.fresh]

    def _slots(self) -> list[int]:
        return [p.member.slot for p in self._partners()]

    def _look_at_calls(self) -> None:
        """A report that only some workers make is an error of the program, and so is one that cannot be merged.

        Once a worker has come late, or a step was done again, workers that count their steps themselves may call it at
        different ones: then the report is that of those who called it, and one warning says so.
        """
        text = self._reports.mixed_up()
        if text is None and (text := self._reports.left_out()) is not None and self._core.disturbed:
            if not self._warned:
                self._warned = True
                self._core.log.note({"kind": "warning", "text": f"{text} This report is of those that called it."})
            return
        if text is not None and not self._misused:
            self._misused = True
            self._core.misused(text, self._clock.now())
            self._send_all()

    def _pass_on(self, uid: str, message: protocol.Meet) -> None:
        """Something that a member says to all who meet in a group; the last two are kept for those that come back."""
        if not self._meetings.keep(message.group, message.key, message):
            return
        for other in self._connections:
            if other != uid:
                self._send(other, message)

    def _let_leave(self) -> None:
        """Who holds a checkpoint's snapshot stays until it is stored: its other holder may be killed meanwhile."""
        free = [uid for uid, keys in self._leaving.items() if not self._reports.are_open(keys)]
        for uid in free:
            del self._leaving[uid]
            self._core.leave(uid, self._clock.now())
        if free:
            self._flush()

    def _note_checkpoint(self, path: str, cursor: Cursor) -> None:
        """The newest counts, in whatever order word of them comes."""
        if self._core.checkpoint is None or cursor.step >= self._core.checkpoint_cursor.step:
            self._core.checkpoint, self._core.checkpoint_cursor = path, cursor
            for uid in self._core.peers:
                self._send(uid, self._newest_checkpoint())

    def _newest_checkpoint(self) -> protocol.Checkpoint:
        return protocol.Checkpoint(path=self._core.checkpoint, cursor=self._core.checkpoint_cursor)

    def _acknowledge(self, keys: list[str]) -> None:
        self._reports.acknowledge(keys)
        for uid in self._core.peers if keys else ():
            self._send(uid, protocol.Acknowledged(keys=keys))

    def _send_all(self) -> None:
        for uid, message in self._core.drain():
            self._send(uid, message)

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
