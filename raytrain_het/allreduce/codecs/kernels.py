"""The codecs' inner loops for the CPU, compiled by numba: without a compiler of the system's, and kept on disk.

They release the interpreter's lock, so a backward pass can run beside them. Arrays are contiguous. With a
``residual``, ``y = x + weight * residual`` is encoded, and the next residual is written to ``error``; if ``residual``
has no elements, ``y = x``. A block's parts are done one after the other, while it is in the nearest cache.

Random numbers are a hash of key and place (the finaliser of Mueller, as in public integer hash collections), so that
the same key gives the same bytes, and nothing has to be drawn before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import float32, int8, int32, int64, njit, uint8, uint16, uint32

TINY = np.float32(2.0**-119)
"""Below that a block counts as zeros: its scale would be a denormal number."""
Array = np.ndarray[Any, Any]

_SAFE_MATH = {"nnan", "ninf", "nsz", "arcp", "contract", "reassoc"}


def _compiled(signature: str | list[str], *, exact: bool = False) -> Callable[[Callable[..., Any]], Any]:
    """``exact``: each operation is rounded by itself, in the order that is written, on every CPU."""

    def compile_it(function: Callable[..., Any]) -> Any:
        options: dict[str, Any] = {"nogil": True, "fastmath": not exact and _SAFE_MATH, "error_model": "numpy"}
        try:
            return njit(signature, cache=True, **options)(function)
        except Exception:  # It can be kept nowhere, or what was kept is damaged.
            return njit(signature, **options)(function)

    return compile_it


@_compiled("void(float32[::1],int32,uint32,int32,int8[::1],float32[::1],float32[::1],float32[::1],float32)")
def round_blocks(
    x: Array, levels: int, key: int, block: int, q: Array, scales: Array, residual: Array, error: Array, weight: float
) -> None:
    """Each block of ``y`` to whole numbers from ``-levels`` to ``levels``, rounded up or down by chance."""
    fed, word, inverse_weight = residual.size > 0, np.empty(1, np.int32), float32(1) / weight
    value, source = word.view(np.float32), error if fed else x
    bits, limit, above_zero = source.view(np.int32), float32(levels) + float32(0.5), float32(levels + 1)
    for b in range((x.size + block - 1) // block):
        low = b * block
        m = min(block, x.size - low)
        own, own_bits, own_q = source[low : low + m], bits[low : low + m], q[low : low + m]
        if fed:
            own_x, own_residual = x[low : low + m], residual[low : low + m]
            for i in range(m):
                own[i] = own_x[i] + weight * own_residual[i]
        top = uint32(0)
        for i in range(m):  # Of the bits, which goes by the vector; they are in the order of the absolute values.
            absolute = uint32(uint32(own_bits[i]) & uint32(0x7FFFFFFF))
            top = absolute if absolute > top else top
        word[0] = int32(top)
        largest = value[0]
        if largest > TINY:
            inverse, scale = float32(levels) / largest, largest / float32(levels)
        else:
            inverse, scale = float32(0), float32(0)
        scales[b] = scale
        first = uint32(low)
        for i in range(m):
            h = uint32(uint32(uint32(first + uint32(i)) * uint32(0x9E3779B1)) + key)
            h = uint32(uint32(h ^ uint32(h >> uint32(16))) * uint32(0x45D9F3B))
            h = uint32(h ^ uint32(h >> uint32(13)))
            chance = float32(int32(h >> uint32(8))) * float32(2.0**-24)
            number: Any = own[i] * inverse + chance
            number = number if number < limit else limit
            own_q[i] = int8(int32(int32(number + above_zero) - levels - 1))  # Down, as that is cut off.
        if fed:
            for i in range(m):
                own[i] = (own[i] - float32(own_q[i]) * scale) * inverse_weight


@_compiled("void(int8[::1],int32,float32[::1],float32[::1])")
def scale_blocks(q: Array, block: int, scales: Array, out: Array) -> None:
    """The inverse."""
    for b in range((out.size + block - 1) // block):
        low = b * block
        m = min(block, out.size - low)
        own, own_q, scale = out[low : low + m], q[low : low + m], scales[b]
        for i in range(m):
            own[i] = float32(own_q[i]) * scale


@_compiled("void(int8[::1],int32,uint8[::1])")
def pack_nibbles(q: Array, half: int, packed: Array) -> None:
    """Two numbers from -8 to 7 to a byte: element ``i`` of a block with element ``i + half``, missing ones as 0."""
    for b in range(packed.size // half):
        low = 2 * half * b
        own = packed[b * half : (b + 1) * half]
        m = min(half, max(q.size - low, 0))
        first = q[low : low + m]
        for i in range(m):
            own[i] = uint8(first[i] + 8)
        for i in range(m, half):
            own[i] = uint8(8)
        m = min(half, max(q.size - low - half, 0))
        second = q[low + half : low + half + m]
        for i in range(m):
            own[i] |= uint8(uint8(second[i] + 8) << uint8(4))
        for i in range(m, half):
            own[i] |= uint8(128)


@_compiled("void(uint8[::1],int32,float32[::1],float32[::1])")
def scale_nibbles(packed: Array, half: int, scales: Array, out: Array) -> None:
    """Decode blocks of ``2 * half`` elements."""
    for b in range(packed.size // half):
        low, scale = 2 * half * b, scales[b]
        own = packed[b * half : (b + 1) * half]
        m = min(half, max(out.size - low, 0))
        first = out[low : low + m]
        for i in range(m):
            first[i] = float32(int32(own[i] & uint8(15)) - int32(8)) * scale
        m = min(half, max(out.size - low - half, 0))
        second = out[low + half : low + half + m]
        for i in range(m):
            second[i] = float32(int32(own[i] >> uint8(4)) - int32(8)) * scale


@_compiled("void(float32[::1],int32,uint8[::1],float32[::1],float32[::1],float32[::1],float32)")
def pack_signs(
    x: Array, block: int, packed: Array, scales: Array, residual: Array, error: Array, weight: float
) -> None:
    """One bit an element (bit ``k`` of byte ``i``: element ``i + k block / 8``), and by block the mean ``|y|``."""
    fed, eighth, inverse_weight = residual.size > 0, block // 8, float32(1) / weight
    source = error if fed else x
    for b in range(scales.size):
        low = b * block
        m = min(block, x.size - low)
        own, own_packed = source[low : low + m], packed[b * eighth : (b + 1) * eighth]
        if fed:
            own_x, own_residual = x[low : low + m], residual[low : low + m]
            for i in range(m):
                own[i] = own_x[i] + weight * own_residual[i]
        scale, part_of_mean = float32(0), float32(1) / float32(m)
        for i in range(m):
            scale += abs(own[i]) * part_of_mean  # The sum itself might overflow.
        scales[b] = scale
        for i in range(eighth):
            own_packed[i] = uint8(0)
        for k in range(8):
            part = own[min(k * eighth, m) : min((k + 1) * eighth, m)]
            for i in range(part.size):
                own_packed[i] |= uint8(uint8(part[i] >= 0) << uint8(k))
        if fed:
            for i in range(m):
                own[i] = (own[i] - (scale if own[i] >= 0 else -scale)) * inverse_weight


@_compiled("void(uint8[::1],int32,float32[::1],float32[::1])")
def unpack_signs(packed: Array, block: int, scales: Array, out: Array) -> None:
    """The inverse."""
    eighth = block // 8
    for b in range(scales.size):
        low, scale = b * block, scales[b]
        m = min(block, out.size - low)
        own, own_packed = out[low : low + m], packed[b * eighth : (b + 1) * eighth]
        for k in range(8):
            part = own[min(k * eighth, m) : min((k + 1) * eighth, m)]
            for i in range(part.size):
                part[i] = scale if own_packed[i] >> uint8(k) & uint8(1) else -scale


@_compiled("int64(float32[::1],float32,int32[::1],float32[::1],float32[::1],float32[::1],float32)")
def above(x: Array, threshold: float, places: Array, kept: Array, residual: Array, left: Array, weight: float) -> int:
    """Where ``|y| >= threshold``, in order, and these values, as many as there is room for; returns how many. ``left``
    becomes ``y / weight``: as if nothing were sent."""
    fed, found, room, inverse_weight = residual.size > 0, 0, places.size - 1, float32(1) / weight
    word, y, hits = np.empty(1, np.float32), np.zeros(64, np.float32), np.empty(64, np.uint8)
    word[0] = threshold
    least, bits, groups = word.view(np.uint32)[0], y.view(np.uint32), hits.view(np.uint64)
    for low in range(0, x.size, 64):
        m = min(64, x.size - low)
        own = x[low : low + m]
        if m < 64:
            y[:] = 0
        if not fed:
            y[:m] = own
        elif m == 64:  # Said apart, so that it goes by the vector and without a rest.
            own_residual, own_left = residual[low : low + 64], left[low : low + 64]
            for i in range(64):
                value = own[i] + weight * own_residual[i]
                y[i] = value
                own_left[i] = value * inverse_weight
        else:
            for i in range(m):
                y[i] = own[i] + weight * residual[low + i]
                left[low + i] = y[i] * inverse_weight
        top = uint32(0)
        for i in range(64):
            absolute = uint32(bits[i] & uint32(0x7FFFFFFF))
            top = absolute if absolute > top else top
        if top < least:  # Most have none, with few elements to keep.
            continue
        for i in range(64):
            hits[i] = uint32(bits[i] & uint32(0x7FFFFFFF)) >= least
        for g in range(8):
            if groups[g] != 0:
                for i in range(8 * g, 8 * g + 8):
                    places[found] = low + i
                    kept[found] = y[i]
                    found = min(found + hits[i], room)
    return found


@_compiled("void(int32[::1],int32,int32[::1],uint16[::1])")
def write_places(places: Array, chunk: int, counts: Array, low_halves: Array) -> None:
    """How many there are in each chunk, and each place in its chunk."""
    for c in range(counts.size):
        counts[c] = 0
    for i in range(places.size):
        counts[places[i] // chunk] += 1
        low_halves[i] = uint16(places[i] % chunk)


@_compiled("int64(int32[::1],int32,uint16[::1],int64,int32[::1])")
def read_places(counts: Array, chunk: int, low_halves: Array, num_elements: int, places: Array) -> int:
    """The inverse; returns how many places are good: they grow, and are below the number of elements."""
    found, last = 0, -1
    for c in range(counts.size):
        for _ in range(counts[c]):
            if found == places.size:
                return -1
            place = c * chunk + int64(low_halves[found])
            if place <= last or place >= num_elements:
                return -1
            places[found] = last = place
            found += 1
    return found


@_compiled("void(int32[::1],uint8[::1])")
def write_bits(places: Array, packed: Array) -> None:
    """Bit ``i % 8`` of byte ``i // 8`` for place ``i``."""
    packed[:] = 0
    for i in range(places.size):
        packed[places[i] >> 3] |= uint8(1 << (places[i] & 7))


