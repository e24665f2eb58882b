"""A model of the members around the real :class:`Membership`, small enough to enumerate what can happen to them.

The hub is the real state machine. Members are modelled by the rules of ``membership/agent.py``,
``allreduce/communicator.py`` and ``worker/state/healing.py``, a rule a method:

- a void is answered when it is read; a want travels in the headers of a step, so all who finish the step learn
  the highest;
- a step (or an epoch's confirming round) can be finished once every member has launched it, by each member on
  its own, and only while its generation is in force for that member (`MemberAgent.is_current`); finishing it
  commits it;
- who is one step behind takes the source's kept sums and commits them under the new generation;
- an unhealed member follows the steps with headers alone, takes a snapshot, says that it is healed, and
  compares itself to the source under the record that says so, before its first own step;
- messages travel in order within one connection and not at all after a restart of the hub; a process may die
  with messages under way.

What a replica holds is modelled as its *history*: by step, the generation whose sums were applied. Two replicas
agree if, and only if, one's history is the beginning of the other's.
"""

from __future__ import annotations

import operator
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

from runs import run_of

from raytrain_het.membership.cursor import Cursor
from raytrain_het.membership.departures import lose
from raytrain_het.membership.event_log import EventLog
from raytrain_het.membership.logic import Membership
from raytrain_het.membership.peers import Peer, Phase, Standing
from raytrain_het.membership.record import Member, Record
from raytrain_het.membership.state import RunState

Event = tuple[Any, ...]
NEVER = 1e9


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """What may happen in one enumeration. Each number is a budget."""

    slots: int = 2
    steps: int = 2
    epoch: int = 2
    """Steps of an epoch, at whose end all confirm; 0 leaves the loop by ``break``, without a confirming round."""
    deaths: int = 0
    refills: int = 0
    late: int = 0
    """So many slots, the last ones, are vacant at first and join later."""
    leaves: int = 0
    raises: int = 0
    broken_links: int = 0
    restarts: int = 0
    stops: int = 0
    """Processes that stop for good without dying (they answer no ping)."""
    returns: int = 0
    """Functions that return before the others' do, in the middle of an epoch too."""
    impatient: int = 0
    """Times that somebody suspects its peers although they are only slow."""
    hasty: int = 0
    """Times that silence is believed although the process is only slow: it is suspended, and comes back."""
    cuts: int = 0
    """Connections to the hub that are cut while the process lives on: it connects again."""


class Violation(AssertionError):
    """The protocol did what it must not."""


class Worker:
    """One member process."""

    __slots__ = (
        "answered",
        "asked",
        "broken",
        "cached",
        "confirm_due",
        "confirmed",
        "connected",
        "cursor",
        "failed_said",
        "finish_said",
        "followed",
        "followed_to",
        "fresh",
        "gone",
        "healed",
        "hist",
        "inbox",
        "launched",
        "leave_said",
        "need",
        "outbox",
        "record",
        "slot",
        "snap",
        "snap_source",
        "stale",
        "state",
        "uid",
        "void",
        "want",
    )

    def __init__(self, uid: str, slot: int) -> None:
        self.uid, self.slot = uid, slot
        self.state = "up"  # or stopped, dead, out
        self.gone: str | None = None
        self.connected = True
        self.inbox: tuple[Any, ...] = ()
        self.outbox: tuple[Any, ...] = ()
        self.record: Record | None = None
        self.cursor = self.want = self.void = self.answered = self.broken = self.launched = self.failed_said = 0
        self.stale = False  # It has missed a generation: what it holds is of the past.
        self.healed = self.fresh = self.finish_said = self.leave_said = self.confirm_due = False
        self.confirmed = 0
        self.hist: tuple[int, ...] = ()
        self.need: str | None = None  # reset, behind, fresh, unhealed (not yet taken over), following, or nothing
        self.followed: tuple[tuple[int, int], ...] = ()
        self.followed_to = -1
        self.snap: tuple[int, ...] | None = None
        self.snap_source = ""
        self.asked = 0
        self.cached: tuple[Any, ...] | None = None

    def copy(self) -> Worker:
        new = Worker.__new__(Worker)
        for name, value in zip(Worker.__slots__, _fields(self), strict=True):
            setattr(new, name, value)
        return new

    def key(self) -> tuple[Any, ...]:
        """All of it, as something that can be compared."""
        if self.cached is None:
            self.cached = (id(self.record), *_hashable(self))
        return self.cached

    @property
    def number(self) -> int:
        return self.record.number if self.record else 0

    @property
    def operation(self) -> tuple[str, int, int]:
        """What it has launched."""
        assert self.record is not None
        return (self.record.group, self.number, self.launched)

    @property
    def current(self) -> bool:
        return self.record is not None and self.answered <= self.number >= self.void and self.broken < self.number

    @property
    def may_commit(self) -> bool:
        """``MemberAgent.is_current``; a broken group alone forbids no commit of what was received."""
        return self.record is not None and self.answered <= self.number >= self.void

    @property
    def holds(self) -> bool:
        """Whether it says that its replica is one of those that count."""
        return self.healed and not self.fresh and not self.stale


