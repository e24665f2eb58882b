"""The membership rules one by one: what is done about deaths, silence, hangs, restarts and odd members."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from runs import run_of

from raytrain_het.balance.scoreboard import Table
from raytrain_het.membership import server
from raytrain_het.membership.cursor import Cursor
from raytrain_het.membership.logic import Membership
from raytrain_het.membership.message_parts import Address, Poison
from raytrain_het.membership.peers import Standing
from raytrain_het.membership.place import Place
from raytrain_het.membership.protocol import ToMember
from raytrain_het.membership.record import Member, Record
from raytrain_het.membership.recovery import RECOVERY_GRACE_S

SILENCE_S, HANG_LIMIT_S, START_TIMEOUT_S = 0.5, 20.0, 60.0


def member(slot: int, life: str = "a") -> Member:
    return Member(uid=f"{slot}-{life}", slot=slot, host="host", state_port=1 + slot, device="cpu")


def cursor(step: int) -> Cursor:
    return Cursor(step=step)


def standing(step: int, *, healed: bool = True, fresh: bool = False) -> Standing:
    return Standing(cursor=cursor(step), healed=healed, fresh=fresh)


class Run:
    """A state machine, and all it has said."""

    def __init__(self, num_slots: int = 3, *, incarnation: int = 1, **values: Any) -> None:
        limits = {"silence_s": SILENCE_S, "hang_limit_s": HANG_LIMIT_S, "start_timeout_s": START_TIMEOUT_S}
        self.core = Membership(*run_of(num_slots, **limits, **values), incarnation=incarnation)
        self.said: list[tuple[str, ToMember]] = []

    def hello(self, slot: int, life: str = "a", *, step: int = 0, now: float = 0.0, **values: Any) -> None:
        where = standing(step, healed=values.pop("healed", False), fresh=values.pop("fresh", False))
        self.core.hello(member(slot, life), where, now=now, **values)

    def answer(
        self, *uids: str, step: int = 0, healed: bool = True, fresh: bool = False, now: float = 0.0, **values: Any
    ) -> None:
        for uid in uids:
            where = standing(step, healed=healed, fresh=fresh)
            self.core.answer(uid, self.core.run.next.number, where, now=now, **values)

    def messages(self, uid: str | None = None) -> list[str]:
        """Kinds of what was said since the last call."""
        new = self.core.drain()
        self.said += new
        return [m.kind for to, m in new if uid in (None, to)]

    @property
    def record(self) -> Record:
        assert self.core.run.record is not None
        return self.core.run.record

    @property
    def slots(self) -> list[int]:
        return [m.slot for m in self.record.members]

    def log(self) -> list[dict[str, Any]]:
        return [entry.to_json() for entry in self.core.run.log.since(0)]

    def kinds(self) -> list[str]:
        return [e.event.kind for e in self.core.run.log.since(0)]


def started(num_slots: int = 3, *, base: int = 0, **values: Any) -> Run:
    run = Run(num_slots, **values)
    for slot in range(num_slots):
        run.hello(slot)
    if base:
        run.core.failed("0-a", 1, "to get there", 0.0)
        run.answer(*[f"{slot}-a" for slot in range(num_slots)], step=base)
    run.messages()
    return run


# ---------------------------------------------------------------- the start


def test_the_run_starts_when_all_slots_are_there() -> None:
    run = Run()
    run.hello(0)
    run.hello(1)
    assert run.core.run.record is None
    run.hello(2)
    assert run.slots == [0, 1, 2]
    assert run.record.reset
    assert run.record.source == "0-a"


def test_a_vacant_slot_lets_the_run_start_and_is_told_once() -> None:
    run = Run()
    run.hello(0)
    run.hello(1)
    for _ in range(3):
        run.core.slot_vacant(2, "no node has a GPU", 0.0)
    assert run.slots == [0, 1]
    assert run.kinds().count("vacant") == 1


def test_the_start_timeout_starts_with_those_who_are_there() -> None:
    run = Run()
    run.hello(1, now=5.0)
    run.core.tick(5.0 + START_TIMEOUT_S - 0.1)
    assert run.core.run.record is None
    run.core.tick(5.0 + START_TIMEOUT_S)
    assert run.slots == [1]


def test_another_model_is_refused_and_both_workers_are_named() -> None:
    run = Run()
    run.hello(0, fingerprint="abc")
    run.hello(1, fingerprint="xyz")
    assert list(run.core.run.peers) == ["0-a"]
    (refusal,) = [m for uid, m in run.core.drain() if uid == "1-a"]
    assert refusal.kind == "mismatch"
    assert "worker 1 built another model or dataset than worker 0" in refusal.message


# ---------------------------------------------------------------- deaths


def test_a_slot_that_dies_three_times_without_a_commit_is_given_up() -> None:
    run = started()
    for life in ("a", "b", "c"):
        assert 2 not in run.core.run.dead_slots
        if life != "a":
            run.hello(2, life)
        run.core.dead(f"2-{life}", "its process has ended", 0.0)
        run.answer("0-a", "1-a", step=ord(life))
    assert run.core.run.dead_slots == {2}
    assert run.core.run.failure is None
    assert "given_up" in run.kinds()


def test_a_commit_forgives_a_slots_earlier_deaths() -> None:
    run = started()
    for deaths, life in enumerate(("a", "b", "c", "d")):
        step = 10 * deaths
        if life != "a":
            run.hello(2, life)
            run.answer("0-a", "1-a", step=step)
            for caught_up in (step, step + 1):
                run.core.healed(f"2-{life}", 0.0)
                run.answer("0-a", "1-a", step=caught_up)
                run.answer(f"2-{life}", step=caught_up, fresh=True)
            run.core.verified(f"2-{life}", 0.0)
            run.core.progress(f"2-{life}", step + 2, 0.0)
        run.core.dead(f"2-{life}", "its process has ended", 0.0)
        run.answer("0-a", "1-a", step=step + 5)
    assert run.core.run.dead_slots == set()


def test_a_step_that_costs_three_generations_a_member_fails_with_the_step_the_samples_and_the_slots() -> None:
    run = started(num_slots=5, base=7)
    for slot in (4, 3):
        run.core.dead(f"{slot}-a", "its process has ended", 0.0)
        run.answer(*[f"{s}-a" for s in range(slot)], step=7)
        assert run.core.run.failure is None
    run.core.dead("1-a", "its process has ended", 0.0)
    run.answer("0-a", "2-a", step=7, batch=[2, 96, 32])
    assert run.core.run.failure is not None
    for part in ("step 8", "epoch 2, positions 96 to 128", "slots [1]"):
        assert part in run.core.run.failure
    failures = [m for _, m in run.core.drain() if m.kind == "fail"]
    poison = Poison(step=8, slots=[1], ranks=[1], shares=(1.0, 1.0, 1.0))
    assert [m.poison for m in failures] == [poison] * 2


def test_a_step_that_kills_whoever_is_left_is_found_though_all_start_again_each_time() -> None:
    """The last one dies while its peer's next process is on its way in: nobody can say where it was, but itself."""
    run = started(num_slots=2, base=7)
    run.core.dead("1-a", "its process has ended", 0.0)
    run.answer("0-a", step=7)
    run.hello(1, "b")
    run.core.dead("0-a", "its process has ended", 0.0)
    assert run.core.run.failure is None
    assert run.core.run.record is not None and run.core.run.record.reset
    run.core.progress("1-b", 7, 0.0)
    run.core.dead("1-b", "its process has ended", 0.0)
    assert "3 times in step 8" in (run.core.run.failure or "")


