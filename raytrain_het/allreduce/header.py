"""The header in front of every message of a bucket. It is small, has a fixed size, and goes to every member."""

from __future__ import annotations

import struct
from typing import NamedTuple

import torch

from raytrain_het.allreduce.layout import aligned
from raytrain_het.errors import ProtocolError

_FIXED = struct.Struct("<HHHHqqqdqq")
MAGIC = 0x4E57
FINITE, CONTRIBUTES = 1, 2


HeaderPlace = torch.Tensor | memoryview
"""A header's memory: a tensor on a device, or plain bytes on a CPU, which are ten times as cheap to handle."""


class Header(NamedTuple):
    """What a sender says about one bucket of one step."""

    step: int
    generation: int
    bucket: int
    want: int
    """The highest generation number that the sender was told of."""
    weight: float
    """The weight ``w_i`` of its gradient: the samples behind it (or the user's measure)."""
    finite: bool
    contributes: bool
    """False with an empty share: the payload is dropped, and not multiplied by 0."""
    digest: int
    """Digest of a part of its replica when the step was opened; 0 where no comparison is due."""
    used: int
    """Bit ``k`` is set if parameter ``k`` of the bucket had a gradient."""
    numbers: int = 0
    """Digest of the settings and numbers that it goes by in this step; 0 where no comparison is due."""
    loss: int = 0
    """What its loss is a mean over, as 16 bits; 0 where that is not known."""


def header_bytes(num_segments: int) -> int:
    """Bytes of the header of a bucket with so many tensors."""
    return aligned(_FIXED.size + (num_segments + 7) // 8)


def header_place(message: torch.Tensor, num_segments: int) -> HeaderPlace:
    """The memory of a message's header (uint8), to be written and read again and again."""
    place = message[: header_bytes(num_segments)]
    return place.numpy().data if place.device.type == "cpu" else place


def write_header(header: Header, num_segments: int, *places: HeaderPlace) -> None:
    """Pack it into each of ``places`` (header_bytes,) uint8."""
    flags = FINITE * header.finite + CONTRIBUTES * header.contributes
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
    data += header.used.to_bytes((num_segments + 7) // 8, "little")
    data = data.ljust(header_bytes(num_segments), b"\0")
    on_device: torch.Tensor | None = None
    for place in places:
        if isinstance(place, memoryview):
            place[:] = data
        elif on_device is None:
            on_device = place.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        else:
            place.copy_(on_device)


def read_header(message: HeaderPlace, num_segments: int) -> Header:
    """Unpack the first bytes of a message.

    Raises:
        ProtocolError: they are no header.
    """
    if isinstance(message, torch.Tensor):
        message = message[: header_bytes(num_segments)].cpu().numpy().data
    magic, bucket, flags, loss, step, generation, want, weight, digest, numbers = _FIXED.unpack_from(message)
    if magic != MAGIC:
        raise ProtocolError(f"a message starts with {magic:#06x} instead of {MAGIC:#06x}: it is not a step's message")
    used = int.from_bytes(message[_FIXED.size : _FIXED.size + (num_segments + 7) // 8], "little")
    return Header(
        step,
        generation,
        bucket,
        want,
        weight,
        bool(flags & FINITE),
        bool(flags & CONTRIBUTES),
        digest,
        used,
        numbers,
        loss,
    )
