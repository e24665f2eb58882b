"""Codecs: what a worker's gradients become on the wire. ``base.py`` has the interface.

A new codec is one file here and one line in :data:`raytrain_het.codec_options.CODECS`.
"""

from __future__ import annotations

import functools
import importlib

from raytrain_het.allreduce.codecs.base import RESIDUAL, Codec, Stamp, State, mix, relative_error
from raytrain_het.allreduce.codecs.calibration import byte_cpu_s, codec_costs
from raytrain_het.codec_options import CODECS, options_of, parsed

__all__ = [
    "RESIDUAL",
    "Codec",
    "Stamp",
    "State",
    "byte_cpu_s",
    "codec_costs",
    "codec_of",
    "mix",
    "relative_error",
]


@functools.cache
def codec_of(word: str) -> Codec:
    """The codec that a record names, such as ``int8`` or ``topk(density=0.002)``: the same object each time."""
    module, _, name = CODECS[parsed(word)[0]].implementation.partition(":")
    codec: Codec = getattr(importlib.import_module(module), name)(options_of(word))
    return codec
