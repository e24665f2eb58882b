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


class Told(Part, frozen=True, kw_only=True):
    """How far a worker's loop is, and what it has reported: see :mod:`raytrain_het.membership.passing`."""

    life: int
    began: int
    step: int
    reported: str | None
    complete: bool = False


class Paths(Part, frozen=True, kw_only=True):
    """How long a worker's messages to peers were on the way: ``[peer's slot, part of its gradient, seconds]``."""

    to: list[tuple[int, float, float]]
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
    """Of a member's state server."""

    host: str
    port: int


class Poison(Part, frozen=True, kw_only=True):
    """A step that has killed whoever computed it."""

    step: int
    slots: list[int]
    ranks: list[int]
    shares: tuple[float, ...]


class Raise(Part, frozen=True, kw_only=True):
    """An exception in an evaluation: whose, its traceback, and itself where it can be sent."""

    uid: str | None
    text: str
    pickled: str | None = None
    slot: int | None = None
