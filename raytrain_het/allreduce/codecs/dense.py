"""The two dense codecs: ``none`` (the values as they are) and ``bf16`` (rounded to bfloat16)."""

from __future__ import annotations

from typing import ClassVar

import torch

from raytrain_het.allreduce.codecs.base import Codec, Stamp, State


class _Cast(Codec):
    """A codec that sends each value in one dtype."""

    wire_dtype: ClassVar[torch.dtype | None]
    """None: the dtype in which values are summed."""

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
    """``decoded = y``: values travel as they are summed.

    Payload: ``n`` fp32, or fp64 where the parameter is fp64. Bias: none. Error feedback: none.
    """

    name = "none"
    wire_dtype = None


class Bf16(_Cast):
    """``decoded = y`` rounded to the nearest bfloat16, with 8 bits of mantissa.

    Payload: ``n`` bf16. Half the bytes of fp32.

    Bias: none beyond rounding to nearest. Error feedback: none.
    Source: A Study of BFLOAT16 for Deep Learning Training (Kalamkar et al. 2019, arXiv:1905.12322).
    """

    name = "bf16"
    wire_dtype = torch.bfloat16
