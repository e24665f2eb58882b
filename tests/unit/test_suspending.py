"""Members that do not answer are suspended, and what happens to them then."""

from __future__ import annotations

import pytest
from runs import run_of
from test_membership_rules import HANG_LIMIT_S, SILENCE_S, Run, started

from raytrain_het.membership import protocol
from raytrain_het.membership.cursor import Cursor
from raytrain_het.membership.protocol import Message
from raytrain_het.membership.record import Member
from raytrain_het.membership.switchboard import Switchboard


def silenced(run: Run, *slots: int, at: float = 10.0) -> None:
    """Members of these slots leave a ping unanswered until the patience with them is over."""
    run.core.suspect("0-a", run.record.number, 1, at)
    for uid in list(run.core.run.peers):
        if int(uid.split("-")[0]) not in slots:
            run.core.pong(uid, 1000, at + 0.1)
    run.core.tick(at + SILENCE_S + 0.01)
    run.messages()


def test_who_has_missed_nothing_stands_where_it_stood() -> None:
    run = started(base=5)
    silenced(run, 2)
    run.answer("0-a", step=5)
    run.core.heard_again("2-a", 11.0)
    assert run.messages("2-a") == ["void"], "it has not heard of the generation that is being formed"
    run.answer("1-a", "2-a", step=5)
    assert (run.slots, run.record.unhealed, run.record.base) == ([0, 1, 2], (), 5)


def test_who_has_answered_before_it_was_suspended_need_not_do_so_again() -> None:
    run = started(base=5)
    run.core.failed("0-a", run.record.number, "torn", 9.0)
    run.answer("2-a", step=5)
    run.core.waiting("0-a", 10.0)
    for uid in ("0-a", "1-a"):
        run.core.pong(uid, 1000, 10.1)
    run.core.tick(10.0 + SILENCE_S)
    assert list(run.core.run.suspended) == ["2-a"]
    run.core.heard_again("2-a", 11.0)
    run.answer("0-a", "1-a", step=5)
    assert (run.slots, run.record.unhealed) == ([0, 1, 2], ())


def test_who_has_missed_a_generation_heals_like_a_joiner_whatever_it_says_it_holds() -> None:
    run = started(base=5)
    silenced(run, 2)
    run.answer("0-a", "1-a", step=5)
    assert run.slots == [0, 1]
    run.core.heard_again("2-a", 12.0)
    run.answer("0-a", "1-a", step=6)
    assert (run.slots, run.record.unhealed) == ([0, 1, 2], ("2-a",))
    run.core.failed("0-a", run.record.number, "torn", 13.0)
    run.answer("0-a", "1-a", "2-a", step=6)
    assert run.record.unhealed == ("2-a",), "its answer was of a state of the past"


def test_suspensions_never_vacate_a_slot() -> None:
    run = started(base=5)
    for k in range(5):
        at = 10.0 * (k + 1)
        silenced(run, 2, at=at)
        run.answer("0-a", "1-a", step=5 + k)
        run.core.heard_again("2-a", at + 1)
        run.answer("0-a", "1-a", step=6 + k)
    assert run.kinds().count("suspended") == run.kinds().count("came_back") == 5
    assert not run.core.run.dead_slots and "lost" not in run.kinds()


def test_a_suspended_member_is_lost_after_the_hang_limit_and_told_so_if_it_comes_back() -> None:
    run = started(base=5)
    silenced(run, 2)
    run.answer("0-a", "1-a", step=5)
    run.core.tick(10.0 + HANG_LIMIT_S + 1)
    assert not run.core.run.suspended and "evicted" in run.kinds()
    run.messages()
    run.hello(2, healed=True)
    assert run.messages("2-a") == ["evicted"]


def test_a_suspended_member_whose_process_has_ended_is_lost_at_once() -> None:
    run = started(base=5)
    silenced(run, 2)
    run.core.dead("2-a", "its process has ended", 10.7)
    assert not run.core.run.suspended and run.kinds().count("lost") == 1


def test_the_only_ones_that_hold_the_state_are_waited_for() -> None:
    run = started(base=5)
    silenced(run, 0, 1, 2)
    assert not run.core.run.suspended and not run.core.run.forming
    run.core.pong("0-a", 1000, 12.0)
    assert run.slots == [0, 1, 2]


def test_the_last_checkpoint_is_not_gone_back_to_while_a_holder_is_suspended() -> None:
    run = started(num_slots=2, base=5)
    silenced(run, 1)
    run.core.dead("0-a", "its process has ended", 11.0)
    assert run.record.number == 2, "no generation is formed of nobody"
    run.core.heard_again("1-a", 12.0)
    run.answer("1-a", step=5)
    assert (run.slots, run.record.base, run.record.reset) == ([1], 5, False)


def test_a_connection_that_closes_says_nothing_of_its_process() -> None:
    run = started(base=5)
    for slot in range(3):
        run.core.disconnected(f"{slot}-a")
    run.core.tick(10.0)
    assert not run.core.run.forming and "lost" not in run.kinds()
    for slot in range(3):
        run.hello(slot, step=7, healed=True, record=run.record, answered=2)
    assert not run.core.run.forming and run.kinds().count("formed") == 2


