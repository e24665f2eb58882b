"""How members find each other while they make a group: over the hub, with nothing that a name server could hold up."""

from __future__ import annotations

import socket
import threading

import pytest
from labs import wait_until
from runs import run_of

from raytrain_het.membership.agent import MemberAgent
from raytrain_het.membership.meeting import MeetingPlace
from raytrain_het.membership.record import Member
from raytrain_het.membership.server import Hub


class Place:
    """Two members and a hub that can be restarted."""

    def __init__(self):
        self.hub = self.new_hub()
        self.agents, self.listeners = [], []

    def new_hub(self):
        return Hub(*run_of(3))

    def join(self, slot):
        listener = socket.create_server(("127.0.0.1", 0))  # A member at whose ports nobody listens is taken for dead.
        self.listeners.append(listener)
        port = listener.getsockname()[1]
        member = Member(uid=f"{slot}-uid", slot=slot, host="127.0.0.1", state_port=port, device="cpu")
        agent = MemberAgent(member, lambda: self.hub.address())
        place = MeetingPlace(agent)
        agent.join()
        wait_until(lambda: any(m["slot"] == slot and m["alive"] for m in self.hub.status()["members"]))
        self.agents.append(agent)
        return place


@pytest.fixture
def place():
    place = Place()
    yield place
    for agent in place.agents:
        agent.close()
    for listener in place.listeners:
        listener.close()
    place.hub.shutdown()


def test_who_waits_for_a_value_gets_it_whenever_it_comes(place):
    first, second = place.join(0), place.join(1)
    got = []
    waiting = threading.Thread(target=lambda: got.append(second.meeting("1.5").get("0/0")))
    waiting.start()
    first.meeting("1.5").set("0/0", b"\x00address")
    waiting.join(10)
    assert got == [b"\x00address"]
    assert place.join(2).meeting("1.5").get("0/0") == b"\x00address"


def test_groups_do_not_hear_each_other_and_old_ones_are_forgotten(place):
    first, second = place.join(0), place.join(1)
    for group in ("1.1", "1.2", "1.3"):
        first.meeting(group).set("key", group.encode())
    assert second.meeting("1.3").get("key") == b"1.3"
    assert second.meeting("1.2").get("key") == b"1.2"
    assert not second.meeting("1.1").check(["key"])
    assert not second.meeting("1.4").check(["key"])


def test_what_was_said_outlives_the_hub(place):
    first = place.join(0)
    first.meeting("1.5").set("key", b"value")
    place.hub.shutdown()
    place.hub = place.new_hub()
    assert place.join(1).meeting("1.5").get("key") == b"value"


def test_late_words_of_older_groups_push_out_nothing(place):
    first, second = place.join(0), place.join(1)
    for group in ("1.3", "1.1", "1.2", "1.1"):
        first.meeting(group).set("key", group.encode())
    for there in (first, second, place.join(2)):
        assert there.meeting("1.2").get("key") == b"1.2"
        assert there.meeting("1.3").get("key") == b"1.3"


def test_nothing_is_said_in_a_group_that_is_not_wanted_any_more(place):
    first = place.join(0)
    meeting = first.meeting("1.5")
    meeting.abandon()
    with pytest.raises(RuntimeError, match=r"the group 1\.5 is not wanted any more"):
        meeting.set("key", b"late")
    assert first.values("1.5") == {}


def test_whoever_waits_at_a_group_that_is_not_wanted_is_called_off(place):
    meeting, errors = place.join(0).meeting("1.5"), []

    def wait():
        try:
            meeting.wait(["key"])
        except RuntimeError as error:
            errors.append(str(error))

    waiting = threading.Thread(target=wait)
    waiting.start()
    meeting.abandon()
    waiting.join(10)
    assert errors == ["the group 1.5 is not wanted any more"]
