"""Every message between members and the hub: who sends it, what is in it, and what it means.

A message is one line of JSON with its kind under ``type``. This file is the protocol's definition: what is not here is
not sent, and what does not fit is an error where it arrives. Values that consist of several fields are declared in
:mod:`~raytrain_het.membership.message_parts`.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from raytrain_het.membership.cursor import Cursor
from raytrain_het.membership.events import OfWorker
from raytrain_het.membership.message_parts import Address, Known, LoopProgress, Paths, Poison, Raise, ReplicaAudit
from raytrain_het.membership.place import Place
from raytrain_het.membership.record import Member, Record


def _snake(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


class Message(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag=_snake):
    """One message. Its kind is its class's name, in small letters."""

    @property
    def kind(self) -> str:
        """As it stands on the wire."""
        return str(self.__struct_config__.tag)


# -------------------------------------------------------------------- from a member to the hub


class ToHub(Message, frozen=True, kw_only=True):
    """From a member."""


class Hello(ToHub, frozen=True, kw_only=True):
    """The first message of a connection, also of one that was lost and made again."""

    member: Member
    cursor: Cursor
    healed: bool
    fresh: bool
    record: Record | None
    """The newest that it has. A restarted hub goes on from the newest of all members."""
    answered: int
    """The highest generation number that it has answered to."""
    want: int
    """The highest that it was told of."""
    fingerprint: str
    checkpoint: str | None
    checkpoint_cursor: Cursor | None
    known: Known | None = None


class Answer(ToHub, frozen=True, kw_only=True):
    """Answers a :class:`Void`, or a :class:`Want` that all know of: from now on it commits nothing of an older one."""

    number: int
    cursor: Cursor
    healed: bool
    fresh: bool
    batch: list[int] | None
    """``[epoch, first sample, samples]`` of the step that is open."""


class Pong(ToHub, frozen=True, kw_only=True):
    """Answers a :class:`Ping`, whatever the training thread does."""

    position: int
    place: Place | None = None
    told: LoopProgress | None = None


class Failed(ToHub, frozen=True, kw_only=True):
    """A collective of that generation has failed."""

    generation: int
    reason: str


class Suspect(ToHub, frozen=True, kw_only=True):
    """A collective takes longer than it should."""

    generation: int
    step: int


class Waiting(ToHub, frozen=True, kw_only=True):
    """It waits outside of a collective, and asks whether all members still answer."""


class Healed(ToHub, frozen=True, kw_only=True):
    """It has caught up, and wants a share."""


class Verified(ToHub, frozen=True, kw_only=True):
    """It has compared what it healed by replay with its source: both are the same."""


class Stats(ToHub, frozen=True, kw_only=True):
    """How far it is, and what it has done since it started (samples, bytes, seconds), for people."""

    step: int
    epoch: int = 0
    samples: int = 0
    global_samples: int = 0
    steps: int = 0
    skipped: int = 0
    redone: int = 0
    clipped: int = 0
    compute_s: float = 0.0
    wait_s: float = 0.0
    bytes_sent: int = 0
    bytes_received: int = 0
    batch_share: int = 0
    step_s: float = 0.0
    left_out: float | None = None
    """Norm of its codec's residual."""
    told: LoopProgress | None = None
    device: str = ""
    node_ip: str = ""
    pid: int = 0


class Timing(ToHub, frozen=True, kw_only=True):
    """What its last steps took, ``[samples, own seconds, seconds of the cycle]`` each, and its messages."""

    global_batch_size: int
    steps: list[tuple[int, float, float]]
    paths: Paths | None = None
    errors: list[tuple[str, float]] = []
    """By codec, the part of a message that it has lost."""


class Event(ToHub, frozen=True, kw_only=True):
    """For the run's log."""

    event: OfWorker


class Leave(ToHub, frozen=True, kw_only=True):
    """It was asked to go, and wants to leave in good order."""


class Finish(ToHub, frozen=True, kw_only=True):
    """Its training function has returned, and its reports are stored."""

    cursor: Cursor
    confirmed: bool
    told: LoopProgress | None = None


class Returning(ToHub, frozen=True, kw_only=True):
    """Its training function has returned; reports are still to be stored."""


class Raised(ToHub, frozen=True, kw_only=True):
    """Its training function has raised: the traceback, and its last line."""

    error: str
    last: str = ""


