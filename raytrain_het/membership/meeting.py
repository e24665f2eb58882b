"""Where the members of a process group find each other: a store whose values go through the hub.

Not torch's ``TCPStore``. Both of its ends write the peer's name into log messages that nobody may ever see, and a
name server that does not answer then holds up all members for its time-out: 5 s in one of thirty groups was measured.
A store of our own needs no further connection, and a wait at it can be ended.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from torch.distributed import Store

from raytrain_het.membership.agent import MemberAgent
from raytrain_het.membership.last_groups import LastGroups
from raytrain_het.membership.protocol import Meet, Meets


class Meeting(Store):
    """One group's store. It has as much of torch's interface as process groups use when they are made."""

    def __init__(self, place: MeetingPlace, group: str) -> None:
        super().__init__()
        self._place, self._group = place, group
        self._abandoned = False

    def set(self, key: str, value: Any) -> None:
        """Tell all members.

        Raises:
            RuntimeError: nobody wants this group any more.
        """
        self._check_wanted()
        self._place.tell(self._group, key, value.encode() if isinstance(value, str) else bytes(value))

    def get(self, key: str) -> bytes:
        """Wait for a value."""
        self.wait([key])
        return self._place.values(self._group)[key]

    def check(self, keys: list[str]) -> bool:
        """Whether all are there."""
        return self._place.values(self._group).keys() >= set(keys)

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """Wait for some values, however long: the deadlines of membership are what ends it.

        Raises:
            RuntimeError: nobody wants this group any more.
        """
        if not self._place.wait_for(lambda: self._abandoned or self.check(keys)):
            raise RuntimeError("this worker is no part of the run any more")
        self._check_wanted()

    def _check_wanted(self) -> None:
        if self._abandoned:
            raise RuntimeError(f"the group {self._group} is not wanted any more")

    def abandon(self) -> None:
        """End all waiting here."""
        self._abandoned = True
        self._place.wake()


class MeetingPlace:
    """This member's side of all meetings: it keeps the values of the last two groups."""

    def __init__(self, agent: MemberAgent) -> None:
        self._agent = agent
        self._values: LastGroups[bytes] = LastGroups()
        self._own: LastGroups[bytes] = LastGroups()
        agent.on_message[Meet] = self._received
        agent.on_message[Meets] = self._received_several
        agent.on_reconnect.append(self._tell_again)

    def meeting(self, group: str) -> Meeting:
        """The store of a group."""
        return Meeting(self, group)

    def values(self, group: str) -> dict[str, bytes]:
        """What has been said so far."""
        return self._values.of(group)

    def tell(self, group: str, key: str, value: bytes) -> None:
        """Say something to all members of a group, this one included."""
        with self._agent.condition:
            self._own.keep(group, key, value)
            self._values.keep(group, key, value)
        self._send(group, key, value)
        self.wake()

    def _tell_again(self) -> None:
        """The hub may be a new one, which knows nothing of what was said."""
        with self._agent.condition:
            own = list(self._own)
        for group, key, value in own:
            self._send(group, key, value)

    def wait_for(self, predicate: Callable[[], bool]) -> bool:
        """Wait until the predicate holds. Returns False if this member was let go meanwhile."""
        agent = self._agent
        with agent.condition:
            agent.condition.wait_for(lambda: agent.gone is not None or predicate())
        return predicate()

    def wake(self) -> None:
        """Have those that wait look again."""
        with self._agent.condition:
            self._agent.condition.notify_all()

    def _send(self, group: str, key: str, value: bytes) -> None:
        self._agent.tell(Meet(group=group, key=key, value=base64.b64encode(value).decode()))

    def _received_several(self, message: Meets) -> None:
        for said in message.said:
            self._received(said)

    def _received(self, message: Meet) -> None:
        with self._agent.condition:
            self._values.keep(message.group, message.key, base64.b64decode(message.value))
        self.wake()
