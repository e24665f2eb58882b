"""Values that travel inside of messages, see :mod:`raytrain_het.membership.protocol`."""

from __future__ import annotations

from typing import Any

import msgspec

from raytrain_het.balance.profile import Profile


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """Something inside of a message."""


class Codecs(Part, frozen=True, kw_only=True):
    """What codecs cost a worker, and how much there is to encode."""

    costs: dict[str, list[float]]
    num_elements: int
    byte_cpu_s: float


class Known(Part, frozen=True, kw_only=True):
    """What a worker knows of its speed."""

    profile: Profile
    global_batch_size: int
    codecs: Codecs | None = None


class LoopProgress(Part, frozen=True, kw_only=True):
    """How far a worker's loop is, and what it has reported: see :mod:`raytrain_het.membership.skipped_reports`."""

    life: int
    """Which of the run's lives it is in."""
    began: int
    """The first step whose reports concern it."""
    step: int
    """The last step that its loop has committed."""
    reported: str | None
    """Key of its last report."""
    complete: bool = False
    """Whether its loop over epochs has come to its end."""


class Paths(Part, frozen=True, kw_only=True):
    """How long a worker's messages to peers were on the way."""

    to: list[tuple[int, float, float]]
    """``(peer's slot, part of a gradient, seconds)`` each."""
    gradient_bytes: int


class ReplicaAudit(Part, frozen=True, kw_only=True):
    """What a worker says of a part of its replica at one step: see :mod:`raytrain_het.membership.audit`."""

    kind: str
    """What its arithmetic depends on: device, processor, threads, torch. Between members of one kind everything has to
    be the same to the bit; between others tensors may differ by rounding."""
    numbers: list[tuple[str, Any]]
    """Name and value of settings, flags and registered numbers."""
    tensors: list[tuple[str, Any]]
    """Name and digest of its tensors, or of a piece of one."""
    samples: dict[str, tuple[list[float], float | None]]
    """By name: some of a tensor's values, and by how much they have changed since all had the same; None where that is
    not known."""


class Address(Part, frozen=True, kw_only=True):
    """The address of a member's state server."""

    host: str
    port: int


class Poison(Part, frozen=True, kw_only=True):
    """A step that has killed the workers that computed it."""

    step: int
    slots: list[int]
    ranks: list[int]
    shares: tuple[float, ...]


class Raise(Part, frozen=True, kw_only=True):
    """An exception in an evaluation: the worker's uid, the traceback, and the exception itself where it can be sent."""

    uid: str | None
    text: str
    pickled: str | None = None
    slot: int | None = None
