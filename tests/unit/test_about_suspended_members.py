"""What becomes of what a suspended member was about: reports, evaluations, leaves, the end of the run."""

from __future__ import annotations

from typing import Any

import pytest
from runs import run_of
from test_membership_rules import HANG_LIMIT_S, SILENCE_S, START_TIMEOUT_S, cursor, started
from test_suspending import silenced

from raytrain_het.membership import protocol
from raytrain_het.membership.cursor import Cursor
from raytrain_het.membership.message_parts import ReplicaAudit
from raytrain_het.membership.place import Place
from raytrain_het.membership.record import Member
from raytrain_het.membership.switchboard import Switchboard

IN_A_STEP = Place("in step 6, waiting for the others' gradients", True, "step")


class Board:
    """A hub without sockets, and its members."""

    def __init__(self, num_members: int) -> None:
        self.now, self.said = 0.0, list[tuple[str, protocol.Message]]()
        config, context = run_of(num_members, silence_s=SILENCE_S, hang_limit_s=HANG_LIMIT_S)
        self.switchboard = Switchboard(
            config,
            context,
            now=lambda: self.now,
            send=lambda uid, message: self.said.append((uid, message)),
            connected=lambda: [],
        )
        self.run = self.switchboard.core.run
        self.members = [Member(uid=f"{k}-a", slot=k, host="h", state_port=1, device="cpu") for k in range(num_members)]
        for member in self.members:
            values: dict[str, Any] = {"healed": False, "fresh": False, "record": None, "answered": 0, "want": 0}
            values |= {"fingerprint": "", "checkpoint": None, "checkpoint_cursor": None}
            self.switchboard.hello(protocol.Hello(member=member, cursor=Cursor(), **values))

    def hear(self, slot: int, message: protocol.Message) -> None:
        self.switchboard.hear(self.members[slot], message)

    def answer(self, *slots: int, step: int, fresh: bool = False) -> None:
        for slot in slots:
            number = self.run.next.number
            self.hear(
                slot, protocol.Answer(number=number, cursor=Cursor(step=step), healed=True, fresh=fresh, batch=None)
            )

    def report(self, slot: int, key: str, **values: Any) -> None:
        values = {"holds_snapshot": True, "checkpoint": True} | values
        self.hear(slot, protocol.Report(key=key, step=5, epoch=0, metrics={}, **values))

    def suspend(self, slot: int, *, at: float) -> None:
        """This member leaves a ping unanswered while the others wait."""
        others = [k for k in range(len(self.members)) if k != slot]
        self.now = at
        self.hear(others[0], protocol.Waiting())
        self.now = at + 0.1
        for other in others:
            self.hear(other, protocol.Pong(position=1000))
        self.now = at + 0.1 + SILENCE_S
        self.switchboard.tick()
        assert list(self.run.suspended) == [f"{slot}-a"]

    def wakes(self, slot: int, *, at: float) -> None:
        self.now = at
        self.hear(slot, protocol.Pong(position=1000))

    @property
    def record(self) -> Any:
        return self.run.record


def test_one_that_reconnects_after_the_end_does_not_revive_the_run() -> None:
    run = started(num_slots=2, base=5)
    before = run.record
    silenced(run, 1)
    run.answer("0-a", step=5)
    run.core.finish("0-a", cursor=run.record.cursor, confirmed=True, now=11.0)
    number = run.record.number
    run.hello(1, step=5, healed=True, record=before, answered=2, now=12.0)
    assert run.core.run.over and run.record.number == number


def test_nobody_waits_for_one_once_the_run_is_over() -> None:
    board = Board(2)
    board.suspend(1, at=10.0)
    board.answer(0, step=0)
    board.hear(0, protocol.Finish(cursor=Cursor(step=5), confirmed=True))
    status = board.switchboard.status()
    assert status["state"] == "ended"
    assert [m["slot"] for m in status["members"] if m["alive"]] == []


