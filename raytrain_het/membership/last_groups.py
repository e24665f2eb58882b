"""What members have said while they made the last process groups. Older groups are forgotten."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, TypeVar

MAX_GROUPS = 2
"""The newest group, and the one before it, which some member may still use."""

Value = TypeVar("Value")


class LastGroups(Generic[Value]):
    """Values by group and key. Groups are named ``<incarnation>.<number>``; the number says which is newer."""

    def __init__(self) -> None:
        self._groups: dict[str, dict[str, Value]] = {}

    def keep(self, group: str, key: str, value: Value) -> bool:
        """Keep a value, unless enough newer groups are known; returns whether it was kept."""
        newest = sorted({*self._groups, group}, key=_age)[-MAX_GROUPS:]
        if group in newest:
            self._groups.setdefault(group, {})[key] = value
        for old in self._groups.keys() - set(newest):
            del self._groups[old]
        return group in newest

    def of(self, group: str) -> dict[str, Value]:
        """The values of a group."""
        return self._groups.get(group, {})

    def __iter__(self) -> Iterator[tuple[str, str, Value]]:
        """All of (group, key, value)."""
        return iter([(g, key, value) for g, values in self._groups.items() for key, value in values.items()])


def _age(group: str) -> tuple[int, int]:
    incarnation, number = group.split(".")
    return int(number), int(incarnation)
