"""The largest elements only: ``topk``."""

from __future__ import annotations

import math

import numpy as np
import torch

from raytrain_het.compression.base import Feedback, PackedCodec, Stamp
from raytrain_het.compression.blockwise import Int8
from raytrain_het.compression.compiled import array, arrays, loops_for
from raytrain_het.errors import ProtocolError

_CHUNK = 65536
"""Places are two bytes inside of a chunk."""
_LEAST_HITS = 64
"""So many sampled values, about, lie above the threshold, of which there are ..."""
_SPARE = 1.4
"""... so many times what is wanted: the best of those are taken."""
_STRIDES = (1, 2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73, 79, 83, 89, 97)
"""Of a sample. Primes, or else a matrix's columns might fall in with it."""
_LEAST = np.nextafter(np.float32(0), np.float32(1))
"""Zeros are not kept, however few other elements there are."""


class TopK(PackedCodec):
    """Of ``n`` elements the ``k = ceil(density n)`` of largest absolute value, as int8 with stochastic rounding.

    They are found by a threshold from a sample of every 97th element or more, and the best of those above it; so they
    are nearly the largest. A place takes two bytes, or one bit an element of the shard where that is less
    (``density > 1/16``). At 1 % that is 130 times fewer bytes than fp32. Error feedback is always on; momentum of a
    high factor wants a warm-up. (Aji, Heafield 2017; Lin et al. 2018; Stich et al. 2018.)

    Args:
        density: the kept fraction, above 0 and at most 1.
    """

    name = "topk"
    biased = True
    error_feedback = True
    length_varies = True

    def __init__(self, *, density: float = 0.01) -> None:
        self.density = density
        self._values = Int8()

    def num_kept(self, num_elements: int) -> int:
        """``k``."""
        return min(num_elements, math.ceil(self.density * num_elements))

    def _bitmap(self, num_elements: int) -> bool:
        return 2 * self.num_kept(num_elements) > num_elements / 8

    def body_bytes(self, num_elements: int) -> int:
        return self._ends(num_elements, self.num_kept(num_elements))[-1]

    def _ends(self, num_elements: int, k: int) -> tuple[int, int, int]:
        """Behind 8 bytes with ``k``: where values, what says how many places there are by chunk, and places end."""
        values = 8 + _up(self._values.body_bytes(k), 4)
        if self._bitmap(num_elements):
            return values, values, values + _up(num_elements, 8) // 8
        counts = values + 4 * (_up(num_elements, _CHUNK) // _CHUNK)
        return values, counts, counts + 2 * k

    def pack(self, x: torch.Tensor, body: torch.Tensor, stamp: Stamp, feedback: Feedback | None) -> int:
        n = x.numel()
        y, places = self._largest(x, feedback)
        kept = y[places]
        k = kept.numel()
        values, counts, end = self._ends(n, k)
        body[:8].view(torch.int64).fill_(k)
        left = Feedback(torch.zeros_like(kept), torch.empty_like(kept), 1.0)
        written = 8 + self._values.pack(kept, body[8:values], stamp, left)
        body[written:values].zero_()
        if self._bitmap(n):
            mask = torch.zeros(_up(n, 8), dtype=torch.bool, device=x.device)
            mask[places] = True
            body[counts:end].copy_(_packed_bits(mask))
        else:
            by_chunk = torch.bincount(places // _CHUNK, minlength=(counts - values) // 4)
            body[values:counts].view(torch.int32).copy_(by_chunk)
            body[counts:end].view(torch.int16).copy_(places.to(torch.int32))  # The low two bytes.
        if feedback is not None:
            torch.mul(y, 1 / feedback.weight, out=feedback.following)
            feedback.following[places] = left.following / feedback.weight
        return end

    def unpack(self, body: torch.Tensor, shared_key: int, out: torch.Tensor) -> None:
        n = out.numel()
        k = int(body[:8].view(torch.int64)) if body.numel() >= 8 else -1
        if not 0 <= k <= self.num_kept(n) or body.numel() != self._ends(n, k)[-1]:
            raise self._wrong()
        values, counts, end = self._ends(n, k)
        kept = torch.empty(k, dtype=torch.float32, device=out.device)
        self._values.unpack(body[8 : 8 + self._values.body_bytes(k)], 0, kept)
        if self._bitmap(n):
            places = _unpacked_bits(body[counts:end]).nonzero().view(-1)
        else:
            by_chunk = body[values:counts].view(torch.int32).to(torch.int64)
            if int(by_chunk.min()) < 0 or int(by_chunk.sum()) != k:
                raise self._wrong()
            chunks = torch.arange(by_chunk.numel(), device=out.device).mul_(_CHUNK)
            places = (body[counts:end].view(torch.int16).to(torch.int64) & 0xFFFF) + chunks.repeat_interleave(by_chunk)
        if places.numel() != k or (k and int(places.max()) >= n):
            raise self._wrong()
        out.zero_()
        out[places] = kept

    def _wrong(self) -> ProtocolError:
        return ProtocolError(f"a payload in codec {self.name!r} does not decode: its elements are not there.")

    def _largest(self, x: torch.Tensor, feedback: Feedback | None) -> tuple[torch.Tensor, torch.Tensor]:
        """What is to be sent in the end, and (at most k,) places in it, in order."""
        loops, n, k = loops_for(x), x.numel(), self.num_kept(x.numel())
        if loops is None:
            y = x if feedback is None else feedback.to(x)
            return y, y.abs().topk(k, sorted=False).indices.sort().values
        values, fed = array(x), arrays(feedback)
        residual, following, weight = fed
        stride = max(prime for prime in _STRIDES if prime <= max(1, k // _LEAST_HITS))
        sample = values[::stride] if feedback is None else values[::stride] + np.float32(weight) * residual[::stride]
        sample = np.abs(sample)
        hits = min(sample.size, math.ceil(_SPARE * k / stride) if stride > 1 else k)
        threshold = max(np.partition(sample, sample.size - hits)[sample.size - hits], _LEAST)
        room = np.empty(2 * k + 64, np.int32)
        found = room[: loops.above(values, threshold, room, *fed)]
        if feedback is not None:
            values = following
        if found.size == room.size - 1 or (found.size < k and threshold > _LEAST):
            found = np.arange(n, dtype=np.int32)  # The sample was no measure of the whole, or many are equal.
        if found.size > k:
            strength = np.abs(values[found])
            found = np.sort(found[np.argpartition(strength, found.size - k)[found.size - k :]])
        return torch.from_numpy(values), torch.from_numpy(found.astype(np.int64))


def _up(number: int, grain: int) -> int:
    return -(-number // grain) * grain


def _packed_bits(mask: torch.Tensor) -> torch.Tensor:
    if mask.device.type == "cpu":
        return torch.from_numpy(np.packbits(mask.numpy(), bitorder="little"))
    places = torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (mask.view(-1, 8).to(torch.uint8) << places).sum(1, dtype=torch.uint8)


def _unpacked_bits(bits: torch.Tensor) -> torch.Tensor:
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (bits.view(-1, 1) >> places & 1).view(-1)