def test_workers_that_die_all_at_once_do_not_fail_the_run() -> None:
    run = started(num_slots=5, base=7)
    for slot in (1, 2, 3, 4):
        run.core.dead(f"{slot}-a", "its process has ended", 0.0)
    run.answer("0-a", step=7)
    assert run.core.run.failure is None
    assert run.slots == [0]


def test_deaths_in_different_steps_do_not_fail_the_run() -> None:
    run = started(num_slots=5, base=7)
    for step, slot in ((7, 4), (8, 3), (9, 2), (10, 1)):
        run.core.dead(f"{slot}-a", "its process has ended", 0.0)
        run.answer(*[f"{s}-a" for s in range(slot)], step=step)
    assert run.core.run.failure is None
    assert run.slots == [0]


def test_a_lost_slot_is_lost_once_whoever_tells_it() -> None:
    run = started()
    run.core.dead("1-a", "its process has ended", 0.0)
    run.core.slot_lost(1, "the node is gone", 0.0)
    run.core.slot_lost(1, "the node is gone", 0.0)
    run.core.dead("1-a", "its process has ended", 0.0)
    assert run.kinds().count("lost") == 1
    assert run.messages() == ["evicted", "void", "void"]


def test_links_that_fail_again_and_again_without_a_death_fail_the_run() -> None:
    run = started()
    for _ in range(21):
        assert run.core.run.failure is None
        run.core.failed("0-a", run.record.number, "connection reset", 0.0)
        run.answer("0-a", "1-a", "2-a")
    assert run.core.run.failure is not None
    assert "link between two workers" in run.core.run.failure


