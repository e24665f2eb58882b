"""What happens in a run, as ``events.jsonl`` tells it: one class for each kind of line.

A line has the event's fields and its ``kind``, which is the class's name in small letters unless the class says
otherwise. The log adds ``seq`` and ``time``. To what the hub saw it adds the ``generation`` in force, and to what a
worker said its ``slot``: see :class:`~raytrain_het.membership.event_log.Entry`. People's tools read these names, so
they stay.
"""

from __future__ import annotations

import dataclasses
import re

import msgspec
from msgspec import UNSET, UnsetType

from raytrain_het.balance.scoreboard import Table


def _snake(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


class Event(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag=_snake):
    """Something that happened."""

    @property
    def kind(self) -> str:
        """As it stands in the log."""
        return str(self.__struct_config__.tag)


class Warned(Event, frozen=True, kw_only=True, tag="warning"):
    """People should know this; by a worker or the hub."""

    text: str


# -------------------------------------------------------------------- members, as the hub sees them


class Joined(Event, frozen=True, kw_only=True):
    """A worker has connected for the first time."""

    slot: int
    uid: str
    device: str
    host: str


class Gone(Event, frozen=True, kw_only=True):
    """A worker is no member any more."""

    slot: int
    uid: str


class Lost(Gone, frozen=True, kw_only=True):
    """It has died."""

    reason: str
    expected: bool | UnsetType = UNSET
    """Whether the run had failed before."""
    left_out: float | UnsetType = UNSET
    """The norm of its residual, which is lost with it; left out where there is none."""


class Evicted(Lost, frozen=True, kw_only=True):
    """It was given up after the hang limit: the others waited for it, or nothing was heard of it."""


class Suspended(Event, frozen=True, kw_only=True):
    """A member does not answer, and the others go on without it. Its process and its slot stay."""

    slot: int
    uid: str
    reason: str


class CameBack(Event, frozen=True, kw_only=True):
    """A suspended member was heard again."""

    slot: int
    uid: str
    away_s: float
    missed: bool
    """Whether generations were formed without it, so that it heals from the others."""


class Left(Gone, frozen=True, kw_only=True):
    """It has left in good order."""

    step: int
    """The last that it has committed."""


class Finished(Left, frozen=True, kw_only=True):
    """Its training function has come to its end."""


class Raised(Gone, frozen=True, kw_only=True):
    """Its training function has raised."""

    error: str
    """The last line of the traceback."""


class Draining(Event, frozen=True, kw_only=True):
    """A member's machine will be taken away: the member leaves in good order."""

    slot: int
    uid: str
    reason: str


class Vacant(Event, frozen=True, kw_only=True):
    """No worker can be placed in a slot at the moment."""

    slot: int
    reason: str


class GivenUp(Event, frozen=True, kw_only=True):
    """A slot stays vacant."""

    slot: int
    reason: str


# -------------------------------------------------------------------- generations


class Wanted(Event, frozen=True, kw_only=True):
    """A generation is asked for, at the end of the step."""

    number: int
    reason: str


class Void(Event, frozen=True, kw_only=True):
    """A generation is asked for, and the present one is over."""

    number: int
    reason: str


class Formed(Event, frozen=True, kw_only=True):
    """A generation is in force; the fields are those of its record, with slots for members."""

    number: int
    base: int
    slots: list[int]
    unhealed: list[int]
    reason: str
    reset: bool
    table: int
    owners: list[float]


class TableIssued(Event, frozen=True, kw_only=True, tag="table"):
    """Another table of shares is followed from the next generation on; by slot, see :class:`Table`."""

    version: int
    scores: dict[int, float]
    lr_scales: dict[int, float]
    """The gradient weights."""
    shares: dict[int, int]
    predicted_step_s: float | None
    reason: str
    links_s: dict[int, float]
    codecs: dict[int, str]
    hierarchy: bool

    @classmethod
    def of(cls, table: Table) -> TableIssued:
        """The event of this table."""
        fields = dataclasses.asdict(table)
        return cls(lr_scales=fields.pop("gradient_weights"), **fields)


class TableKept(Event, frozen=True, kw_only=True):
    """No other table could be made, so that in force stays."""

    reason: str


class Waiting(Event, frozen=True, kw_only=True):
    """Some members have waited for a while."""

    slots: list[int]
    """Of those that do not wait."""
    waited_s: float
    reason: str
    """Where each of them is."""
    limit_s: float
    """So long a wait is allowed."""


class Recovered(Event, frozen=True, kw_only=True):
    """A restarted hub has put this record in force again."""

    number: int


class Empty(Event, frozen=True, kw_only=True):
    """No member is left; the slots' next workers start from the last checkpoint."""


class Failed(Event, frozen=True, kw_only=True):
    """The run has failed."""

    message: str


# -------------------------------------------------------------------- what workers say


class Healed(Event, frozen=True, kw_only=True):
    """A worker has caught up."""

    step: int
    by: str
    """How: by replay, or by another one's state."""


class HandedOn(Event, frozen=True, kw_only=True):
    """A worker has taken over the residual of one that left."""

    by: int
    """The slot of the one that left."""
    norm: float


class Skipped(Event, frozen=True, kw_only=True):
    """An update was skipped, as gradients were not finite."""

    step: int
    parameters: list[str]
    """Some of those whose gradients they were."""


class Drift(Event, frozen=True, kw_only=True):
    """How far parameters of unlike devices had come apart by rounding, before they were sent anew."""

    step: int
    largest_difference: float


class Compared(Event, frozen=True, kw_only=True):
    """A step's gradient was compared with that of one process that has the whole batch."""

    step: int
    error: float
    parameter: str
    explained_by: str
    """What would explain a difference; empty where nothing does."""


class CheckpointFailed(Event, frozen=True, kw_only=True):
    """A checkpoint could not be stored."""

    step: int
    error: str


OfWorker = Warned | Healed | HandedOn | Skipped | Drift | Compared | CheckpointFailed
"""What a worker may say."""
