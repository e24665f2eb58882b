"""What a codec is: values -> bytes of a capacity that both ends know -> values.

The communication thread calls codecs, one call at a time. A codec keeps nothing between calls: what it remembers from
step to step is explicit, and belongs to :class:`raytrain_het.allreduce.error_feedback.ErrorFeedback`.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from raytrain_het.codec_options import CodecOptions

State = dict[str, torch.Tensor]
"""Element-aligned state: every tensor's first dimension is the bucket's element count. So it can be cut into whatever
shards are in force, and be kept by parameter name."""

RESIDUAL = "residual"
"""The state of error feedback: what encoding has left out so far, in units of the mean gradient."""

TRIAL_ELEMENTS = 1 << 17
"""Values on which a codec is tried out."""


@dataclass(frozen=True)
class Stamp:
    """What an encoding depends on besides its values."""

    key: int = 0
    """31 bits, different for every encoding."""
    shared_key: int = 0
    """31 bits, the same for all encodings of a shard in a step, whoever makes them."""
    weight: float = 1.0
    """The sum of weights that the mean will be divided by, as far as it is known; 1 for the mean itself."""


@dataclass(frozen=True)
class CodecTrial:
    """A codec's work on sample values, to be timed."""

    num_elements: int
    num_bytes: float
    """On the wire, by element of the gradient."""
    error: Callable[[], float]
    """``|x - decoded(x)| / |x|`` of what was encoded last."""
    encode: Callable[[], None] | None = None
    """None if encoding costs nothing."""
    decode: Callable[[], None] | None = None
    """Decodes, and adds to a sum. None if that is part of ``encode``."""


class Codec(abc.ABC):
    """Encodes a one-dimensional shard into a payload and back.

    The payload's *capacity* is a pure function of the element count and dtype: a message of another length than
    expected is an error. What varies is packed inside with its true length.

    State (error feedback and the like) is explicit: :meth:`encode` reads ``state`` and writes ``new_state``. The caller
    keeps the old one until the step is confirmed, and goes back to it if the step is done again.

    Args:
        options: those of the codec's entry in :data:`raytrain_het.codec_options.CODECS`.
    """

    name: ClassVar[str]
    uses_stamp: ClassVar[bool] = False
    """Whether :meth:`encode` looks at its stamp."""
    spares_small: ClassVar[bool] = False
    """Whether small parameters travel better as they are."""
    biased: ClassVar[bool] = False
    """Whether the decoded value's expectation differs from the input's (then it needs error feedback)."""
    suits_adaptive_optimizers: ClassVar[bool] = True
    """Whether an optimizer that divides by a mean of squared gradients works with decoded gradients."""

    all_gather: bool = False
    """Whether each member's payload goes to all, who all add them up. Else it goes to owners, who encode the mean."""
    density: float | None = None
    """The kept fraction, of codecs that keep a part of the elements."""

    def __init__(self, options: CodecOptions) -> None:
        self.options = options

    def init(self, num_elements: int, dtype: torch.dtype, device: torch.device) -> State:
        """State for a bucket of so many elements; empty for a stateless codec."""
        return {}

    def prepare(self) -> None:
        """Load what the first encoding needs. Called before peers wait."""
        return None

    def at_epoch(self, epoch: int) -> Codec:
        """The codec that is used in this epoch, counted from 0: this one, unless it warms up. The same object each
        time."""
        return self

    @abc.abstractmethod
    def capacity_bytes(self, num_elements: int, dtype: torch.dtype) -> int:
        """Bytes of the payload of so many elements."""

    def gradient_bytes(self, shapes: Sequence[Sequence[int]], dtype: torch.dtype) -> int:
        """Bytes of a worker's whole gradient of these tensors on the wire."""
        return self.capacity_bytes(sum(map(math.prod, shapes)), dtype)

    def in_place(self, payload: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
        """The payload (capacity,) uint8 seen as values of ``dtype``, sharing its memory, where encoding changes no bit;
        else None.

        Then sums are made where they are sent from, and added from where they arrive: copies are most of what an
        all-reduce costs.
        """
        return None

    @abc.abstractmethod
    def encode(self, x: torch.Tensor, payload: torch.Tensor, stamp: Stamp, state: State, new_state: State) -> None:
        """Encode ``x`` (n,) into ``payload`` (capacity,) uint8; write the state that follows into ``new_state``.

        All are on one device. A codec without state may be given ``x`` from another device than the payload's.
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

    def warning_of_shapes(self, shapes: Mapping[str, Sequence[int]]) -> str | None:
        """What to tell a user whose model has tensors of these shapes, by name; None if there is nothing to tell."""
        return None

    def trial(self, shapes: Sequence[Sequence[int]]) -> CodecTrial:
        """Its work on normally distributed values, or on what it makes of tensors of these shapes."""
        self.prepare()
        x = torch.randn(TRIAL_ELEMENTS, generator=torch.Generator().manual_seed(0))
        payload = torch.empty(self.capacity_bytes(x.numel(), x.dtype), dtype=torch.uint8)
        state, following = (self.init(x.numel(), x.dtype, x.device) for _ in range(2))
        out, total, scratch = torch.empty_like(x), torch.zeros_like(x), torch.empty_like(x)

        def encode() -> None:
            self.encode(x, payload, Stamp(1, 1), state, following)

        def error() -> float:
            self.decode(payload, out)
            return relative_error(x, out)

        encode()
        return CodecTrial(
            num_elements=x.numel(),
            num_bytes=payload.numel() / x.numel(),
            error=error,
            encode=encode if self.in_place(payload, x.dtype) is None else None,  # Else gradients are gathered there.
            decode=lambda: self.add(payload, total, scratch),
        )


def relative_error(x: torch.Tensor, decoded: torch.Tensor) -> float:
    """``|x - decoded| / |x|``; 0 where there is nothing to lose."""
    norm = float(torch.linalg.vector_norm(x))
    return float(torch.linalg.vector_norm(x - decoded)) / norm if norm > 0 else 0.0


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