def test_shares_that_are_zero_for_all_survivors_become_equal() -> None:
    run = started(shares=(1.0, 0.0, 0.0))
    assert run.record.shares == (1.0, 0.0, 0.0)
    run.core.dead("0-a", "its process has ended", 0.0)
    run.answer("1-a", "2-a")
    assert run.record.shares == (1.0, 1.0)


def test_a_want_keeps_the_group_of_an_unchanged_member_list_and_a_void_does_not() -> None:
    run = started()
    group = run.record.group
    run.core.healed("1-a", 0.0)  # A spurious one will do: any want.
    run.answer("0-a", "2-a", step=1)
    run.core.answer("1-a", run.core.run.next.number, standing(1, healed=True), now=0.0)
    assert (run.record.number, run.record.group) == (2, group)
    run.core.failed("0-a", 2, "connection reset", 0.0)
    run.answer("0-a", "1-a", "2-a", step=1)
    assert run.record.number == 3
    assert run.record.group != group


# ---------------------------------------------------------------- suspicion


def test_a_suspicion_to_which_all_answer_changes_nothing() -> None:
    run = started()
    run.core.suspect("0-a", 1, 1, 10.0)
    assert run.messages() == ["ping"] * 3
    for uid in ("0-a", "1-a", "2-a"):
        run.core.pong(uid, 1000, 10.1)
    assert run.messages() == []
    run.core.tick(11.0)
    assert run.core.run.record is not None
    assert not run.core.run.forming


def test_the_silent_are_suspended_and_the_generation_is_void() -> None:
    run = started()
    run.core.suspect("0-a", 1, 1, 10.0)
    run.core.pong("0-a", 1000, 10.1)
    run.core.pong("1-a", 1000, 10.1)
    run.core.tick(10.4)
    assert not run.core.run.forming
    run.messages()
    run.core.tick(10.5)
    assert run.messages()[:2] == ["void", "void"]
    assert "suspended" in run.kinds() and "evicted" not in run.kinds()
    run.answer("0-a", "1-a")
    assert run.slots == [0, 1]
    run.messages()
    run.hello(2, "b")
    assert run.messages("2-a") == ["evicted"], "its slot has a new process"


def test_a_suspicion_of_another_generation_is_ignored() -> None:
    run = started()
    run.core.suspect("0-a", 0, 1, 10.0)
    assert run.messages() == []


def test_who_waits_for_a_member_that_was_let_go_has_its_generation_voided() -> None:
    run = started()
    run.core.finish("0-a", cursor=cursor(1), confirmed=True, now=0.0)
    run.messages()
    run.core.suspect("1-a", 1, 2, 10.0)
    assert run.messages() == ["void", "void"]


def test_who_waits_for_a_member_that_has_finished_early_has_its_generation_voided() -> None:
    run = started()
    run.core.finish("0-a", cursor=cursor(1), confirmed=False, now=0.0)
    assert run.messages() == [], "the others may be about to finish too"
    run.core.suspect("1-a", 1, 2, 10.0)
    assert run.messages() == ["void"] * 3
    run.answer("0-a", "1-a", "2-a", step=1)
    assert run.messages("0-a") == ["bye"]
    assert (run.slots, run.record.base) == ([1, 2], 1)


def test_who_returns_early_with_reports_on_their_way_has_its_last_step_confirmed_once() -> None:
    run = started()
    run.core.returning("0-a", 0.0)
    assert run.messages() == []
    run.core.suspect("1-a", 1, 2, 10.0)
    assert run.messages() == ["void"] * 3
    run.answer("0-a", "1-a", "2-a", step=1)
    assert (run.slots, run.record.base) == ([0, 1, 2], 1)
    run.messages()
    run.core.suspect("1-a", 2, 2, 11.0)
    assert run.messages() == ["ping"] * 3, "its reports are being stored: no reason to form again"


def test_who_has_finished_early_with_a_step_that_the_others_lack_stays_until_they_have_it() -> None:
    run = started()
    run.core.finish("0-a", cursor=cursor(2), confirmed=False, now=0.0)
    run.core.suspect("1-a", 1, 2, 10.0)
    run.answer("0-a", step=2)
    run.answer("1-a", "2-a", step=1)
    assert (run.record.source, run.record.behind) == ("0-a", ("1-a", "2-a"))
    assert "bye" not in run.messages("0-a")
    run.answer("0-a", "1-a", "2-a", step=2)
    assert run.messages("0-a") == ["bye"]
    assert (run.slots, run.record.base) == ([1, 2], 2)