def test_what_was_lost_with_a_connection_is_said_again() -> None:
    run = started(base=5)
    record = run.record
    run.core.disconnected("2-a")
    run.core.failed("0-a", record.number, "torn", 10.0)
    run.messages()
    run.hello(2, step=5, healed=True, record=record, answered=2)
    assert run.messages("2-a") == ["void"]
    run.answer("0-a", "1-a", step=5)
    run.core.disconnected("2-a")
    run.hello(2, step=5, healed=True, record=record, answered=3)
    assert run.slots == [0, 1, 2] and run.record.number == 3, "its answer was lost with the connection"
    run.messages()
    run.core.disconnected("1-a")
    run.hello(1, step=5, healed=True, record=record, answered=3)
    assert run.messages("1-a") == ["record"]


def test_a_member_that_runs_is_not_silent_and_one_that_is_stopped_is_known_to_be() -> None:
    run = started(base=5)
    run.core.suspect("0-a", run.record.number, 1, 10.0)
    run.core.pong("0-a", 1000, 10.1)
    doubted = {m.uid for m in run.core.in_doubt(10.0 + SILENCE_S / 2)}
    assert doubted == {"1-a", "2-a"}
    run.core.runs("1-a", 10.0 + SILENCE_S / 2)
    run.core.stopped("2-a", 10.0 + SILENCE_S / 2)
    assert list(run.core.run.suspended) == ["2-a"] and run.core.run.forming


def test_where_answers_usually_take_long_patience_is_longer() -> None:
    run = started(base=5)
    suspicion = run.core.run.suspicion
    run.core.suspect("0-a", run.record.number, 1, 10.0)
    for uid in ("0-a", "1-a", "2-a"):
        run.core.pong(uid, 1000, 10.0 + 0.8 * SILENCE_S)
    assert suspicion.patience_s == pytest.approx(2.4 * SILENCE_S)
    for k in range(200):
        run.core.suspect("0-a", run.record.number, 1, 20.0 + k)
        for uid in ("0-a", "1-a", "2-a"):
            run.core.pong(uid, 1000, 20.001 + k)
    assert suspicion.patience_s == SILENCE_S


def test_who_was_suspended_when_the_run_ended_is_sent_home() -> None:
    run = started(num_slots=2, base=5)
    silenced(run, 1)
    run.core.finish("0-a", cursor=run.record.cursor, confirmed=True, now=11.0)
    assert run.core.run.over
    run.messages()
    run.core.heard_again("1-a", 12.0)
    assert run.messages("1-a") == ["end"]
    run.hello(1, step=5, healed=True, record=run.record, now=12.0)
    assert run.messages("1-a") == ["end"], "its connection was cut when it was told"
    assert run.core.run.over and not run.core.run.peers


def test_who_was_suspended_when_the_run_failed_is_told_why() -> None:
    run = started(num_slots=3, base=5)
    silenced(run, 2)
    run.core.raised("0-a", "ValueError: the user's own", 11.0)
    assert "fail" in run.messages("1-a")
    run.core.heard_again("2-a", 12.0)
    assert run.messages("2-a") == ["fail"]


def test_who_was_suspended_hears_of_the_reports_and_the_checkpoint_that_were_registered_meanwhile() -> None:
    now, said = [0.0], list[tuple[str, Message]]()
    config, context = run_of(3, silence_s=SILENCE_S)
    board = Switchboard(
        config, context, now=lambda: now[0], send=lambda uid, m: said.append((uid, m)), connected=lambda: []
    )
    members = [Member(uid=f"{k}-a", slot=k, host="h", state_port=1, device="cpu") for k in range(3)]
    for member in members:
        board.hello(
            protocol.Hello(
                member=member,
                cursor=Cursor(),
                healed=False,
                fresh=False,
                record=None,
                answered=0,
                want=0,
                fingerprint="",
                checkpoint=None,
                checkpoint_cursor=None,
            )
        )
    first = board.core.run.record
    assert first is not None
    now[0] = 10.0
    board.hear(members[0], protocol.Suspect(generation=first.number, step=1))
    now[0] = 10.1
    for member in members[:2]:
        board.hear(member, protocol.Pong(position=1000))
    now[0] = 10.1 + SILENCE_S
    board.tick()
    assert list(board.core.run.suspended) == ["2-a"]
    key = f"{first.life}.5.0"
    for member in members[:2]:
        said_of_it = protocol.Report(key=key, step=5, epoch=0, metrics={}, holds_snapshot=True, checkpoint=True)
        board.hear(member, said_of_it)
    board.hear(members[0], protocol.Stored(key=key, path="there", error=None, cursor=Cursor(step=5)))
    board.acknowledge([key])
    said.clear()
    board.hear(members[2], protocol.Pong(position=1000))
    to_it = [message for uid, message in said if uid == "2-a"]
    assert [m.keys for m in to_it if isinstance(m, protocol.Acknowledged)] == [[key]]
    assert [m.path for m in to_it if isinstance(m, protocol.Checkpoint)] == ["there"]