_fields = operator.attrgetter(*Worker.__slots__)
_hashable = operator.attrgetter(*(name for name in Worker.__slots__ if name not in ("cached", "record")))


class Sent:
    """A record on its way, hashable. Equal records are one object, so that worlds which hold them are equal."""

    _known: dict[tuple[Any, ...], Sent] = {}

    def __init__(self, record: Record) -> None:
        self.record = record

    @classmethod
    def of(cls, record: Record) -> Sent:
        key = (
            record.number,
            record.incarnation,
            record.base,
            record.source,
            record.reset,
            record.group,
            record.shares,
            tuple(m.uid for m in record.members),
            record.behind,
            record.unhealed,
            record.fresh,
        )
        return cls._known.setdefault(key, cls(record))


def _copy_peer(peer: Peer) -> Peer:
    new = Peer.__new__(Peer)
    new.__dict__.update(peer.__dict__)
    return new


class World:
    """The hub, the workers, and what is under way between them."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.config, self.context = run_of(scenario.slots, silence_s=0.5, hang_limit_s=NEVER, start_timeout_s=NEVER)
        self.core = Membership(self.config, self.context, incarnation=1)
        self.workers: dict[str, Worker] = {}
        self._owned: set[str] = set()
        self.ring: dict[tuple[str, int, int], tuple[tuple[str, int], ...]] = {}
        self.budget = {
            name: getattr(scenario, name)
            for name in (
                "deaths",
                "refills",
                "leaves",
                "raises",
                "broken_links",
                "restarts",
                "stops",
                "returns",
                "impatient",
                "hasty",
                "cuts",
            )
        }
        self.highest = 0
        self.unlinked = 0
        self.born = 0
        for slot in range(scenario.slots):
            late = slot >= scenario.slots - scenario.late
            if late:
                self.core.slot_vacant(slot, "later", 0.0)
            self._start(slot)

    @property
    def run(self) -> RunState:
        """What the hub knows."""
        return self.core.run

    def _start(self, slot: int) -> None:
        self.born += 1
        worker = Worker(f"{slot}-{self.born}", slot)
        self.workers[worker.uid] = worker
        self._owned.add(worker.uid)
        self._hello(worker)

    def _own(self, uid: str) -> Worker:
        """A worker that may be changed; worlds share those that have not changed since they parted."""
        if uid not in self._owned:
            self._owned.add(uid)
            self.workers[uid] = self.workers[uid].copy()
        worker = self.workers[uid]
        worker.cached = None
        return worker

    def copy(self) -> World:
        new = World.__new__(World)
        new.__dict__.update(self.__dict__)
        new.core = copy(self.core)
        new.core.run = run = copy(self.run)
        run.peers = {uid: _copy_peer(p) for uid, p in run.peers.items()}
        run.suspended = {uid: replace(s, peer=_copy_peer(s.peer)) for uid, s in run.suspended.items()}
        run.log, run.outbox = EventLog(first_seq=0), []
        for part in ("deaths", "suspicion", "next", "restart", "waits"):
            setattr(run, part, copy(getattr(run, part)))
        for owner, names in (
            (run, ("vacant", "dead_slots", "finished_slots", "gone")),
            (run.deaths, ("fruitless", "in_step", "lost")),
        ):
            for name in names:
                setattr(owner, name, getattr(owner, name).copy())
        if run.suspicion.round is not None:
            run.suspicion.round = replace(run.suspicion.round)
        new.workers = dict(self.workers)
        new._owned = set()
        self._owned = set()
        new.ring = dict(self.ring)
        new.budget = dict(self.budget)
        return new

    def key(self) -> tuple[Any, ...]:
        """All that decides what can happen from here."""
        run = self.run
        everybody = run.peers | {uid: s.peer for uid, s in run.suspended.items()}
        peers = tuple(
            (
                u,
                p.phase,
                p.cursor.step,
                p.healed,
                p.answered,
                p.fresh,
                p.confirmed,
                p.heard,
                p.first_base,
                p.position,
            )
            for u, p in everybody.items()
        )
        suspended = tuple((uid, s.generation, s.asked_for) for uid, s in run.suspended.items())
        deaths, suspected = run.deaths, run.suspicion.round
        return (
            run.incarnation,
            run.next.number,
            id(run.record),
            run.next.voided,
            run.failure,
            peers,
            suspended,
            tuple(sorted(run.vacant)),
            tuple(sorted(run.finished_slots)),
            tuple(sorted(run.gone)),
            tuple(sorted(deaths.fruitless.items())),
            tuple(sorted(deaths.in_step.items())),
            len(deaths.lost),
            id(run.restart.record),
            run.restart.needs_void,
            run.first_hello is None,
            run.suspicion.since,
            run.next.some_have_answered,
            None if suspected is None else (suspected.in_a_step, suspected.vouched),
            tuple(w.key() for w in self.workers.values()),
            tuple(sorted(self.ring.items())),
            tuple(self.budget.values()),
            self.unlinked,
        )

    # ---------------------------------------------------------------- what can happen

    def events(self) -> tuple[list[Event], list[Event]]:
        """What goes on by itself, and what a budget may add. With none of the first the run stands still."""
        own: list[Event] = []
        added: list[Event] = []
        for uid, w in self.workers.items():
            if w.outbox and not self._waits_behind_its_predecessor(w):
                own.append(("to_hub", uid))
            if w.state in ("dead", "out") and not w.outbox and (uid in self.run.suspended or uid in self.run.peers):
                own.append(("prove", uid))
            if w.state != "up":
                continue
            if w.inbox:
                own.append(("to_worker", uid))
            own += [(name, uid) for name in self._protocol(w)]
            if self.budget["leaves"] and w.connected and not w.leave_said and w.number and not w.finish_said:
                added.append(("leave", uid))
            if self.budget["raises"] and w.connected and w.number and not w.finish_said:
                added.append(("raise", uid))
            if self.budget["returns"] and w.connected and self._may_return(w):
                added.append(("return", uid))
            if self.budget["impatient"] and w.connected and w.current and w.launched:
                added.append(("lose_patience", uid))
            if self.budget["deaths"] and w.connected:
                added.append(("die", uid))
            if self.budget["stops"] and w.number:
                added.append(("stop", uid))
            if self.budget["cuts"] and w.connected and w.number:
                added += [("cut", uid, True), ("cut", uid, False)]
        lost = ("dead", "out")
        taken = {w.slot for w in self.workers.values() if w.state not in lost and w.uid not in self.run.gone}
        for slot in range(self.scenario.slots):
            if slot in taken or slot in self.run.finished_slots:
                continue
            if self.budget["refills"]:
                own.append(("refill", slot))
            elif slot not in self.run.vacant:
                own.append(("vacant", slot))
        if self.budget["restarts"] and self.run.record is not None and self.run.failure is None:
            added.append(("restart",))
        if self.budget["broken_links"] and self.run.record is not None and len(self.run.record.members) > 1:
            added.append(("break_link",))
        recovering, suspected = self.run.recovering, self.run.suspicion.round
        silent = suspected is not None and suspected.unheard(self.run.members())
        if self.budget["hasty"] and (recovering or silent):
            added.append(("tick", True))
        if not own:
            own += self._time_passes()
        return own, added

    def _time_passes(self) -> list[Event]:
        """Deadlines, which matter only when nothing else goes on."""
        found: list[Event] = []
        peers = self.run.peers
        if any(self.workers[uid].state == "stopped" for uid in peers) and self.run.suspicion.round is None:
            found += [("suspect", u) for u, w in self.workers.items() if w.state == "up" and w.connected and w.current]
        elif any(p.phase is Phase.FINISHED for p in peers.values()) and not self.run.next.voided:
            found += [("suspect", u) for u, w in self.workers.items() if w.state == "up" and w.current and w.launched]
        if self.run.suspicion.round is not None or self.run.forming or self.run.recovering:
            later = self.copy()
            later.happen(("tick",))
            if later.key() != self.key():
                found.append(("tick",))
        # The hang limit, after which nobody is waited for any longer.
        found += [("give_up", u) for u in [*peers, *self.run.suspended] if self.workers[u].state == "stopped"]
        return found

    def _waits_behind_its_predecessor(self, w: Worker) -> bool:
        """A slot's connections are accepted in order: its next process says hello after the last one has."""
        return w.outbox[0][0] == "hello" and any(
            o.slot == w.slot and o.outbox and o.outbox[0][0] == "hello" and o.state == "dead" and w.state != "dead"
            for o in self.workers.values()
        )

    def _protocol(self, w: Worker) -> list[str]:
        """The rules of a member that apply now."""
        found: list[str] = []
        record = w.record
        if record is None:
            return found
        if w.current and self._group_is_torn(w):
            found.append("fail")
        source = self.workers.get(record.source or "")
        there = source is not None and source.state == "up" and source.number == record.number
        if w.may_commit:
            assert source is not None
            if w.need == "reset" and (source is w or (there and source.need is None)):
                found.append("load")
            elif w.need == "behind" and there and w.current:
                found.append("replay")
            elif w.need == "fresh" and there and source.need is None:
                found.append("verify")
            elif w.need == "unhealed":
                found.append("take_over")
            elif (
                w.need == "following"
                and w.asked != record.number
                and (w.snap is not None or there and source.need is None)
            ):
                found.append("heal")
        over = w.finish_said and w.need is None  # Nobody is left there to open a step.
        if w.current and w.need in (None, "unhealed", "following") and not over:
            position = self._position(w)
            if position and w.launched < position:
                found.append("launch")
        if w.launched and w.may_commit and self._all_launched(w):
            found.append("commit")
        if self._is_through(w):
            found.append("finish")
        return found

    def _position(self, w: Worker) -> int:
        """The next thing to do together: ``2 t`` is step t, ``2 t + 1`` the confirming round after it."""
        at = w.cursor if w.need is None else w.followed_to
        if w.confirm_due:
            return 2 * at + 1
        return 2 * (at + 1) if at < self.scenario.steps else 0

    def _all_launched(self, w: Worker) -> bool:
        assert w.record is not None
        launched = self.ring.get(w.operation, ())
        return len(launched) == len(w.record.members) and w.launched == self._position(w)

    def _group_is_torn(self, w: Worker) -> bool:
        """Whether an operation of its generation can fail: a peer is gone has left the group, or the link broke."""
        assert w.record is not None
        if not w.launched and w.need not in ("behind", "unhealed", "following"):
            return False
        number = w.number
        if self.unlinked == number:
            return True
        for member in w.record.members:
            other = self.workers[member.uid]
            if other.state in ("dead", "out") or other.broken >= number or other.void > number:
                return True
            if other.number > number and other.record is not None and other.record.group != w.record.group:
                return True
        return False

    def _is_through(self, w: Worker) -> bool:
        if w.finish_said or w.need is not None or w.cursor < self.scenario.steps or not w.connected:
            return False
        return not self.scenario.epoch or (not w.confirm_due and w.may_commit)

    def _may_return(self, w: Worker) -> bool:
        """Between two steps: out of one a function raises, or closes it first."""
        between = w.record is not None and w.holds and w.need is None and not w.launched and not w.confirm_due
        return between and not w.finish_said and w.cursor < self.scenario.steps

    # ---------------------------------------------------------------- making it happen

    def happen(self, event: Event) -> None:
        """Let one thing happen, and check all that must hold after it."""
        name = event[0]
        issued = self.run.record
        getattr(self, "_on_" + name)(*event[1:])
        if self.run.record is not None and self.run.record is not issued:
            self.run.record = Sent.of(self.run.record).record
        self._mark_those_left_out(issued)
        self._deliver()
        self._normalise()
        if self.run.record is not issued and self.run.record is not None and name != "restart":
            self._check_record(self.run.record, issued)
        self._check()

    def _mark_those_left_out(self, before: Record | None) -> None:
        """Whoever was suspended while a generation was formed, or while the run ended, holds a state of the past."""
        record = self.run.record
        formed = record is not None and record is not before
        for uid in self.run.suspended:
            if self.run.over or formed and record is not None and record.rank_of(uid) is None:
                self._own(uid).stale = True

    def _now(self) -> float:
        return 1.0 if self.run.suspicion.round is not None else 0.0

    def _normalise(self) -> None:
        """Only the order of times matters: keep whether a member was heard of since the round of pings began."""
        run = self.run
        suspicion = run.suspicion
        began = suspicion.round.began if suspicion.round is not None else NEVER
        for peer in run.peers.values():
            peer.heard = 1.0 if peer.heard > began else 0.0
            peer.away = False
        for suspended in run.suspended.values():
            suspended.peer.heard, suspended.peer.away = 0.0, False
        suspicion._answers_take_s = 0.0
        if suspicion.round is not None:
            suspicion.round.began = 0.0
        run.next.since = 0.0
        if run.first_hello is not None:
            run.first_hello = 0.0
        if suspicion.since is not None:
            suspicion.since = (*suspicion.since[:2], 0.0)

    def _deliver(self) -> None:
        for uid, message in self.core.drain():
            w = self.workers[uid]
            if w.state in ("dead", "out", "stopped") or not w.connected:
                continue
            w = self._own(uid)
            kind = message.kind
            if kind == "record":
                assert self.run.record is not None
                w.inbox += (("record", message.record.number, Sent.of(self.run.record)),)
            elif (
                kind == "end"
                and w.holds
                and (w.record is None or uid not in w.record.fresh or w.cursor > w.record.base)
            ):
                raise Violation(f"{uid} is sent away though it trains")
            else:
                w.inbox += ((kind, getattr(message, "number", 0)),)

    def _say(self, w: Worker, *message: Any) -> None:
        if w.connected:
            w.outbox += (message,)

    # The hub reads.

    def _on_to_hub(self, uid: str) -> None:
        w, core, now = self._own(uid), self.core, self._now()
        (kind, *values), w.outbox = w.outbox[0], w.outbox[1:]
        if kind == "hello":
            step, healed, fresh, record, answered, want = values
            core.hello(
                _member(w),
                Standing(cursor=_cursor(step), healed=healed, fresh=fresh),
                now=now,
                record=record.record if record else None,
                answered=answered,
                want=want,
            )
            return
        core.heard_again(uid, now)
        if uid not in self.run.peers:
            return
        if kind == "dead":
            core.dead(uid, "its process has ended", now)
        elif kind == "answer":
            number, step, healed, fresh = values
            core.answer(uid, number, Standing(cursor=_cursor(step), healed=healed, fresh=fresh), now=now)
        elif kind == "finish":
            core.finish(uid, cursor=_cursor(values[0]), confirmed=values[1], now=now)
        elif kind == "failed":
            core.failed(uid, values[0], "torn", now)
        elif kind == "suspect":
            core.suspect(uid, values[0], values[1], now)
        elif kind == "raised":
            core.raised(uid, "ValueError", now)
        else:
            getattr(core, {"pong": "pong"}.get(kind, kind))(*((uid, 0, now) if kind == "pong" else (uid, now)))

    def _on_vacant(self, slot: int) -> None:
        self.core.slot_vacant(slot, "nobody comes", self._now())

    def _on_tick(self, added: bool = False) -> None:
        if added:
            self.budget["hasty"] -= 1
        self.core.tick(100.0 if self.run.recovering else 1.0)

    def _on_restart(self) -> None:
        self.budget["restarts"] -= 1
        self.core = Membership(self.config, self.context, incarnation=self.run.incarnation + 1)
        for uid in self.workers:
            w = self._own(uid)
            w.outbox = ()
            if w.connected:
                w.connected = False
                if w.state == "up":
                    w.inbox += (("eof", 0),)

    # A worker's connection.

    def _on_refill(self, slot: int) -> None:
        self.budget["refills"] -= 1
        self._start(slot)

    def _hello(self, w: Worker) -> None:
        record = Sent.of(w.record) if w.record is not None else None
        self._say(w, "hello", w.cursor, w.healed, w.fresh, record, w.answered, w.want)

    def _on_to_worker(self, uid: str) -> None:
        w = self._own(uid)
        message, w.inbox = w.inbox[0], w.inbox[1:]
        kind, number = message[:2]
        if kind == "ping":
            self._say(w, "pong")
        elif kind == "want":
            w.want = max(w.want, number)
        elif kind == "void":
            w.want, w.void = max(w.want, number), max(w.void, number)
            if w.void > w.answered:
                self._answer(w, w.void)
        elif kind == "record":
            if number > w.number:
                w.want = max(w.want, number)
                self._enter(w, message[2].record)
        elif kind == "eof":
            w.connected = True
            self._hello(w)
            if w.failed_said and w.failed_said == w.number:
                self._say(w, "failed", w.failed_said)
            if w.finish_said:
                self._say(w, "finish", w.cursor, w.confirmed >= w.cursor)
        else:
            w.gone, w.state, w.inbox = kind, "out", ()

    def _answer(self, w: Worker, number: int) -> None:
        if number > w.answered:
            w.answered = number
            self._say(w, "answer", number, w.cursor, w.healed, w.fresh)

    def _enter(self, w: Worker, record: Record) -> None:
        """The communication thread takes up a record (a void of it that came meanwhile is seen by ``may_commit``)."""
        w.record, w.launched, w.confirm_due = record, 0, False
        if record.reset:
            w.need = "reset"
        elif w.uid in record.behind:
            w.need = "behind"
        elif w.uid in record.fresh:
            w.need = "fresh"
        elif w.uid in record.unhealed:
            w.need = "following"
            if w.followed_to != record.base:
                w.followed, w.followed_to, w.need = (), record.base, "unhealed"
            elif w.snap is None or w.snap_source != record.source:
                w.need = "unhealed"
        else:
            w.need = None
            w.confirmed = max(w.confirmed, record.base)

    # The protocol.

    def _on_load(self, uid: str) -> None:
        w = self._own(uid)
        assert w.record is not None
        w.hist, w.cursor, w.healed, w.fresh, w.need = (), w.record.base, True, False, None
        w.stale &= w.number < self.highest

    def _on_replay(self, uid: str) -> None:
        w = self._own(uid)
        assert w.record is not None
        base, source = w.record.base, self.workers[w.record.source or ""]
        if len(source.hist) < base or len(w.hist) != base - 1:
            raise Violation(f"{uid} cannot replay step {base} from {source.uid}")
        w.hist = source.hist[:base]
        w.cursor, w.need, w.healed = base, None, True
        w.confirmed = max(w.confirmed, base)

    def _on_take_over(self, uid: str) -> None:
        w = self._own(uid)
        w.need, w.healed, w.fresh, w.snap = "following", False, False, None
        w.stale &= w.number < self.highest

    def _on_heal(self, uid: str) -> None:
        w = self._own(uid)
        assert w.record is not None
        if w.snap is None:
            w.snap = self.workers[w.record.source or ""].hist[: w.record.base]
            w.snap_source = w.record.source or ""
        w.snap += tuple(g for step, g in w.followed if step > len(w.snap))
        w.hist, w.healed, w.fresh, w.asked = w.snap, True, True, w.number
        self._say(w, "healed")

    def _on_verify(self, uid: str) -> None:
        w = self._own(uid)
        assert w.record is not None
        source = self.workers[w.record.source or ""]
        if len(source.hist) != w.record.base:
            raise Violation(f"{source.uid} has moved on before {uid} compared itself")
        w.hist, w.cursor, w.fresh, w.need = source.hist, w.record.base, False, None
        w.followed, w.followed_to, w.snap = (), -1, None
        w.confirmed = max(w.confirmed, w.record.base)
        self._say(w, "verified")

    def _on_launch(self, uid: str) -> None:
        w = self._own(uid)
        w.launched = self._position(w)
        self.ring[w.operation] = tuple(sorted((*self.ring.get(w.operation, ()), (uid, max(w.want, w.number)))))

    def _on_commit(self, uid: str) -> None:
        w = self._own(uid)
        step, confirming = divmod(w.launched, 2)
        want = max(n for _, n in self.ring[w.operation])
        w.launched = 0
        if confirming:
            w.confirm_due = False
            w.confirmed = max(w.confirmed, step)
        else:
            w.cursor = step
            if w.need is None:
                w.hist += (w.number,)
                w.confirmed = max(w.confirmed, step - 1)
            else:
                w.followed, w.followed_to = (*w.followed, (step, w.number)), step
            epoch = self.scenario.epoch
            w.confirm_due = bool(epoch) and step % epoch == 0 and want <= w.number
        if want > w.number:
            self._answer(w, want)

    def _on_fail(self, uid: str) -> None:
        w = self._own(uid)
        w.broken = w.failed_said = w.number
        self._say(w, "failed", w.number)

    def _on_suspect(self, uid: str) -> None:
        w = self._own(uid)
        self._say(w, "suspect", w.number, w.cursor)

    def _on_finish(self, uid: str) -> None:
        w = self._own(uid)
        w.finish_said = True
        self._say(w, "finish", w.cursor, w.confirmed >= w.cursor)

    # What the budgets add.

    def _on_die(self, uid: str) -> None:
        self.budget["deaths"] -= 1
        w = self._own(uid)
        w.state, w.inbox = "dead", ()
        self._say(w, "dead")

    def _on_cut(self, uid: str, received: bool) -> None:
        """What was said to the hub is lost, and what the hub has said unless it was ``received``."""
        self.budget["cuts"] -= 1
        w = self._own(uid)
        w.outbox, w.connected = (), False
        w.inbox = (*(w.inbox if received else ()), ("eof", 0))
        self.core.disconnected(uid)

    def _on_prove(self, uid: str) -> None:
        """The hub asks the machine of a process, which knows that it has ended."""
        self.core.dead(uid, "its process has ended", self._now())

    def _on_give_up(self, uid: str) -> None:
        lose(self.run, uid, "the hang limit has passed", self._now(), died=False)

    def _on_stop(self, uid: str) -> None:
        self.budget["stops"] -= 1
        self._own(uid).state = "stopped"

    def _on_leave(self, uid: str) -> None:
        self.budget["leaves"] -= 1
        w = self._own(uid)
        w.leave_said = True
        self._say(w, "leave")

    def _on_raise(self, uid: str) -> None:
        self.budget["raises"] -= 1
        w = self._own(uid)
        self._say(w, "raised")
        w.state, w.gone, w.inbox = "out", "raised", ()

    def _on_return(self, uid: str) -> None:
        self.budget["returns"] -= 1
        self._on_finish(uid)

    def _on_lose_patience(self, uid: str) -> None:
        self.budget["impatient"] -= 1
        self._on_suspect(uid)

    def _on_break_link(self) -> None:
        self.budget["broken_links"] -= 1
        assert self.run.record is not None
        self.unlinked = self.run.record.number

    # ---------------------------------------------------------------- what must hold

    def _check_record(self, record: Record, previous: Record | None) -> None:
        workers = self.workers
        if any(w.record is record for w in workers.values()):
            return  # Put in force again by a restarted hub.
        if self.run.failure is not None:
            raise Violation("a generation follows a failure")
        members = [workers[m.uid] for m in record.members]
        before = max(w.number for w in members) if self.scenario.restarts else self.highest
        if record.number <= before or previous is not None and record.number <= previous.number:
            raise Violation(f"number {record.number} follows {before}")
        self.highest = record.number
        alive = [w for w in members if w.state in ("up", "stopped")]
        if record.reset:
            holding = [w.uid for w in alive if w.holds]
            if holding:
                raise Violation(f"a reset though {holding} hold a state")
            return
        source = workers[record.source or ""]
        if record.source in record.unhealed + record.fresh + record.behind:
            raise Violation("the source is no holder of the base step")
        if len(source.hist) != record.base:
            raise Violation(f"the source holds {source.hist}, the base is {record.base}")
        for w in alive:
            rank = record.rank_of(w.uid)
            assert rank is not None
            if w.holds and len(w.hist) > record.base:
                raise Violation(f"step {len(w.hist)} of {w.uid} would be undone by base {record.base}")
            if w.uid in record.behind and (len(w.hist) != record.base - 1 or not w.holds):
                raise Violation(f"{w.uid} is not one step behind")
            if w.uid in record.unhealed and record.shares[rank]:
                raise Violation(f"{w.uid} has a share though it is not healed")
            ready = w.uid not in record.unhealed + record.behind + record.fresh
            if ready and (not w.holds or len(w.hist) != record.base or w.cursor != record.base):
                raise Violation(f"{w.uid} is taken for ready, with {w.hist} at {w.cursor}")
        lengths = [len(w.hist) for w in alive if w.holds and w.uid not in record.unhealed]
        if lengths and max(lengths) - min(lengths) > 1:
            raise Violation("healed members are more than one step apart")

    def _check(self) -> None:
        acting: dict[int, Record] = {}
        longest: tuple[int, ...] = ()
        for uid, w in self.workers.items():
            finished = w.gone == "bye" and w.finish_said and not w.stale and not self.scenario.restarts
            if w.state != "up" and not finished:
                continue
            if w.state == "up" and w.record is not None and acting.setdefault(w.number, w.record) is not w.record:
                raise Violation(f"two records have number {w.number}")
            peer = self.run.peers.get(uid)
            if finished or w.holds and peer is not None and peer.phase is not Phase.JOINING:
                if w.cursor != len(w.hist):
                    raise Violation(f"{uid} says step {w.cursor} and holds {w.hist}")
                shared = min(len(longest), len(w.hist))
                if longest[:shared] != w.hist[:shared]:
                    raise Violation(f"replicas differ: {longest} and {w.hist}")
                longest = max(longest, w.hist, key=len)

        self._check_nobody_is_forgotten()

    def _check_nobody_is_forgotten(self) -> None:
        """What a run would end without all the same: every want is told, and every healed member gets its share."""
        run = self.run
        if run.record is None or run.failure is not None or run.recovering:
            return
        for uid, peer in run.peers.items():
            w = self.workers[uid]
            if w.state != "up" or not w.connected or w.outbox or w.inbox or peer.phase is Phase.JOINING:
                continue
            if run.forming and max(w.want, w.answered) < run.next.number:
                raise Violation(f"{uid} was not told that generation {run.next.number} is wanted")
            if w.asked == w.number == run.record.number and w.need == "following" and w.fresh and not run.forming:
                raise Violation(f"{uid} is healed and nobody gives it a share")
        joining = [u for u, p in run.peers.items() if p.phase is Phase.JOINING]
        if joining and not run.forming:
            raise Violation(f"nobody lets {joining} in")
        fresh = [u for u in run.record.fresh if u in run.peers and not self.workers[u].outbox]
        settled = not run.forming and not run.record.unhealed and len(fresh) == len(run.record.fresh)
        if fresh and settled and not any(run.peers[u].fresh for u in fresh):
            raise Violation(f"{fresh} have compared themselves and are called fresh for good")

    def check_end(self) -> str:
        """Nothing goes on by itself any more: was everybody let go, in the way that befits it? Returns how it ended."""
        scenario, run = self.scenario, self.run
        left = [w for w in self.workers.values() if w.state == "up"]
        if left:
            raise Violation(f"{[w.uid for w in left]} wait for ever")
        excused = scenario.stops or scenario.hasty or scenario.restarts
        for w in self.workers.values():
            if w.gone == "evicted" and not excused:
                raise Violation(f"{w.uid} was evicted for nothing")
            if w.finish_said and w.gone not in ("bye", "evicted", "fail", "end", None):
                raise Violation(f"{w.uid} has finished and was told {w.gone}")
            if w.gone == "bye" and not (w.finish_said or w.leave_said):
                raise Violation(f"{w.uid} was let go without having asked")
        if run.failure is not None:
            if not scenario.raises:
                raise Violation(f"the run failed: {run.failure}")
            return "failed"
        if any(w.gone == "raised" for w in self.workers.values()) and not scenario.restarts:
            raise Violation("a function has raised and the run has not failed")
        if any(w.gone == "bye" and w.finish_said for w in self.workers.values()):
            return "ended"
        if run.peers:
            raise Violation(f"the hub still counts on {list(run.peers)}")
        return "empty"


def _member(w: Worker) -> Member:
    return Member(uid=w.uid, slot=w.slot, host="host", state_port=1, device="cpu")


def _cursor(step: int) -> Cursor:
    return Cursor(step=step)
