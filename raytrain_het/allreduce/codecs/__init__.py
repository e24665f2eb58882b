"""Codecs. A new one is one file, one line in the table, and its name and options in `raytrain_het.codec_options`."""

from __future__ import annotations

from collections.abc import Callable

from raytrain_het.allreduce.codecs.base import RESIDUAL, Codec, Stamp, State, mix
from raytrain_het.allreduce.codecs.blockwise import Int4, Int8
from raytrain_het.allreduce.codecs.calibration import byte_cpu_s, codec_costs, relative_error
from raytrain_het.allreduce.codecs.dense import Bf16, NoCodec
from raytrain_het.allreduce.codecs.fp16 import Fp16
from raytrain_het.allreduce.codecs.lowrank import LowRank
from raytrain_het.allreduce.codecs.randomk import RandomK
from raytrain_het.allreduce.codecs.sign import Sign
from raytrain_het.allreduce.codecs.topk import TopK
from raytrain_het.codec_options import parsed

KINDS: dict[str, Callable[..., Codec]] = {
    kind.name: kind for kind in (NoCodec, Bf16, Fp16, Int8, Int4, Sign, TopK, RandomK, LowRank)
}


class _Codecs(dict[str, Codec]):
    """By what a record says of a codec, such as ``int8`` or ``topk(density=0.01)``: made when first asked for."""

    def __missing__(self, text: str) -> Codec:
        name, options = parsed(text)
        codec = self[text] = KINDS[name](**options)
        return codec


CODECS = _Codecs()

__all__ = [
    "CODECS",
    "KINDS",
    "RESIDUAL",
    "Codec",
    "LowRank",
    "Stamp",
    "State",
    "byte_cpu_s",
    "codec_costs",
    "mix",
    "relative_error",
]