def test_who_answers_but_holds_its_peers_up_past_the_hang_limit_is_evicted() -> None:
    run = started()
    now = 0.0
    while "2-a" in run.core.run.peers:
        assert now < HANG_LIMIT_S + 1
        run.core.suspect("0-a", 1, 1, now)
        for uid, position in (("0-a", 1001), ("1-a", 1001), ("2-a", 1000)):
            run.core.pong(uid, position, now + 0.1)
        now += 1.0
    assert now >= HANG_LIMIT_S
    assert sorted(run.core.run.peers) == ["0-a", "1-a"]


def at(text: str, *, waits: bool, kind: str = "step") -> Place:
    return Place(text, waits, kind)


REPORTING = at("in report() at step 4", waits=True, kind="report")
IN_STEP = at("in step 5, waiting for the others' gradients", waits=True)
COMPUTING = at("computing step 5", waits=False)


def asked(run: Run, places: dict[str, Place], *, seconds: float, suspect: bool = False) -> float:
    """Members answer from these places for so long."""
    now = 0.0
    while now < seconds and run.core.run.failure is None:
        now += 1.0
        if suspect:
            run.core.suspect("1-a", 1, 5, now)
        for uid, place in places.items():
            run.core.pong(uid, 4000 if place is REPORTING else 5000, now, place)
        run.core.tick(now)
    return now


def test_who_waits_itself_is_never_dropped_for_it_but_who_computes_is() -> None:
    run = started()
    asked(run, {"0-a": REPORTING, "1-a": IN_STEP, "2-a": COMPUTING}, seconds=HANG_LIMIT_S + 2, suspect=True)
    evicted = [e for e in run.log() if e["kind"] == "evicted"]
    assert [(e["slot"], e["reason"]) for e in evicted] == [(2, "its peers waited 20 s for it; it was computing step 5")]


def test_who_gets_on_is_not_dropped_however_long_its_peers_wait() -> None:
    run = started()
    for chunk in range(60):
        place = at(f"computing chunk {chunk}", waits=False, kind="evaluate")
        run.core.suspect("1-a", 1, 5, float(chunk))
        for uid, where in (("0-a", place), ("1-a", IN_STEP), ("2-a", IN_STEP)):
            run.core.pong(uid, 4000 if uid == "0-a" else 5000, float(chunk), where)
    assert "evicted" not in run.kinds()


def test_a_program_in_which_all_wait_at_unlike_places_fails_within_seconds_with_where_each_is() -> None:
    run = started()
    took = asked(run, {"0-a": REPORTING, "1-a": IN_STEP, "2-a": IN_STEP}, seconds=60.0)
    assert took < 10
    assert run.core.run.failure is not None
    assert "worker 0: in report() at step 4; worker 1: in step 5, waiting" in run.core.run.failure
    assert "evicted" not in run.kinds()


@pytest.mark.parametrize("how", ["finished", "returning"])
def test_long_steps_are_not_waited_for_when_somebody_has_returned_and_that_is_no_deadlock(how: str) -> None:
    run = started()
    if how == "finished":
        run.core.finish("0-a", cursor=cursor(4), confirmed=False, now=0.0)
    else:
        run.core.returning("0-a", 0.0)
    returned = at("returned after step 4", waits=True, kind="returned")
    asked(run, {"0-a": returned, "1-a": IN_STEP, "2-a": IN_STEP}, seconds=10.0)
    assert run.core.run.failure is None
    assert run.core.run.forming


@pytest.mark.parametrize("why", ["something is under way", "one computes", "all are in the step"])
def test_waiting_is_no_deadlock_as_long_as_something_may_end_it(why: str) -> None:
    run = started()
    places = {"0-a": REPORTING, "1-a": IN_STEP, "2-a": IN_STEP}
    if why == "something is under way":
        run.core.run.under_way = lambda: True
    else:
        places["0-a"] = COMPUTING if why == "one computes" else IN_STEP
    asked(run, places, seconds=15.0)
    assert run.core.run.failure is None
    (told,) = [e for e in run.log() if e["kind"] == "waiting"]
    assert told["slots"] == ([0] if why == "one computes" else [])
    assert "worker 1: in step 5, waiting" in told["reason"]


