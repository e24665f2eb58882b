"""The two dense codecs: ``none`` (the values as they are) and ``bf16`` (rounded to bfloat16)."""

from __future__ import annotations

from typing import ClassVar

import torch

from raytrain_het.allreduce.codecs.base import Codec, Stamp, State


class _Cast(Codec):
    wire_dtype: ClassVar[torch.dtype | None]

    def _dtype(self, dtype: torch.dtype) -> torch.dtype:
        return self.wire_dtype or dtype

    def capacity_bytes(self, num_elements: int, dtype: torch.dtype) -> int:
        return num_elements * self._dtype(dtype).itemsize

    def in_place(self, payload: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
        return payload.view(dtype) if self._dtype(dtype) == dtype else None

    def encode(self, x: torch.Tensor, payload: torch.Tensor, stamp: Stamp, state: State, new_state: State) -> None:
        payload.view(self._dtype(x.dtype)).copy_(x)

    def decode(self, payload: torch.Tensor, out: torch.Tensor) -> None:
        out.copy_(payload.view(self._dtype(out.dtype)))


class NoCodec(_Cast):
    """Values travel as they are summed: fp32, or fp64 where the parameter is fp64."""

    name = "none"
    wire_dtype = None


class Bf16(_Cast):
    """Round to nearest bfloat16: half the bytes of fp32, 8 bits of mantissa."""

    name = "bf16"
    wire_dtype = torch.bfloat16