@pytest.mark.parametrize("missed", [False, True])
def test_the_sums_that_one_waits_for_in_an_evaluation_come_when_it_is_back(missed: bool) -> None:
    board = Board(3)

    def evaluate(slot: int, number: int, result: Any = None) -> None:
        board.hear(slot, protocol.Evaluate(id=number, key="5//e/0", num_chunks=2, result=result))

    for slot in range(3):  # The third one finds no chunk, and waits; then the first one.
        evaluate(slot, 1)
    evaluate(0, 2, (0, {"x": 1.0}))
    board.suspend(2, at=10.0)
    if missed:
        board.answer(0, 1, step=5)
        assert board.record.number == 2
    evaluate(1, 2, (1, {"x": 1.0}))
    board.wakes(2, at=12.0)
    replies = [message.id for uid, message in board.said if uid == "2-a" and isinstance(message, protocol.Reply)]
    assert replies == [1]


def test_a_notice_for_a_worker_that_has_returned_early_hangs_nobody() -> None:
    board = Board(2)
    run = board.run
    board.now = 1.0
    board.hear(1, protocol.Finish(cursor=Cursor(step=5), confirmed=False))
    board.switchboard.slot_drains(1, "a notice")
    assert not run.forming
    board.hear(0, protocol.Suspect(generation=1, step=6))
    assert run.forming, "the other one goes on without it"
    board.answer(0, 1, step=5)
    assert [m.slot for m in board.record.members] == [0]


def test_the_state_of_one_that_the_others_have_gone_on_without_is_not_waited_for() -> None:
    run = started(num_slots=3, base=5)
    silenced(run, 2)
    run.answer("0-a", "1-a", step=6)
    assert run.slots == [0, 1]
    for uid in ("0-a", "1-a"):
        run.core.dead(uid, "its process has ended", 12.0)
    for slot in (0, 1):
        run.hello(slot, "b", now=13.0)
    run.core.tick(13.0 + START_TIMEOUT_S)
    assert run.record.reset and run.slots == [0, 1], "they begin again as any run begins"


def test_a_leave_is_not_lost_if_its_reports_are_stored_meanwhile() -> None:
    board = Board(3)
    key = f"{board.run.life}.5.0"
    for slot in (0, 1):
        board.report(slot, key)
    board.switchboard.slot_drains(1, "a notice")
    board.suspend(1, at=10.0)
    board.report(2, key, holds_snapshot=False)
    board.hear(0, protocol.Stored(key=key, path="p", error=None, cursor=Cursor(step=5)))
    board.wakes(1, at=12.0)
    assert board.run.peers["1-a"].phase.value == "leaving"


def test_the_run_does_not_end_while_one_has_still_to_train() -> None:
    """One returns in the middle of an epoch, one is suspended, and the last one dies."""
    run = started(num_slots=3, base=5)
    run.core.finish("0-a", cursor=cursor(5), confirmed=False, now=1.0, complete=False)
    run.core.suspect("1-a", run.record.number, 6, 2.0)
    run.answer("0-a", "1-a", "2-a", step=5)
    assert run.slots == [1, 2]
    run.core.suspect("1-a", run.record.number, 6, 10.0)
    run.core.pong("1-a", 1000, 10.1)
    run.core.tick(10.01 + SILENCE_S)
    assert list(run.core.run.suspended) == ["2-a"]
    run.core.dead("1-a", "its process has ended", 11.0)
    assert not run.core.run.over
    run.core.heard_again("2-a", 11.5)
    assert "end" not in run.messages("2-a")


def test_a_pause_of_the_last_one_that_trains_does_not_end_the_run() -> None:
    run = started(num_slots=2, base=5)
    run.core.finish("0-a", cursor=cursor(5), confirmed=False, now=1.0, complete=False)
    run.core.waiting("0-a", 10.0)
    run.core.pong("0-a", 1000, 10.1, Place("returned", True, "returned"))
    run.core.tick(10.01 + SILENCE_S)
    assert not run.core.run.over