def test_a_wait_for_a_storage_has_no_limit_and_drops_nobody() -> None:
    run = started()
    places = {"0-a": REPORTING, "1-a": IN_STEP, "2-a": IN_STEP}
    run.core.run.under_way = lambda: True
    asked(run, places, seconds=3 * HANG_LIMIT_S, suspect=True)
    assert run.core.run.failure is None, "a slow storage is nobody's hang"
    run.core.run.under_way = lambda: False
    asked(run, places, seconds=3 * HANG_LIMIT_S, suspect=True)
    assert "every worker waits for another one" in str(run.core.run.failure)
    assert "evicted" not in run.kinds()


def test_members_are_asked_again_only_as_long_as_somebody_waits() -> None:
    run = started()
    run.core.pong("0-a", 5000, 1.0, IN_STEP)
    run.messages()
    run.core.tick(2.5)
    assert run.messages() == ["ping"] * 3
    run.core.pong("0-a", 5000, 2.6, COMPUTING)
    run.core.tick(5.0)
    assert run.messages() == []


def test_who_does_not_answer_to_a_void_within_the_hang_limit_is_evicted() -> None:
    run = started()
    run.core.failed("0-a", 1, "connection reset", 0.0)
    run.answer("0-a", "1-a")
    run.core.tick(HANG_LIMIT_S)
    assert run.slots == [0, 1]


def test_a_standstill_of_the_hub_itself_is_nobodys_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    real = [100.0]
    monkeypatch.setattr(server.time, "monotonic", lambda: real[0])
    clock = server.FairClock()
    for _ in range(10):
        real[0] += 0.02
        clock.now()
    assert clock.now() == pytest.approx(0.2)
    real[0] += 30.0
    assert clock.now() == pytest.approx(0.2 + server.STANDSTILL_S)


# ---------------------------------------------------------------- who comes in late


def with_two_refilled() -> Run:
    """Slots 1 and 2 were refilled, and both have healed by replay."""
    run = started()
    for slot in (2, 1):
        run.core.dead(f"{slot}-a", "its process has ended", 0.0)
    run.answer("0-a", step=5)
    for slot in (1, 2):
        run.hello(slot, "b")
    run.answer("0-a", step=6)
    for slot in (1, 2):
        run.core.healed(f"{slot}-b", 0.0)
    run.answer("0-a", step=7)
    run.answer("1-b", "2-b", step=7, fresh=True)
    assert run.record.fresh == ("1-b", "2-b")
    run.messages()
    return run


def test_once_all_have_compared_themselves_a_generation_calls_nobody_fresh() -> None:
    run = with_two_refilled()
    group = run.record.group
    run.core.verified("1-b", 0.0)
    assert run.messages() == []
    run.core.verified("2-b", 0.0)
    assert run.messages() == ["want"] * 3
    run.answer("0-a", "1-b", "2-b", step=8)
    assert (run.record.fresh, run.record.unhealed, run.record.group) == ((), (), group)
    run.core.verified("2-b", 0.0)
    assert run.messages("0-a") == ["record"]


def test_the_generation_after_a_comparison_waits_for_those_that_still_heal() -> None:
    """They would have to ask for their snapshot again; their own generation follows."""
    run = with_two_refilled()
    run.core.dead("1-b", "its process has ended", 0.0)
    run.answer("0-a", step=8)
    run.answer("2-b", step=8, fresh=True)
    run.hello(1, "c")
    run.answer("0-a", step=8)
    run.core.healed("2-b", 0.0)
    run.answer("0-a", step=9)
    run.answer("2-b", step=9, fresh=True)
    run.core.answer("1-c", run.core.run.next.number, standing(9, healed=False), now=0.0)
    assert (run.record.fresh, run.record.unhealed) == (("2-b",), ("1-c",))
    run.messages()
    run.core.verified("2-b", 0.0)
    assert run.messages() == []


def test_a_comparison_made_while_the_actor_was_down_counts() -> None:
    before = with_two_refilled()
    run, record = restarted(before)
    for slot, life in enumerate("abb"):
        run.hello(slot, life, step=8, healed=True, record=record, answered=record.number)
    assert run.messages() == ["want"] * 3


# ---------------------------------------------------------------- a restart of the actor


def restarted(run: Run) -> tuple[Run, Record]:
    return Run(run.core.run.context.num_slots, incarnation=2), run.record


def test_a_restart_with_all_members_back_changes_nothing() -> None:
    run, record = restarted(started())
    for slot in range(3):
        run.hello(slot, step=5, healed=True, record=record, answered=1)
    assert run.record is record
    assert run.messages() == []
    assert not run.core.run.forming
    assert "recovered" in run.kinds()


TABLE = Table(
    version=4,
    scores={0: 1.5, 1: 1.0, 2: 0.5},
    gradient_weights={0: 0.8, 1: 1.0, 2: 1.3},
    shares={0: 7, 1: 5, 2: 0},
    predicted_step_s=1.0,
    reason="a test",
)


