"""The header of a bucket: what one member says of its gradient, or several say together.

It travels in front of a payload, and nowhere else: from every member to the owners of the bucket, and, merged, from the
owners to all members in front of the mean. So a step needs no message for it. A merged header is a header again, so
headers are merged on their way as gradients are added up: at the owners, or on a machine and then among machines.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable
from typing import NamedTuple

import torch

from raytrain_het.allreduce.layout import aligned
from raytrain_het.errors import ProtocolError

_FIXED = struct.Struct("<HHHHqqqdqq")
MAGIC = 0x4E57
CONTRIBUTES, REPLICAS_DIFFER, LOSSES_DIFFER = 1, 2, 4


HeaderPlace = torch.Tensor | memoryview
"""A header's memory: a tensor on a device, or plain bytes on a CPU, which are ten times as cheap to handle."""


class Header(NamedTuple):
    """What is said about one bucket of one step, by one member or by several."""

    step: int
    generation: int
    bucket: int
    want: int
    """The highest generation number that any of them was told of."""
    weight: float
    """The sum of the weights ``w_i`` of gradients that count: the samples behind them (or the user's measure)."""
    contributes: bool
    """False if no gradient counts, as with an empty share: the payload is dropped, and not multiplied by 0."""
    used: int
    """Bit ``k`` is set if parameter ``k`` of the bucket had a gradient that counts."""
    nonfinite: int = 0
    """Bit ``i`` is set if the gradient of rank ``i`` counts and is not finite."""
    digest: int = 0
    """Digest of a part of a replica when the step was opened; 0 where no comparison is due."""
    numbers: int = 0
    """Digest of the settings and numbers that a member goes by in this step; 0 where no comparison is due."""
    loss: int = 0
    """What a loss is a mean over, as 16 bits; 0 where that is not known."""
    replicas_differ: bool = False
    """Whether several speak, and ``digest`` or ``numbers`` are not the same for all."""
    losses_differ: bool = False
    """Whether several speak, and ``loss`` is not the same for all."""


def merged(headers: Iterable[Header]) -> Header:
    """What members say together. The sum of weights is exact, and so does not depend on the order."""
    first, *others = headers
    said = [first, *others]
    contributing = [h for h in said if h.contributes]
    digests = [(h.digest, h.numbers) for h in said if h.digest]
    losses = [h.loss for h in contributing if h.loss]
    used = nonfinite = 0
    for header in contributing:
        used |= header.used
        nonfinite |= header.nonfinite
    digest, numbers = digests[0] if digests else (0, 0)
    return first._replace(
        want=max(h.want for h in said),
        weight=math.fsum(h.weight for h in contributing),
        contributes=bool(contributing),
        used=used,
        nonfinite=nonfinite,
        digest=digest,
        numbers=numbers,
        loss=losses[0] if losses else 0,
        replicas_differ=any(h.replicas_differ for h in said) or len(set(digests)) > 1,
        losses_differ=any(h.losses_differ for h in said) or len(set(losses)) > 1,
    )


class HeaderFormat:
    """How a bucket's headers lie in memory.

    Args:
        num_segments: tensors of the bucket.
        num_members: of the generation.
    """

    def __init__(self, num_segments: int, num_members: int) -> None:
        self._used = slice(_FIXED.size, _FIXED.size + (num_segments + 7) // 8)
        self._nonfinite = slice(self._used.stop, self._used.stop + (num_members + 7) // 8)
        self.num_bytes = aligned(self._nonfinite.stop)

    def place(self, message: torch.Tensor) -> HeaderPlace:
        """The memory of a message's header (uint8), to be written and read again and again."""
        place = message[: self.num_bytes]
        return place.numpy().data if place.device.type == "cpu" else place

    def write(self, header: Header, *places: HeaderPlace) -> None:
        """Pack it into each of ``places`` (num_bytes,) uint8."""
        flags = CONTRIBUTES * header.contributes
        flags |= REPLICAS_DIFFER * header.replicas_differ | LOSSES_DIFFER * header.losses_differ
        data = _FIXED.pack(
            MAGIC,
            header.bucket,
            flags,
            header.loss,
            header.step,
            header.generation,
            header.want,
            header.weight,
            header.digest,
            header.numbers,
        )
        data += header.used.to_bytes(self._used.stop - self._used.start, "little")
        data += header.nonfinite.to_bytes(self._nonfinite.stop - self._nonfinite.start, "little")
        data = data.ljust(self.num_bytes, b"\0")
        on_device: torch.Tensor | None = None
        for place in places:
            if isinstance(place, memoryview):
                place[:] = data
            elif on_device is None:
                on_device = place.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
            else:
                place.copy_(on_device)

    def read(self, message: HeaderPlace) -> Header:
        """Unpack the first bytes of a message.

        Raises:
            ProtocolError: they are no header.
        """
        if isinstance(message, torch.Tensor):
            message = message[: self.num_bytes].cpu().numpy().data
        magic, bucket, flags, loss, step, generation, want, weight, digest, numbers = _FIXED.unpack_from(message)
        if magic != MAGIC:
            raise ProtocolError(
                f"a message starts with {magic:#06x} instead of {MAGIC:#06x}: it is not a step's message"
            )
        return Header(
            step=step,
            generation=generation,
            bucket=bucket,
            want=want,
            weight=weight,
            contributes=bool(flags & CONTRIBUTES),
            used=int.from_bytes(message[self._used], "little"),
            nonfinite=int.from_bytes(message[self._nonfinite], "little"),
            digest=digest,
            numbers=numbers,
            loss=loss,
            replicas_differ=bool(flags & REPLICAS_DIFFER),
            losses_differ=bool(flags & LOSSES_DIFFER),
        )
