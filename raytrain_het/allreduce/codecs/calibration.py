"""What codecs cost on this machine, and how much they lose, as far as that is known before there are gradients."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterable, Sequence

import torch

from raytrain_het.allreduce.codecs.base import Codec, CodecTrial
from raytrain_het.balance.codec_choice import CodecCost

REPEATS = 3


def codec_costs(
    codecs: Iterable[tuple[str, Codec]], *, cores: float, shapes: Sequence[Sequence[int]]
) -> dict[str, CodecCost]:
    """Each codec's cost by name, on one thread of the CPU, where messages are made.

    The least of a few runs counts, which take some ten milliseconds. Seconds are CPU time divided by the cores that
    there are, at most one: while a run starts, everything else on the machine is busy too, and wall time would say
    nothing of later.

    Args:
        codecs: names and codecs.
        cores: of this worker.
        shapes: of all tensors that are compressed.
    """
    slower = 1 / min(1.0, cores)
    return {name: _cost(codec.trial(shapes), slower) for name, codec in codecs}


def _cost(trial: CodecTrial, slower: float) -> CodecCost:
    encode_s, decode_s = float("inf"), float("inf")
    for _ in range(REPEATS):
        encode_s = min(encode_s, _cpu_s(trial.encode))
        decode_s = min(decode_s, _cpu_s(trial.decode))
    by_element = slower / trial.num_elements
    return CodecCost(trial.num_bytes, by_element * encode_s, by_element * decode_s, trial.error())


def _cpu_s(work: Callable[[], None] | None) -> float:
    if work is None:
        return 0.0
    began = time.thread_time()
    work()
    return time.thread_time() - began


def byte_cpu_s(*, cores: float) -> float:
    """CPU time that the system takes to send one byte by TCP and to receive it, together: half of it is each one's."""
    block = torch.zeros(_BLOCK_BYTES, dtype=torch.uint8).numpy().data
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as out:
        into, _ = server.accept()
        with into:
            out.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            took_s = [_transfer_cpu_s(out, into, block) for _ in range(_NUM_BLOCKS)]
    return min(took_s) / _BLOCK_BYTES / min(1.0, cores)


_BLOCK_BYTES, _NUM_BLOCKS = 1 << 24, 2
"""A block is more than caches hold, as gradients are."""


def _transfer_cpu_s(out: socket.socket, into: socket.socket, block: memoryview) -> float:
    out.setblocking(False)
    room, began, sent, received = memoryview(bytearray(len(block))), time.thread_time(), 0, 0
    while received < len(block):
        with contextlib.suppress(BlockingIOError):
            sent += out.send(block[sent:]) if sent < len(block) else 0
        received += into.recv_into(room[received:])
    return time.thread_time() - began