@_compiled("int64(uint8[::1],int64,int32[::1])")
def read_bits(packed: Array, num_elements: int, places: Array) -> int:
    """The inverse; returns how many places there are, -1 if not as many as there is room for."""
    found, room = 0, places.size
    for b in range(packed.size):
        byte = packed[b]
        if byte != 0:
            for k in range(8):
                if byte >> uint8(k) & uint8(1):
                    if found == room or 8 * b + k >= num_elements:
                        return -1
                    places[found] = 8 * b + k
                    found += 1
    return found


@_compiled("void(int32[::1],float32[::1],float32[::1],boolean)")
def put(places: Array, values: Array, out: Array, add: bool) -> None:
    """``out[places] = values``, or ``+=``."""
    if add:
        for i in range(places.size):
            out[places[i]] += values[i]
    else:
        for i in range(places.size):
            out[places[i]] = values[i]


@_compiled("int64(int64[::1])")
def weighted_sum(words: Array) -> Any:
    """``sum (2 i + 1) word_i``, modulo 2^64."""
    total = int64(0)
    for i in range(words.size):
        total += words[i] * int64(2 * i + 1)
    return total


@_compiled(["void(float32[:,::1],float64[:,::1],float64)", "void(float64[:,::1],float64[:,::1],float64)"], exact=True)
def orthonormalise(rows: Array, wide: Array, least: float) -> None:
    """Gram and Schmidt, twice over, in fp64 (``wide``, of the same shape). A row of which less than the part ``least``
    is left becomes zeros."""
    for k in range(rows.shape[0]):
        row, before = wide[k], 0.0
        for i in range(row.size):
            row[i] = rows[k, i]
            before += row[i] * row[i]
        for _ in range(2):
            for j in range(k):
                dot = 0.0
                for i in range(row.size):
                    dot += row[i] * wide[j, i]
                for i in range(row.size):
                    row[i] -= dot * wide[j, i]
        after = 0.0
        for i in range(row.size):
            after += row[i] * row[i]
        factor = 1.0 / np.sqrt(after) if after > least * least * before else 0.0
        for i in range(row.size):
            row[i] = row[i] * factor if factor > 0 else 0.0
            rows[k, i] = row[i]


@_compiled(
    ["void(float32[:,::1],float32[:,::1],float32[:,::1])", "void(float64[:,::1],float64[:,::1],float64[:,::1])"],
    exact=True,
)
def multiply(p: Array, q: Array, out: Array) -> None:
    """``out = p^T q``, one row of the factors after the other."""
    for i in range(out.shape[0]):
        own = out[i]
        for k in range(p.shape[0]):
            factor, row = p[k, i], q[k]
            if k == 0:
                for j in range(own.size):
                    own[j] = factor * row[j]
            else:
                for j in range(own.size):
                    own[j] += factor * row[j]


@_compiled(
    [
        "void(float32[:,::1],float32[:,::1],float32,float32[:,::1])",
        "void(float64[:,::1],float64[:,::1],float64,float64[:,::1])",
    ]
)
def subtract_product(p: Array, q: Array, factor: float, y: Array) -> None:
    """``y = factor (y - p^T q)``."""
    for i in range(y.shape[0]):
        own = y[i]
        for k in range(p.shape[0]):
            part, row = p[k, i], q[k]
            for j in range(own.size):
                own[j] -= part * row[j]
        for j in range(own.size):
            own[j] *= factor
