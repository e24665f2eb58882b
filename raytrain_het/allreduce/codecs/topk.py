"""The largest elements: ``topk``."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import torch

from raytrain_het.allreduce.codecs.base import Stamp
from raytrain_het.allreduce.codecs.blockwise import Int8
from raytrain_het.allreduce.codecs.compiled import array, arrays, loops_for
from raytrain_het.allreduce.codecs.packed import Feedback, PackedCodec
from raytrain_het.allreduce.codecs.warmup import warm_densities
from raytrain_het.codec_options import BlockwiseOptions, TopKOptions
from raytrain_het.errors import ProtocolError

_CHUNK = 65536
"""Elements of a chunk: inside of it a place takes two bytes."""
_LEAST_HITS = 128
"""About so many sampled values lie above the threshold at least."""
_RUN = 16
"""Values of a run: reading one of them from memory costs as much as reading all."""
_SPARE = 1.4
"""The threshold is chosen so that about so many times ``k`` values lie above it: the best of them are kept."""
_STRIDES = (1, 2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73, 79, 83, 89, 97)
"""Every how many runs a sample takes one. Primes: another stride might fall in with the columns of a matrix."""
_LEAST = np.nextafter(np.float32(0), np.float32(1))
"""The least threshold: zeros are not kept, however few other elements there are."""


class TopK(PackedCodec):
    """``decoded_i = int8(y_i)`` for the ``k = ceil(density n)`` elements of largest absolute value, else 0.

    The elements are found by a threshold from a sample of every 97th element or more: of those above it the ``k`` best
    are kept, so they are nearly the largest. Their values are rounded as :class:`~.blockwise.Int8` does.

    Body: ``k`` (8 bytes), the int8 body of ``k`` values, and their places: ``ceil(n / 65536)`` counts by chunk (int32)
    and two bytes a place, or one bit an element of the shard where that is less (``density > 1/16``). At 1 % that is
    130 times fewer bytes than fp32.

    The owner of a shard keeps ``k`` elements of its mean, too: ``2 (N - 1)/N`` times a payload is sent, and the second
    half chooses again. With ``all_gather`` everything that any worker has chosen counts, for ``N - 1`` payloads.

    Bias: what is not among the largest becomes 0.
    Error feedback: always on. With momentum of a high factor, warm up.
    Sources: Sparse Communication for Distributed Gradient Descent (Aji, Heafield 2017, arXiv:1704.05021); Deep Gradient
    Compression (Lin et al. 2018, arXiv:1712.01887); Sparsified SGD with Memory (Stich et al. 2018, arXiv:1809.07599).

    Args:
        options: see :class:`raytrain_het.codec_options.TopKOptions`.
    """

    name = "topk"
    biased = True
    error_feedback = True
    length_varies = True

    def __init__(self, options: TopKOptions) -> None:
        super().__init__(options)
        self.density: float = options.density
        self.all_gather = options.all_gather
        self._warming = [
            TopK(dataclasses.replace(options, density=density, warmup_epochs=0))
            for density in warm_densities(options.density, options.warmup_epochs)
        ]
        self._values = Int8(BlockwiseOptions())

    def at_epoch(self, epoch: int) -> TopK:
        return self._warming[epoch] if epoch < len(self._warming) else self

    def num_kept(self, num_elements: int) -> int:
        """``k``, the most elements of so many that are sent."""
        return min(num_elements, math.ceil(self.density * num_elements))

    def _bitmap(self, num_elements: int) -> bool:
        """Whether places travel as one bit an element."""
        return 2 * self.num_kept(num_elements) > num_elements / 8

    def body_bytes(self, num_elements: int) -> int:
        return self._ends(num_elements, self.num_kept(num_elements))[-1]

    def _ends(self, num_elements: int, k: int) -> tuple[int, int, int]:
        """Where in the body the values, the counts by chunk, and the places end."""
        values = 8 + _up(self._values.body_bytes(k), 4)
        if self._bitmap(num_elements):
            return values, values, values + _up(num_elements, 8) // 8
        counts = values + 4 * (_up(num_elements, _CHUNK) // _CHUNK)
        return values, counts, counts + 2 * k

    def pack(self, x: torch.Tensor, body: torch.Tensor, stamp: Stamp, feedback: Feedback | None) -> int:
        loops, n = loops_for(x), x.numel()
        kept, places = self._largest(x, feedback) if loops is None else self._largest_compiled(loops, x, feedback)
        k = kept.numel()
        values, counts, end = self._ends(n, k)
        body[:8].view(torch.int64).fill_(k)
        left = Feedback(torch.zeros_like(kept), torch.empty_like(kept), 1.0)
        written = 8 + self._values.pack(kept, body[8:values], stamp, left)
        body[written:values].zero_()
        self._write_places(loops, places, n, body[values:counts].view(torch.int32), body[counts:end])
        if feedback is not None:
            left.following.div_(feedback.weight)
            if loops is not None:
                loops.put(array(places), array(left.following), array(feedback.following), False)
            else:
                feedback.following[places] = left.following
        return end

    def _write_places(
        self, loops: Any, places: torch.Tensor, n: int, counts: torch.Tensor, written: torch.Tensor
    ) -> None:
        if loops is not None and self._bitmap(n):
            loops.write_bits(array(places), array(written))
        elif loops is not None:
            loops.write_places(array(places), _CHUNK, array(counts), array(written).view(np.uint16))
        elif self._bitmap(n):
            mask = torch.zeros(_up(n, 8), dtype=torch.bool, device=places.device)
            mask[places] = True
            weights = 1 << torch.arange(8, dtype=torch.uint8, device=places.device)
            written.copy_((mask.view(-1, 8) * weights).sum(1, dtype=torch.uint8))
        else:
            counts.copy_(torch.bincount(places // _CHUNK, minlength=counts.numel()))
            written.view(torch.int16).copy_(places.to(torch.int32))  # The low two bytes.

    def unpack(self, body: torch.Tensor, shared_key: int, out: torch.Tensor) -> None:
        out.zero_()
        self._put(body, out, add=False)

    def unpack_and_add(self, body: torch.Tensor, shared_key: int, total: torch.Tensor, scratch: torch.Tensor) -> None:
        self._put(body, total, add=True)

    def _put(self, body: torch.Tensor, out: torch.Tensor, *, add: bool) -> None:
        n, loops = out.numel(), loops_for(out)
        k = int(body[:8].view(torch.int64)) if body.numel() >= 8 else -1
        if not 0 <= k <= self.num_kept(n) or body.numel() != self._ends(n, k)[-1]:
            raise self._wrong()
        values, counts, end = self._ends(n, k)
        kept = torch.empty(k, dtype=torch.float32, device=out.device)
        self._values.unpack(body[8 : 8 + self._values.body_bytes(k)], 0, kept)
        if loops is not None:
            places = np.empty(k, np.int32)
            if self._bitmap(n):
                found = loops.read_bits(array(body[counts:end]), n, places)
            else:
                by_chunk, low_halves = array(body[values:counts].view(torch.int32)), array(body[counts:end])
                found = loops.read_places(by_chunk, _CHUNK, low_halves.view(np.uint16), n, places)
            if found != k:
                raise self._wrong()
            loops.put(places, array(kept), array(out), add)
            return
        where = self._read_places(body[values:counts].view(torch.int32), body[counts:end], n, k)
        out[where] = out[where] + kept if add else kept

    def _read_places(self, by_chunk: torch.Tensor, written: torch.Tensor, n: int, k: int) -> torch.Tensor:
        if self._bitmap(n):
            bits = torch.arange(8, dtype=torch.uint8, device=written.device)
            places = (written.view(-1, 1) >> bits & 1).view(-1).nonzero().view(-1)
        else:
            if int(by_chunk.min()) < 0 or int(by_chunk.sum()) != k:
                raise self._wrong()
            chunks = torch.arange(by_chunk.numel(), device=written.device).mul_(_CHUNK)
            low_halves = written.view(torch.int16).to(torch.int64) & 0xFFFF
            places = low_halves + chunks.repeat_interleave(by_chunk.to(torch.int64))
        if places.numel() != k or (k and (int(places[-1]) >= n or not bool((places[1:] > places[:-1]).all()))):
            raise self._wrong()
        return places

    def _wrong(self) -> ProtocolError:
        return ProtocolError(f"a payload in codec {self.name!r} does not decode: its elements are not there.")

    def _largest(self, x: torch.Tensor, feedback: Feedback | None) -> tuple[torch.Tensor, torch.Tensor]:
        """The values that are sent (k,), and their places (k,) in order. The next residual is written as if nothing
        were sent."""
        y = x if feedback is None else feedback.corrected(x)
        places = y.abs().topk(self.num_kept(x.numel()), sorted=False).indices.sort().values
        kept = y[places]
        if feedback is not None:
            y.mul_(1 / feedback.weight)
        return kept, places

    def _largest_compiled(
        self, loops: Any, x: torch.Tensor, feedback: Feedback | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same in one pass, of at most ``k`` elements."""
        n, k, values, fed = x.numel(), self.num_kept(x.numel()), array(x), arrays(feedback)
        places, kept = np.empty(2 * k + 64, np.int32), np.empty(2 * k + 64, np.float32)
        threshold = self._sampled_threshold(values, k, feedback)
        found = loops.above(values, threshold, places, kept, *fed)
        if found == places.size - 1 or (found < k and threshold > _LEAST):
            # The sample was no measure of the whole, or many are equal.
            y = values if feedback is None else values + np.float32(feedback.weight) * fed[0]
            threshold = max(np.partition(np.abs(y), n - k)[n - k], _LEAST)
            places, kept = np.empty(n + 1, np.int32), np.empty(n + 1, np.float32)
            found = loops.above(values, threshold, places, kept, *fed)
        places, kept = places[:found], kept[:found]
        if found > k:
            strength = np.abs(kept)
            least = np.partition(strength, found - k)[found - k]
            best = strength > least
            best[np.flatnonzero(strength == least)[: k - int(best.sum())]] = True
            places, kept = places[best], kept[best]
        return torch.from_numpy(kept), torch.from_numpy(places)

    def _sampled_threshold(self, values: Any, k: int, feedback: Feedback | None) -> Any:
        """A value that about 1.4 times ``k`` absolute values reach, by a sample. It takes runs, since memory comes in
        lines of 16 values."""
        runs, rest = values.size // _RUN, values.size % _RUN
        stride = max(prime for prime in _STRIDES if prime <= max(1, k // _LEAST_HITS))
        stride = stride if runs > 4 * stride else 1
        whole = values.size - rest if stride > 1 else values.size
        cut = (slice(None, whole), (-1, _RUN), slice(None, None, stride)) if stride > 1 else None
        sample = _runs(values, cut)
        if feedback is not None:
            sample = sample + np.float32(feedback.weight) * _runs(array(feedback.residual), cut)
        sample = np.abs(sample).ravel()
        hits = min(sample.size, math.ceil(_SPARE * k * sample.size / values.size) if stride > 1 else k)
        return max(np.partition(sample, sample.size - hits)[sample.size - hits], _LEAST)


def _runs(values: Any, cut: Any) -> Any:
    if cut is None:
        return values
    whole, shape, stride = cut
    return values[whole].reshape(shape)[stride]


def _up(number: int, grain: int) -> int:
    return -(-number // grain) * grain
