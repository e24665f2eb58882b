"""Half precision with a scale: ``fp16``."""

from __future__ import annotations

import torch

from raytrain_het.allreduce.codecs.base import Stamp
from raytrain_het.allreduce.codecs.packed import Feedback, PackedCodec

_LARGEST = 32752.0
"""The largest half-precision number below 2^15: rounded up to that, fp32's largest numbers would overflow."""


class Fp16(PackedCodec):
    """``decoded = s h``: half precision, and a power of two ``s`` that puts the largest ``h`` between 2^14 and 2^15.

    So nothing overflows, whatever weights and loss scales gradients carry.

    Body: ``s`` in fp32, and ``n`` fp16. Half the bytes of fp32.

    Bias: none beyond rounding to nearest, with 11 bits of mantissa (bf16 has 8). What is below ``2^-29`` of a shard's
    largest value loses bits, and below ``2^-40`` it becomes 0.
    Error feedback: none.
    Source: Mixed Precision Training (Micikevicius et al. 2018, arXiv:1710.03740), with the scale chosen by message.
    """

    name = "fp16"
    error_feedback = False
    spares_small = False

    def body_bytes(self, num_elements: int) -> int:
        return 4 + 2 * num_elements

    def pack(self, x: torch.Tensor, body: torch.Tensor, stamp: Stamp, feedback: Feedback | None) -> int:
        scale, halves = self._cut(body, x.numel())
        low, high = x.aminmax()
        exponent = torch.frexp(torch.maximum(-low, high)).exponent.clamp_(min=-110)
        scale.copy_(torch.ldexp(torch.ones((), dtype=torch.float32, device=x.device), exponent - 15))
        halves.copy_((x / scale).clamp_(-_LARGEST, _LARGEST))
        return self.body_bytes(x.numel())

    def unpack(self, body: torch.Tensor, shared_key: int, out: torch.Tensor) -> None:
        scale, halves = self._cut(body, out.numel())
        out.copy_(halves).mul_(scale)

    def _cut(self, body: torch.Tensor, num_elements: int) -> tuple[torch.Tensor, torch.Tensor]:
        return body[:4].view(torch.float32), body[4 : self.body_bytes(num_elements)].view(torch.float16)
