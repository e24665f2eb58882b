"""Codecs. A new one is one file, one line in the table, and its name among those that `HetConfig.codec` allows."""

from __future__ import annotations

from raytrain_het.compression.base import Codec, State
from raytrain_het.compression.dense import Bf16, NoCodec

CODECS: dict[str, Codec] = {codec.name: codec for codec in (NoCodec(), Bf16())}

__all__ = ["CODECS", "Bf16", "Codec", "NoCodec", "State"]
