"""How fast codecs are, on one CPU thread and, where there is one, on a GPU.

For each codec, of ``--elements`` values in fp32: encoding as a worker does it (with error feedback, where the codec
has it), decoding, and the bytes of the payload. Speeds are in GB/s of the fp32 values, so that they compare with each
other and with a plain copy of those values, measured between them; the median of ``--repeats``, taken in turns.
``lowrank`` is measured on a square matrix of so many values, all of its steps but the messages: what all members do for
the mean counts as decoding.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from experiments.benchmarks import common
from raytrain_het.allreduce.codecs import Stamp, codec_of
from raytrain_het.allreduce.codecs.lowrank import LowRank
from raytrain_het.allreduce.layout import Layout
from raytrain_het.allreduce.reducers.low_rank import MatrixFactors
from raytrain_het.codec_options import CODECS

WORDS = [
    *CODECS,
    "int8(error_feedback=true)",
    "int4(error_feedback=true)",
    "topk(density=0.001)",
    "topk(density=0.1)",
    "lowrank(rank=16)",
]


def pieces(word: str, x: torch.Tensor) -> tuple[Callable[[], None], Callable[[], None], int]:
    """Encoding, decoding, and the payload's bytes."""
    codec = codec_of(word)
    if isinstance(codec, LowRank):
        return pieces_of_factors(codec, x)
    payload = torch.empty(codec.capacity_bytes(x.numel(), x.dtype), dtype=torch.uint8, device=x.device)
    states = [codec.init(x.numel(), x.dtype, x.device) for _ in range(2)]
    out, stamp = torch.empty_like(x), Stamp(3, 4, 64.0)

    def encode() -> None:
        codec.encode(x, payload, stamp, *states)
        states.reverse()

    encode()
    return encode, lambda: codec.decode(payload, out), payload.numel()


def pieces_of_factors(codec: LowRank, x: torch.Tensor) -> tuple[Callable[[], None], Callable[[], None], int]:
    """The same of a square matrix and its factors, as if this worker's were the mean."""
    side = math.isqrt(x.numel())
    x = x[: side * side]
    (bucket,) = Layout([("w", x.view(side, side))], [], 1 << 40).buckets
    factors = MatrixFactors(bucket, codec, second=1, seed=0, device=x.device)
    residual, y, out = torch.zeros_like(x), torch.empty_like(x), torch.empty_like(x)

    def encode() -> None:
        torch.add(x, residual, alpha=64.0, out=y)
        factors.p.copy_(factors.project(y))
        factors.orthonormalise()
        factors.q.copy_(factors.project_back(y))
        factors.subtract_sent(y, 64.0)

    encode()
    return encode, lambda: factors.multiply(out), 4 * codec.num_travelling((side, side))


def measure(device: str, elements: int, repeats: int) -> list[dict[str, Any]]:
    """A row for each codec, and one for a copy."""
    x = torch.randn(elements, device=device)
    room = torch.empty_like(x)
    actions: dict[tuple[str, str], Callable[[], object]] = {("copy", "encode"): lambda: room.copy_(x)}
    sizes = {"copy": 4 * elements}
    for word in WORDS:
        actions[word, "encode"], actions[word, "decode"], sizes[word] = pieces(word, x)
    took: dict[tuple[str, str], list[float]] = {key: [] for key in actions}
    for _ in range(repeats):
        for key, action in actions.items():
            action()  # What ran before has other memory in the caches.
            if device != "cpu":
                torch.cuda.synchronize()
            began = time.perf_counter()
            action()
            if device != "cpu":
                torch.cuda.synchronize()
            took[key].append(time.perf_counter() - began)
    speed = {key: 4 * elements / statistics.median(times) / 1e9 for key, times in took.items()}
    return [
        {
            "codec": word,
            "device": device,
            "encode_gb_s": speed[word, "encode"],
            "decode_gb_s": speed.get((word, "decode"), float("nan")),
            "bytes": size,
            "factor": 4 * elements / size,
        }
        for word, size in sizes.items()
    ]


def main() -> None:
    def add(parser: Any) -> None:
        parser.add_argument("--elements", type=int, default=1 << 20)
        parser.add_argument("--repeats", type=int, default=21)

    args = common.arguments(__doc__, add)
    torch.set_num_threads(1)
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    rows = [row for device in devices for row in measure(device, args.elements, args.repeats)]
    common.show(f"Codecs, {args.elements} elements, GB/s of fp32; one CPU thread", rows)
    common.keep(args.json, {"benchmark": "codecs", "elements": args.elements, "rows": rows})


if __name__ == "__main__":
    main()