def test_its_report_of_a_step_that_was_done_again_without_it_counts_for_nothing() -> None:
    """It has committed the step alone, so its replica has had other bits."""
    board, key = Board(2), ""
    key = f"{board.run.life}.5.0"

    def audit(digest: str) -> ReplicaAudit:
        return ReplicaAudit(kind="k", numbers=[], tensors=[("w", digest)], samples={})

    board.suspend(1, at=10.0)
    board.answer(0, step=4)
    assert (board.record.number, board.record.base) == (2, 4)
    board.report(0, key, audit=audit("of the others"))
    board.wakes(1, at=12.0)
    board.answer(0, step=5)
    board.hear(1, protocol.Healed())
    board.answer(0, step=6)
    board.answer(1, step=6, fresh=True)
    assert board.record.fresh == ("1-a",)
    board.report(1, key, audit=audit("its own"))
    board.hear(0, protocol.Stored(key=key, path="p", error=None, cursor=Cursor(step=5)))
    assert board.run.failure is None
    assert [report.num_workers for report in board.switchboard.reporting.collector.untaken()] == [1]


def test_who_has_yet_to_catch_up_is_asked_for_the_checkpoint_that_only_it_can_store() -> None:
    """The others may wait for it in the middle of a step, which it takes to catch up."""
    board = Board(3)
    key = f"{board.run.life}.5.0"
    board.report(1, key)
    board.suspend(1, at=10.0)
    board.answer(0, 2, step=5)
    board.wakes(1, at=12.0)
    assert board.run.peers["1-a"].phase.value == "joining"
    for slot in (0, 2):
        board.report(slot, key, holds_snapshot=False)
    assert [uid for uid, message in board.said if isinstance(message, protocol.Write)] == ["1-a"]
    board.hear(1, protocol.Stored(key=key, path="p", error=None, cursor=Cursor(step=5)))
    assert [report.checkpoint for report in board.switchboard.reporting.collector.untaken()] == ["p"]


def test_a_checkpoint_whose_holder_does_not_answer_keeps_nobody_waiting() -> None:
    board = Board(2)
    key = f"{board.run.life}.5.0"
    board.report(0, key, holds_snapshot=False)
    board.report(1, key)
    board.suspend(1, at=10.0)
    board.answer(0, step=5)
    untaken = board.switchboard.reporting.collector.untaken
    assert [report.checkpoint for report in untaken()] == [None]
    assert "does not answer" in str(untaken()[0].checkpoint_error)
    board.wakes(1, at=12.0)
    board.hear(1, protocol.Stored(key=key, path="p", error=None, cursor=Cursor(step=5)))
    assert board.run.checkpoint == "p", "a run that resumes goes on from it"


def test_patience_does_not_grow_by_what_a_watchman_says() -> None:
    """One round of five is that of a call that holds the interpreter."""
    run, at = started(base=5), 10.0

    def round_of(*uids: str) -> None:
        run.core.suspect("0-a", run.record.number, 1, at)
        for uid in uids:
            run.core.pong(uid, 1000, at + 0.001)

    for _ in range(25):
        round_of("0-a", "1-a")
        while not run.core.in_doubt(at):
            at += 0.025
        run.core.runs("2-a", at + 0.002)
        for _ in range(4):
            at += 1.0
            round_of("0-a", "1-a", "2-a")
        at += 10.0
    assert run.core.run.suspicion.patience_s == SILENCE_S


def test_an_owner_that_waits_in_the_step_is_not_dropped_with_the_one_that_hangs() -> None:
    """The third one hangs in its body. The first one owns a bucket and waits for its shard; the second one owns nothing
    of it, and is one bucket further."""
    run, now = started(num_slots=3, base=5), 10.0
    places = {"0-a": (1, IN_A_STEP), "1-a": (2, IN_A_STEP), "2-a": (0, Place("computing step 6", False, "step"))}
    while now < 10 + 3 * HANG_LIMIT_S and set(run.core.run.peers) == set(places):
        run.core.suspect("1-a", run.record.number, 6, now)
        for uid, (position, place) in places.items():
            if uid in run.core.run.peers:
                run.core.pong(uid, position, now + 0.01, place)
        now += 1.0
    assert [e["slot"] for e in run.log() if e["kind"] == "evicted"] == [2]
