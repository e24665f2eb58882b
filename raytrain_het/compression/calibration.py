"""What codecs cost on this machine, and how much they lose of normally distributed values."""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch

from raytrain_het.allocation.codec_choice import CodecCost
from raytrain_het.compression.base import Codec, Stamp

NUM_ELEMENTS = 1 << 17
REPEATS = 3


def codec_costs(codecs: Iterable[tuple[str, Codec]], *, cores: float) -> dict[str, CodecCost]:
    """By name, on one thread of the CPU, where messages are made: the least of a few runs, in some ten milliseconds.

    Seconds are CPU time over the cores that there are, at most one: while a run starts, all else on the machine is
    busy too, and says nothing of later.
    """
    x = torch.randn(NUM_ELEMENTS, generator=torch.Generator().manual_seed(0))
    return {name: _cost(codec, x, 1 / min(1.0, cores)) for name, codec in codecs}


def _cost(codec: Codec, x: torch.Tensor, slower: float) -> CodecCost:
    codec.prepare()
    size = codec.capacity_bytes(x.numel(), x.dtype)
    payload, out = torch.empty(size, dtype=torch.uint8), torch.empty_like(x)
    if codec.in_place(payload, x.dtype) is not None:
        return CodecCost(size / x.numel(), 0.0, 0.0, 0.0)
    first = codec.init(x.numel(), x.dtype, x.device)
    following = codec.init(x.numel(), x.dtype, x.device)
    encode_s, decode_s = float("inf"), float("inf")
    for _ in range(REPEATS):
        began = time.thread_time()
        codec.encode(x, payload, Stamp(1, 1), first, following)
        between = time.thread_time()
        codec.decode(payload, out)
        encode_s, decode_s = min(encode_s, between - began), min(decode_s, time.thread_time() - between)
    by_element = slower / x.numel()
    return CodecCost(size / x.numel(), by_element * encode_s, by_element * decode_s, relative_error(x, out))


def relative_error(x: torch.Tensor, decoded: torch.Tensor) -> float:
    """``|x - decoded| / |x|``; 0 where there is nothing to lose."""
    norm = float(torch.linalg.vector_norm(x))
    return float(torch.linalg.vector_norm(x - decoded)) / norm if norm > 0 else 0.0