def test_owners_follow_the_tables_links_and_who_is_not_in_it_has_the_median() -> None:
    run = started()
    table = Table(1, {}, {}, {0: 40, 1: 40, 2: 40}, 0.1, "", links_s={0: 0.01, 1: 0.01, 2: 1.0})
    run.core.follow(table, 1.0)
    run.answer("0-a", "1-a", "2-a")
    assert run.record.owners == pytest.approx((0.45, 0.45, 0.1))
    run.core.follow(replace(table, version=2, links_s={0: 0.01, 7: 0.01, 8: 1.0}), 2.0)
    run.answer("0-a", "1-a", "2-a")
    assert run.record.owners == pytest.approx((1 / 3, 1 / 3, 1 / 3))


def test_a_healed_worker_gets_the_share_that_fits_its_hardware() -> None:
    run = started()
    tables = [Table(version, {}, {}, {0: 40, 1: 40, 2: b}, None, "") for version, b in ((1, 40), (2, 10))]
    run.core.follow(tables[0], 1.0)
    run.answer("0-a", "1-a", "2-a")
    run.core.slot_lost(2, "gone", 2.0)
    run.core.run.table_for = lambda slots: tables[1] if 2 in slots else None
    run.answer("0-a", "1-a")
    assert run.record.shares == (40.0, 40.0)
    run.hello(2, "b", now=3.0)
    run.answer("0-a", "1-a")
    assert run.record.shares == (40.0, 40.0, 0.0), "it has still to heal"
    assert run.record.table == 1
    run.core.healed("2-b", 4.0)
    run.answer("0-a", "1-a")
    run.answer("2-b", fresh=True)
    assert run.record.shares == (40.0, 40.0, 10.0)
    assert run.record.table == 2


def test_a_restarted_actor_goes_on_with_the_table_in_force() -> None:
    run = started()
    run.core.follow(TABLE, 0.0)
    run.answer("0-a", "1-a", "2-a", step=3)
    before = run.record
    assert before.table == 4
    run, record = restarted(run)
    for slot in range(3):
        run.hello(slot, step=5, healed=True, record=Record.from_json(record.to_json()), answered=2)
    run.core.failed("1-a", 2, "connection reset", 0.0)
    run.answer("0-a", "1-a", "2-a", step=5)
    after = run.record
    assert after.number == 3
    for name in ("table", "shares", "gradient_weights", "speeds", "owners", "life"):
        assert getattr(after, name) == getattr(before, name), name


def test_a_restarted_actor_does_not_take_a_healing_workers_share_for_its_share() -> None:
    run = started()
    run.core.follow(replace(TABLE, shares={0: 6, 1: 4, 2: 2}), 0.0)
    run.answer("0-a", "1-a", step=3)
    run.core.answer("2-a", 2, standing(3, healed=False), now=0.0)
    assert run.record.shares == (6.0, 4.0, 0.0)
    run, record = restarted(run)
    for slot in range(3):
        run.hello(slot, step=5, healed=slot < 2, record=record, answered=2)
    run.core.failed("1-a", 2, "connection reset", 0.0)
    run.answer("0-a", "1-a", step=5)
    run.answer("2-a", step=5, fresh=True)
    assert run.record.shares == (6.0, 4.0, 5.0), "the mean of the others, as for anybody whose speed is not known"


def test_a_restart_without_one_member_voids_after_a_grace() -> None:
    run, record = restarted(started())
    for slot in range(2):
        run.hello(slot, step=5, healed=True, record=record, answered=1)
    run.core.tick(RECOVERY_GRACE_S - 0.1)
    assert run.messages() == []
    run.core.tick(RECOVERY_GRACE_S)
    assert run.messages() == ["void", "void", "ping", "ping"]
    run.answer("0-a", "1-a", step=5)
    assert (run.record.number, run.slots, run.record.base) == (2, [0, 1], 5)


def test_a_restart_with_a_member_that_missed_a_record_voids() -> None:
    run, record = restarted(started())
    run.hello(0, step=5, healed=True, record=record, answered=1)
    run.hello(1, step=5, healed=True, record=replace(record, number=2, cursor=cursor(5)), answered=2)
    run.hello(2, step=5, healed=True, record=record, answered=2)
    assert run.messages() == ["void"] * 3
    assert run.core.run.next.number == 3