class Report(ToHub, frozen=True, kw_only=True):
    """Its part of a report."""

    key: str
    """``<life>.<step>.<ordinal>``, the same on all workers."""
    step: int
    epoch: int
    metrics: dict[str, Any]
    reduce: dict[str, Any] = {}
    samples: int | float = 0
    checkpoint: bool = True
    holds_snapshot: bool = False
    at: str = ""
    told: LoopProgress | None = None
    since_last: dict[str, int | float] | None = None
    lr: Any = None
    audit: ReplicaAudit | None = None


class Stored(ToHub, frozen=True, kw_only=True):
    """It has stored the checkpoint of a report, or failed to."""

    key: str
    path: str | None
    error: str | None
    cursor: Cursor


class Audit(ToHub, frozen=True, kw_only=True):
    """The part of its replica that it looked at in a step in which digests differ."""

    step: int
    part: int
    generation: int
    audit: ReplicaAudit


class Claim(ToHub, frozen=True, kw_only=True):
    """What its loss is a mean over, in a step in which workers' losses differ."""

    step: int
    name: str
    value: Any


class Evaluate(ToHub, frozen=True, kw_only=True):
    """The result of a chunk of an evaluation, or what it raised; and a request for the next."""

    id: int = 0
    """Of the request, for its reply."""
    key: str
    num_chunks: int
    result: tuple[int, dict[str, float]] | None = None
    error: Raise | None = None


# -------------------------------------------------------------------- from the hub to a member


class ToMember(Message, frozen=True, kw_only=True):
    """From the hub."""


class Ping(ToMember, frozen=True, kw_only=True):
    """Asks a member whether it is there, and where."""


class Want(ToMember, frozen=True, kw_only=True):
    """A new generation is wanted; the present one goes on until all have agreed by a step's headers."""

    number: int


class Void(ToMember, frozen=True, kw_only=True):
    """Generations before this number are over: answer, and commit nothing of them."""

    number: int


class Formed(ToMember, frozen=True, kw_only=True, tag="record"):
    """The generation that is in force from now on."""

    record: Record


class Checkpoint(ToMember, frozen=True, kw_only=True):
    """The newest checkpoint."""

    path: str | None
    cursor: Cursor


class Reply(ToMember, frozen=True, kw_only=True):
    """Answers :class:`Evaluate`: a chunk to compute, the sums, an error for all, or nothing yet."""

    id: int
    chunk: int | None = None
    sums: dict[str, float] | None = None
    error: Raise | None = None


class Evicted(ToMember, frozen=True, kw_only=True):
    """The receiver is no member any more."""

    reason: str


class Mismatch(ToMember, frozen=True, kw_only=True):
    """Replicas or programs differ, so the run ends."""

    message: str


class Fail(ToMember, frozen=True, kw_only=True):
    """The run has failed."""

    message: str
    poison: Poison | None = None


class Bye(ToMember, frozen=True, kw_only=True):
    """The receiver may go."""

    how: str
    heir: Address | None = None
    """The state server of the member that takes over its residual."""


class End(ToMember, frozen=True, kw_only=True):
    """The run is over."""


class Acknowledged(ToMember, frozen=True, kw_only=True):
    """These reports are registered, and may be forgotten."""

    keys: list[str]


class Write(ToMember, frozen=True, kw_only=True):
    """Write the checkpoint of this report, with the parts of these members."""

    key: str
    uids: list[str]


# -------------------------------------------------------------------- either way


class Meet(Message, frozen=True, kw_only=True):
    """Something that a member says to all who make a process group; the hub passes it on."""

    group: str
    key: str
    value: str
    """Base 64."""


class Meets(ToMember, frozen=True, kw_only=True):
    """What several members have said to each other, for all: in a large fleet each would be a message to each."""

    said: list[Meet]


FromMember = (
    Hello
    | Answer
    | Pong
    | Failed
    | Suspect
    | Waiting
    | Healed
    | Verified
    | Stats
    | Timing
    | Event
    | Leave
    | Finish
    | Returning
    | Raised
    | Report
    | Stored
    | Audit
    | Claim
    | Evaluate
    | Meet
)
FromHub = (
    Ping
    | Want
    | Void
    | Formed
    | Checkpoint
    | Reply
    | Evicted
    | Mismatch
    | Fail
    | Bye
    | End
    | Acknowledged
    | Write
    | Meet
    | Meets
)
