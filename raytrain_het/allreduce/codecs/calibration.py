"""What codecs cost on this machine, and how much they lose, as far as that is known before there are gradients."""

from __future__ import annotations

import contextlib
import math
import socket
import time
from collections.abc import Iterable, Sequence

import torch

from raytrain_het.allreduce.codecs.base import Codec, Stamp
from raytrain_het.allreduce.codecs.lowrank import LowRank, leave, multiply, orthonormalise
from raytrain_het.balance.codec_choice import CodecCost

NUM_ELEMENTS = 1 << 17
REPEATS = 3


def codec_costs(
    codecs: Iterable[tuple[str, Codec]], *, cores: float, shapes: Sequence[Sequence[int]]
) -> dict[str, CodecCost]:
    """By name, on one thread of the CPU, where messages are made: the least of a few runs, in some ten milliseconds.

    Errors are those of normally distributed values, and of low rank see :func:`expected_error`. Seconds are CPU time
    over the cores that there are, at most one: while a run starts, all else on the machine is busy too, and says
    nothing of later.

    Args:
        codecs: names and codecs.
        cores: of this worker.
        shapes: of all tensors that are compressed.
    """
    x = torch.randn(NUM_ELEMENTS, generator=torch.Generator().manual_seed(0))
    slower = 1 / min(1.0, cores)
    return {
        name: _cost_of_factors(codec, shapes, slower) if isinstance(codec, LowRank) else _cost(codec, x, slower)
        for name, codec in codecs
    }


def _cost(codec: Codec, x: torch.Tensor, slower: float) -> CodecCost:
    codec.prepare()
    size = codec.capacity_bytes(x.numel(), x.dtype)
    payload, out = torch.empty(size, dtype=torch.uint8), torch.empty_like(x)
    first = codec.init(x.numel(), x.dtype, x.device)
    following = codec.init(x.numel(), x.dtype, x.device)
    encode_s, decode_s, scratch = float("inf"), float("inf"), torch.empty_like(x)
    for _ in range(REPEATS):
        out.zero_()
        began = time.thread_time()
        codec.encode(x, payload, Stamp(1, 1), first, following)
        between = time.thread_time()
        codec.add(payload, out, scratch)
        encode_s, decode_s = min(encode_s, between - began), min(decode_s, time.thread_time() - between)
    if codec.in_place(payload, x.dtype) is not None:
        encode_s = 0.0  # Gradients are gathered there.
    by_element = slower / x.numel()
    return CodecCost(size / x.numel(), by_element * encode_s, by_element * decode_s, relative_error(x, out))


def _cost_of_factors(codec: LowRank, shapes: Sequence[Sequence[int]], slower: float) -> CodecCost:
    """As for the largest matrix, or as many of its rows as are enough to measure."""
    num_bytes = 4 * sum(map(codec.num_travelling, shapes)) / max(1, sum(map(math.prod, shapes)))
    matrices = [matrix for shape in shapes if (matrix := codec.matrix(shape)) is not None]
    if not matrices:
        return CodecCost(num_bytes, 0.0, 0.0, 0.0)
    codec.prepare()
    rows, cols = max(matrices, key=math.prod)
    rows = min(rows, max(codec.rank, NUM_ELEMENTS // cols))
    x = torch.randn(rows, cols, generator=torch.Generator().manual_seed(0))
    y, out, first = torch.empty_like(x), torch.empty_like(x), torch.ones(codec.rank, cols)
    p, q, took_s = torch.empty(codec.rank, rows), torch.empty(codec.rank, cols), float("inf")
    for _ in range(REPEATS):
        began = time.thread_time()
        torch.add(x, x, alpha=0.5, out=y)
        torch.mm(first, y.t(), out=p)
        orthonormalise(p)
        torch.mm(p, y, out=q)
        leave(p, q, 1.0, y)
        multiply(p, q, out)
        took_s, first = min(took_s, time.thread_time() - began), q.clone()
    return CodecCost(num_bytes, slower * took_s / x.numel(), 0.0, expected_error(codec, shapes))


def expected_error(codec: LowRank, shapes: Sequence[Sequence[int]]) -> float:
    """``sqrt(1 - H_r / H_m)`` by matrix, with ``m`` its smaller side and ``H_k = 1 + 1/2 + ... + 1/k``: what the best
    rank leaves out where singular values fall as ``k^-1/2``, as those of real gradients do, about (0.75 and 0.82 of
    64 x 64 at ranks 4 and 2, measured in training 0.77 and 0.84). All matrices count by their size."""
    lost, total = 0.0, 0
    for shape in shapes:
        total += math.prod(shape)
        matrix = codec.matrix(shape)
        if matrix is not None:
            lost += math.prod(shape) * (1 - _harmonic(codec.rank) / _harmonic(min(matrix)))
    return math.sqrt(lost / max(1, total))


def _harmonic(k: int) -> float:
    return sum(1 / i for i in range(1, k + 1))


def byte_cpu_s(*, cores: float) -> float:
    """What the system takes of the CPU to send a byte by TCP and receive it, both: half of it is each one's."""
    block = torch.zeros(_BLOCK_BYTES, dtype=torch.uint8).numpy().data
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as out:
        into, _ = server.accept()
        with into:
            out.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            took_s = [_sent_s(out, into, block) for _ in range(_NUM_BLOCKS)]
    return min(took_s) / _BLOCK_BYTES / min(1.0, cores)


_BLOCK_BYTES, _NUM_BLOCKS = 1 << 24, 2
"""More than caches hold, as gradients are."""


def _sent_s(out: socket.socket, into: socket.socket, block: memoryview) -> float:
    out.setblocking(False)
    room, began, sent, received = memoryview(bytearray(len(block))), time.thread_time(), 0, 0
    while received < len(block):
        with contextlib.suppress(BlockingIOError):
            sent += out.send(block[sent:]) if sent < len(block) else 0
        received += into.recv_into(room[received:])
    return time.thread_time() - began


def relative_error(x: torch.Tensor, decoded: torch.Tensor) -> float:
    """``|x - decoded| / |x|``; 0 where there is nothing to lose."""
    norm = float(torch.linalg.vector_norm(x))
    return float(torch.linalg.vector_norm(x - decoded)) / norm if norm > 0 else 0.0