def test_a_restart_knows_of_a_number_that_only_one_member_was_told() -> None:
    run, record = restarted(started())
    for slot, answered in enumerate((1, 4, 1)):
        run.hello(slot, step=5, healed=True, record=record, answered=answered)
    assert run.messages() == ["void"] * 3
    assert run.core.run.next.number == 5


def test_a_failure_told_during_a_recovery_voids() -> None:
    run, record = restarted(started())
    run.hello(0, step=5, healed=True, record=record, answered=1)
    run.core.failed("0-a", 1, "connection reset", 0.0)
    for slot in (1, 2):
        run.hello(slot, step=5, healed=True, record=record, answered=1)
    assert run.messages() == ["void"] * 3


def test_a_member_that_healed_while_the_actor_was_down_gets_its_share() -> None:
    run, record = restarted(started())
    record = replace(record, unhealed=("2-a",))
    for slot in range(3):
        run.hello(slot, step=5, healed=True, fresh=slot == 2, record=record, answered=1)
    assert run.messages() == ["want"] * 3
    run.answer("0-a", "1-a", step=6)
    run.answer("2-a", step=6, fresh=True)
    assert run.record.fresh == ("2-a",)
    assert run.record.unhealed == ()


def test_who_comes_back_after_the_recovery_heals_even_with_the_number_in_force() -> None:
    run, record = restarted(started())
    for slot in range(2):
        run.hello(slot, step=5, healed=True, record=record, answered=1)
    run.core.tick(RECOVERY_GRACE_S)
    run.answer("0-a", "1-a", step=5)
    run.messages()
    other = replace(record, number=2, cursor=cursor(5))
    run.hello(2, step=6, healed=True, record=other, answered=2)
    run.answer("0-a", "1-a", step=6)
    assert run.slots == [0, 1, 2]
    assert run.record.unhealed == ("2-a",)


# ---------------------------------------------------------------- lives


def test_a_life_begins_when_all_begin_again_and_only_then() -> None:
    run = started(num_slots=2)
    first = run.record.life
    run.core.failed("0-a", 1, "connection reset", 0.0)
    run.answer("0-a", "1-a", step=5)
    assert run.record.life == run.core.run.life == first
    for slot in range(2):
        run.core.dead(f"{slot}-a", "its process has ended", 0.0)
    for slot in range(2):
        run.hello(slot, "b")
    assert run.record.reset
    assert run.record.life == run.core.run.life > first


def test_the_next_actors_lives_are_later_ones_even_if_nobody_was_left_to_tell_of_the_last() -> None:
    lives = []
    for incarnation in (1_700_000_000_000_000_000, 1_700_000_000_100_000_000):
        run = Run(num_slots=1, incarnation=incarnation)
        run.hello(0)
        lives.append(run.record.life)
    assert lives[1] > lives[0]


# ---------------------------------------------------------------- leaving and ending


@pytest.mark.parametrize(("stands_at", "heir"), [(7, Address(host="host", port=1)), (6, None)])
def test_who_leaves_is_told_who_takes_over_what_it_has_left_to_send(stands_at: int, heir: Address | None) -> None:
    """Nobody, where it has not seen the last step through and does not know what of it was sent."""
    run = started(base=5)
    run.core.leave("2-a", 0.0)
    run.answer("0-a", "1-a", step=7)
    run.answer("2-a", step=stands_at)
    (bye,) = [m for uid, m in run.core.drain() if (uid, m.kind) == ("2-a", "bye")]
    assert (bye.how, bye.heir) == ("left", heir)


def test_who_takes_over_has_something_to_send_itself() -> None:
    run = started(shares=(0.0, 1.0, 1.0), base=5)
    run.core.leave("2-a", 0.0)
    run.answer("0-a", "1-a", "2-a", step=7)
    (bye,) = [m for uid, m in run.core.drain() if (uid, m.kind) == ("2-a", "bye")]
    assert bye.heir.port == 2, "that of slot 1"


def test_the_norm_of_what_is_lost_with_a_worker_is_told() -> None:
    run = started()
    run.core.progress("1-a", 3, 0.0, left_out=0.25)
    run.core.progress("2-a", 3, 0.0)
    run.core.dead("1-a", "its process has ended", 1.0)
    run.core.dead("2-a", "its process has ended", 1.0)
    assert [e.get("left_out") for e in run.log() if e["kind"] == "lost"] == [0.25, None]


