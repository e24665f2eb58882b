"""Blockwise integers with stochastic rounding: ``int8`` and ``int4``."""

from __future__ import annotations

import abc
from typing import ClassVar

import torch
import torch.nn.functional as F

from raytrain_het.allreduce.codecs.base import Stamp
from raytrain_het.allreduce.codecs.compiled import array, arrays, loops_for
from raytrain_het.allreduce.codecs.packed import Feedback, PackedCodec
from raytrain_het.codec_options import BlockwiseOptions

_TINY = 2.0**-119


class BlockCodec(PackedCodec):
    """A codec whose body is one fp32 scale for each block, and behind all scales the packed elements."""

    block: ClassVar[int]

    def _num_blocks(self, num_elements: int) -> int:
        return -(-num_elements // self.block)

    def _cut(self, body: torch.Tensor, num_elements: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The scales (blocks,) fp32, and the packed elements uint8."""
        size = 4 * self._num_blocks(num_elements)
        return body[:size].view(torch.float32), body[size : self.body_bytes(num_elements)]


class Blockwise(BlockCodec):
    """``decoded = s q``: by block a scale ``s = max |y| / levels``, by element a whole number ``q``.

    ``q = floor(y / s + u)`` with ``u`` uniform in [0, 1): a hash of the stamp's key and the element's place. A block
    whose largest value is below ``2^-119`` becomes zeros.

    Bias: none. The decoded value's expectation is ``y`` (to ``2^-17 s``), and its error is below ``s``.
    Error feedback: optional, off by default.
    Source: QSGD (Alistarh et al. 2017, arXiv:1610.02132).

    Args:
        options: see :class:`raytrain_het.codec_options.BlockwiseOptions`.
    """

    levels: ClassVar[int]
    """``q`` is from ``-levels`` to ``levels``."""

    def __init__(self, options: BlockwiseOptions) -> None:
        super().__init__(options)
        self.error_feedback = options.error_feedback

    def pack(self, x: torch.Tensor, body: torch.Tensor, stamp: Stamp, feedback: Feedback | None) -> int:
        scales, packed = self._cut(body, x.numel())
        loops = loops_for(x)
        if loops is not None:
            q = self._room(packed, x.numel())
            loops.round_blocks(array(x), self.levels, stamp.key, self.block, array(q), array(scales), *arrays(feedback))
        else:
            y = x if feedback is None else feedback.corrected(x)
            rows = F.pad(y, (0, -y.numel() % self.block)).view(-1, self.block)
            largest = rows.abs().amax(1)
            scales.copy_(torch.where(largest > _TINY, largest / self.levels, 0.0))
            inverse = torch.where(largest > _TINY, self.levels / largest, 0.0).unsqueeze(1)
            numbers = (rows * inverse + chances(rows.numel(), stamp.key, y.device).view_as(rows)).floor_()
            q = numbers.clamp_(-self.levels, self.levels).to(torch.int8).view(-1)[: y.numel()]
            if feedback is not None:
                feedback.keep(y, q.to(torch.float32) * scales.repeat_interleave(self.block)[: y.numel()])
        self._put(q, packed)
        return self.body_bytes(x.numel())

    @abc.abstractmethod
    def _room(self, packed: torch.Tensor, num_elements: int) -> torch.Tensor:
        """Where the numbers are written, (n,) int8: in the body itself if they are packed as they are."""

    @abc.abstractmethod
    def _put(self, q: torch.Tensor, packed: torch.Tensor) -> None:
        """Pack the numbers, if they are not there yet."""


class Int8(Blockwise):
    """Blockwise integers of one byte.

    Body: ``ceil(n / 256)`` scales in fp32, and ``n`` int8. 3.9 times fewer bytes than fp32.
    """

    name = "int8"
    block = 256
    levels = 127

    def body_bytes(self, num_elements: int) -> int:
        return 4 * self._num_blocks(num_elements) + num_elements

    def _room(self, packed: torch.Tensor, num_elements: int) -> torch.Tensor:
        return packed.view(torch.int8)

    def _put(self, q: torch.Tensor, packed: torch.Tensor) -> None:
        if q.data_ptr() != packed.data_ptr():
            packed.view(torch.int8).copy_(q)

    def unpack(self, body: torch.Tensor, shared_key: int, out: torch.Tensor) -> None:
        scales, packed = self._cut(body, out.numel())
        loops = loops_for(out)
        if loops is not None:
            loops.scale_blocks(array(packed.view(torch.int8)), self.block, array(scales), array(out))
        else:
            out.copy_(packed.view(torch.int8)).mul_(scales.repeat_interleave(self.block)[: out.numel()])


class Int4(Blockwise):
    """Blockwise integers of half a byte.

    Body: ``b = ceil(n / 128)`` scales in fp32, and 64 bytes a block: byte ``j`` holds ``q_j + 8`` in its low half and
    ``q_(j+64) + 8`` in its high half. 7.5 times fewer bytes than fp32.
    """

    name = "int4"
    block = 128
    levels = 7

    def body_bytes(self, num_elements: int) -> int:
        return self._num_blocks(num_elements) * (4 + self.block // 2)

    def _room(self, packed: torch.Tensor, num_elements: int) -> torch.Tensor:
        return torch.empty(num_elements, dtype=torch.int8, device=packed.device)

    def _put(self, q: torch.Tensor, packed: torch.Tensor) -> None:
        loops, half = loops_for(q), self.block // 2
        if loops is not None:
            loops.pack_nibbles(array(q), half, array(packed))
        else:
            halves = (F.pad(q, (0, -q.numel() % self.block)) + 8).view(torch.uint8).view(-1, 2, half)
            torch.bitwise_or(halves[:, 0], halves[:, 1] << 4, out=packed.view(-1, half))

    def unpack(self, body: torch.Tensor, shared_key: int, out: torch.Tensor) -> None:
        scales, packed = self._cut(body, out.numel())
        loops, half = loops_for(out), self.block // 2
        if loops is not None:
            loops.scale_nibbles(array(packed), half, array(scales), array(out))
        else:
            pairs = packed.view(-1, half)
            numbers = torch.stack((pairs & 15, pairs >> 4), 1).to(torch.float32).sub_(8)
            numbers.mul_(scales.view(-1, 1, 1))
            out.copy_(numbers.view(-1)[: out.numel()])


def chances(num_elements: int, key: int, device: torch.device) -> torch.Tensor:
    """(n,) numbers from 0 to below 1, those that the compiled loops draw for this key."""
    h = torch.arange(num_elements, device=device).mul_(0x9E3779B1).add_(key).bitwise_and_(_WORD)
    h = (h ^ h >> 16).mul_(0x45D9F3B).bitwise_and_(_WORD)
    return ((h ^ h >> 13) >> 8).to(torch.float32).mul_(2.0**-24)


_WORD = 2**32 - 1
