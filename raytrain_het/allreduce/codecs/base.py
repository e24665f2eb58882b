"""What a codec is: tensors -> bytes of a fixed capacity -> tensors."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import ClassVar

import torch

from raytrain_het.allreduce.codecs.compiled import array, kernels, loops_for
from raytrain_het.errors import ProtocolError

State = dict[str, torch.Tensor]
"""Element-aligned state: every tensor's first dimension is the bucket's element count, so that it can be cut into
whatever shards are in force and be kept by parameter name."""

RESIDUAL = "residual"
"""The state of error feedback: what encoding has left out so far, in units of the mean gradient."""


@dataclass(frozen=True)
class Stamp:
    """What an encoding depends on besides its values."""

    key: int = 0
    """31 bits, other ones for every encoding."""
    shared_key: int = 0
    """31 bits, the same for all encodings of a shard in a step, whoever makes them."""
    weight: float = 1.0
    """The sum of weights that the mean will be divided by, as far as it is known; 1 for the mean itself."""


class Codec(abc.ABC):
    """Encodes a one-dimensional shard into a payload and back.

    The payload's *capacity* is a pure function of the element count and dtype, known to both sides without running:
    a message of another length than expected is an error. What varies is packed inside with its true length.

    State (error feedback and the like) is explicit: ``encode`` reads ``state`` and writes ``new_state``; the caller
    keeps the old one until the step is confirmed, and goes back to it if the step is done again.
    """

    name: ClassVar[str]
    uses_stamp: ClassVar[bool] = False
    spares_small: ClassVar[bool] = False
    """Whether small parameters had better travel as they are."""
    biased: ClassVar[bool] = False
    """Whether the decoded value's expectation differs from the input's (then it needs error feedback)."""

    all_gather: bool = False
    """Whether what a member sends goes to all, who add it up themselves, and not to owners, who encode the mean."""

    def init(self, num_elements: int, dtype: torch.dtype, device: torch.device) -> State:
        """State for a bucket of so many elements; empty for a stateless codec."""
        return {}

    def prepare(self) -> None:
        """Load what the first encoding would have to wait for: called before peers wait."""
        return None

    def at_epoch(self, epoch: int) -> Codec:
        """The codec that is used in this epoch, counted from 0: the same object each time. Itself, unless it warms
        up."""
        return self

    @abc.abstractmethod
    def capacity_bytes(self, num_elements: int, dtype: torch.dtype) -> int:
        """Bytes of the payload of so many elements."""

    def in_place(self, payload: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
        """The payload (capacity,) uint8 seen as values of ``dtype``, sharing its memory, where encoding changes no bit;
        else None.

        Then sums are made where they are sent from, and added from where they arrive: at a gigabyte a second, copies
        are what the all-reduce costs.
        """
        return None

    @abc.abstractmethod
    def encode(self, x: torch.Tensor, payload: torch.Tensor, stamp: Stamp, state: State, new_state: State) -> None:
        """Encode ``x`` (n,) into ``payload`` (capacity,) uint8; write the state that follows into ``new_state``.

        All are on one device, but that a codec without state may be given ``x`` from another one than the payload's.
        """

    @abc.abstractmethod
    def decode(self, payload: torch.Tensor, out: torch.Tensor) -> None:
        """Decode ``payload`` (capacity,) uint8 into ``out`` (n,). Deterministic, on every device.

        Raises:
            ProtocolError: the payload does not decode.
        """

    def add(self, payload: torch.Tensor, total: torch.Tensor, scratch: torch.Tensor) -> None:
        """Add what a payload decodes to to ``total`` (n,); ``scratch`` (n,) may be written over."""
        self.decode(payload, scratch)
        total.add_(scratch)


_HEAD_BYTES = 16
"""True length of what follows and the key, 4 bytes each; a checksum."""


@dataclass(frozen=True)
class Feedback:
    """``y = x + weight * residual`` is encoded, and ``(y - decoded(y)) / weight`` is the next residual."""

    residual: torch.Tensor
    following: torch.Tensor
    weight: float

    def to(self, x: torch.Tensor) -> torch.Tensor:
        """``y``, where the next residual will be."""
        return torch.add(x, self.residual, alpha=self.weight, out=self.following)

    def left(self, y: torch.Tensor, decoded: torch.Tensor) -> None:
        """Keep what was not sent."""
        torch.sub(y, decoded, out=self.following).div_(self.weight)


class PackedCodec(Codec):
    """A codec that loses something: it works in fp32, behind a head that tells a damaged payload.

    With *error feedback* it encodes ``y = x + W r``, with ``W`` the sum of weights and ``r`` the residual, and keeps
    ``r' = (y - decoded(y)) / W``: what was left out now is sent later. In units of the mean gradient, so that it means
    the same under another global batch. (Seide et al. 2014; Karimireddy et al. 2019.)
    """

    uses_stamp = True
    spares_small = True
    length_varies: ClassVar[bool] = False
    error_feedback: bool

    def init(self, num_elements: int, dtype: torch.dtype, device: torch.device) -> State:
        return {RESIDUAL: torch.zeros(num_elements, dtype=torch.float32, device=device)} if self.error_feedback else {}

    def prepare(self) -> None:
        kernels()

    def capacity_bytes(self, num_elements: int, dtype: torch.dtype) -> int:
        return _HEAD_BYTES + -(-self.body_bytes(num_elements) // 8) * 8

    def encode(self, x: torch.Tensor, payload: torch.Tensor, stamp: Stamp, state: State, new_state: State) -> None:
        body = payload[_HEAD_BYTES:]
        if x.dtype != torch.float32:
            x = x.to(torch.float32).clamp_(_LOWEST, _LARGEST)
        feedback = Feedback(state[RESIDUAL], new_state[RESIDUAL], stamp.weight) if RESIDUAL in state else None
        length = self.pack(x.to(payload.device), body, stamp, feedback)
        body[length:].zero_()
        head = payload[:_HEAD_BYTES].view(torch.int64)
        first = length | stamp.shared_key << 32
        head[0], head[1] = first, _checksum(first, body)

    def decode(self, payload: torch.Tensor, out: torch.Tensor) -> None:
        body, shared_key = self._opened(payload, out.numel())
        values = out
        if out.dtype != torch.float32 or out.device != payload.device:
            values = torch.empty(out.numel(), dtype=torch.float32, device=payload.device)
        self.unpack(body, shared_key, values)
        if values is not out:
            out.copy_(values)

    def add(self, payload: torch.Tensor, total: torch.Tensor, scratch: torch.Tensor) -> None:
        if total.dtype != torch.float32 or total.device != payload.device:
            super().add(payload, total, scratch)
            return
        body, shared_key = self._opened(payload, total.numel())
        self.unpack_and_add(body, shared_key, total, scratch)

    def _opened(self, payload: torch.Tensor, num_elements: int) -> tuple[torch.Tensor, int]:
        """The body, and the shared key, if all is as it was sent."""
        body = payload[_HEAD_BYTES:]
        first, checksum = payload[:_HEAD_BYTES].view(torch.int64).tolist()
        length, shared_key = first & 0xFFFFFFFF, first >> 32
        most = self.body_bytes(num_elements)
        if checksum != _checksum(first, body) or length > most or (length < most and not self.length_varies):
            raise ProtocolError(
                f"a payload of {payload.numel()} bytes in codec {self.name!r} does not decode: its checksum or its "
                "length is wrong. It was damaged on its way, or sender and receiver run different versions."
            )
        return body[:length], shared_key

    @abc.abstractmethod
    def body_bytes(self, num_elements: int) -> int:
        """The most bytes that so many elements can take, without the head."""

    @abc.abstractmethod
    def pack(self, x: torch.Tensor, body: torch.Tensor, stamp: Stamp, feedback: Feedback | None) -> int:
        """Encode ``x`` (n,) fp32, or with feedback what that makes of it, into ``body`` (body_bytes or more,) uint8.

        Returns:
            Bytes written.
        """

    @abc.abstractmethod
    def unpack(self, body: torch.Tensor, shared_key: int, out: torch.Tensor) -> None:
        """Decode ``body`` (length,) uint8 into ``out`` (n,) fp32."""

    def unpack_and_add(self, body: torch.Tensor, shared_key: int, total: torch.Tensor, scratch: torch.Tensor) -> None:
        """Add what :meth:`unpack` would give to ``total`` (n,) fp32; ``scratch`` (n,) may be written over."""
        self.unpack(body, shared_key, scratch)
        total.add_(scratch)


def mix(*parts: int) -> int:
    """31 bits that depend on every bit of all parts, and on their order (splitmix64)."""
    mixed = 0
    for part in parts:
        mixed = (mixed + part + 0x9E3779B97F4A7C15) & _MASK
        mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 & _MASK
        mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB & _MASK
        mixed ^= mixed >> 31
    return mixed >> 33


_MASK = 2**64 - 1
_LARGEST = torch.finfo(torch.float32).max
_LOWEST = torch.finfo(torch.float32).min


def _checksum(first: int, body: torch.Tensor) -> int:
    """``sum (2 i + 1) word_i`` of the 8-byte words, and the head's first word, so that zeros are no payload."""
    loops, words = loops_for(body), body.view(torch.int64)
    if loops is not None:
        total = int(loops.weighted_sum(array(words)))
    else:
        total = int(torch.arange(1, 2 * words.numel(), 2, device=words.device).mul_(words).sum())
    return (total + (first + 1) * 0x9E3779B97F4A7C15 + 2**63) % 2**64 - 2**63