def test_the_last_holder_of_the_state_leaves_only_when_a_joiner_has_healed() -> None:
    run = Run(num_slots=2)
    run.core.slot_vacant(1, "later", 0.0)
    run.hello(0)
    run.hello(1)
    run.core.leave("0-a", 0.0)
    run.answer("0-a", step=1)
    assert run.slots == [0, 1]
    assert run.record.unhealed == ("1-a",)
    run.answer("0-a", step=2)
    run.core.answer("1-a", run.core.run.next.number, standing(2, healed=True, fresh=True), now=0.0)
    assert run.record.fresh == ("1-a",)
    run.core.verified("1-a", 0.0)
    run.answer("0-a", "1-a", step=3)
    assert run.slots == [1]
    assert run.messages("0-a")[-1] == "bye"


def test_the_end_waits_for_a_worker_that_has_trained_though_its_word_is_under_way() -> None:
    run = started(num_slots=2)
    run.core.answer("1-a", 2, standing(1, healed=True, fresh=True), now=0.0)
    run.answer("0-a", step=1)
    assert run.record.fresh == ("1-a",)
    run.core.finish("0-a", cursor=cursor(3), confirmed=True, now=0.0)
    assert "end" not in run.messages("1-a")
    run.core.finish("1-a", cursor=cursor(3), confirmed=True, now=0.0)
    assert run.messages("1-a") == ["bye"]
    assert run.core.run.over


def test_a_finished_member_stays_until_those_who_are_behind_have_its_last_step() -> None:
    run = started(num_slots=2)
    run.core.failed("1-a", 1, "connection reset", 0.0)
    run.answer("0-a", step=5)
    run.answer("1-a", step=4)
    assert (run.record.behind, run.record.source) == (("1-a",), "0-a")
    run.core.finish("0-a", cursor=cursor(5), confirmed=True, now=0.0)
    assert "bye" not in run.messages("0-a")
    run.core.finish("1-a", cursor=cursor(5), confirmed=True, now=0.0)
    assert run.messages() == ["bye", "bye"]


def test_a_finished_member_stays_until_a_restarted_actor_knows_who_needs_it() -> None:
    run, record = restarted(started(num_slots=2))
    run.hello(0, step=5, healed=True, record=replace(record, unhealed=("1-a",)), answered=1)
    run.core.finish("0-a", cursor=cursor(5), confirmed=True, now=0.0)
    assert run.messages() == []
    run.hello(1, step=5, record=replace(record, unhealed=("1-a",)), answered=1)
    assert run.messages() == ["bye", "end"]
    assert run.core.run.over


def test_a_run_that_ends_by_its_last_members_death_does_not_begin_again_with_the_refill() -> None:
    run = started(num_slots=2)
    run.core.finish("0-a", cursor=cursor(5), confirmed=True, now=0.0)
    run.hello(1, "b")
    assert run.messages("1-b") == ["end"]
    assert run.core.run.phase == "ended"


def test_the_end_does_not_wait_for_a_worker_that_has_not_healed() -> None:
    run = started(num_slots=2)
    run.core.answer("1-a", 2, standing(0, healed=False), now=0.0)
    run.answer("0-a", step=1)
    assert run.record.unhealed == ("1-a",)
    run.core.finish("0-a", cursor=cursor(3), confirmed=True, now=0.0)
    assert run.messages("1-a")[-1] == "end"
    assert run.core.run.phase == "ended"


def test_no_generation_follows_a_raised_function() -> None:
    run = started()
    run.core.raised("1-a", "Traceback\nValueError: bad", 0.0)
    assert run.core.run.failure is not None
    assert "ValueError: bad" in run.core.run.failure
    number = run.record.number
    run.core.dead("2-a", "its process has ended", 0.0)
    run.core.slot_lost(2, "its process ended", 0.0)
    assert run.log()[-1]["kind"] == "lost" and run.log()[-1]["expected"]
    run.answer("0-a")
    run.hello(1, "b")
    assert run.record.number == number
    assert run.messages("1-b") == ["fail"]


def test_the_last_holders_go_together_with_one_that_is_catching_up() -> None:
    run = started()
    run.core.dead("2-a", "its process has ended", 0.0)
    run.answer("0-a", "1-a", step=5)
    run.hello(2, "b")
    run.answer("0-a", "1-a", step=5)
    assert run.record.unhealed == ("2-b",)
    run.core.finish("0-a", cursor=cursor(6), confirmed=False, now=0.0)
    for uid in ("1-a", "2-b"):
        run.core.leave(uid, 0.0)
    run.answer("0-a", "1-a", step=6)
    run.messages()
    run.answer("2-b", step=5, healed=False)
    assert [(uid, m.kind) for uid, m in run.core.drain()] == [("0-a", "bye"), ("1-a", "bye"), ("2-b", "end")]
    assert run.core.run.phase == "ended"
