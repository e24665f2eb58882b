"""One bit an element: ``sign``."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from raytrain_het.allreduce.codecs.base import Stamp
from raytrain_het.allreduce.codecs.blockwise import BlockCodec
from raytrain_het.allreduce.codecs.compiled import array, arrays, loops_for
from raytrain_het.allreduce.codecs.packed import Feedback


class Sign(BlockCodec):
    """``decoded = s sign(y)``: by block of 512 the mean absolute value ``s``, by element its sign (that of 0 is +).

    Body: ``ceil(n / 512)`` scales in fp32, and 64 bytes a block: bit ``k`` of byte ``j`` is set if element
    ``64 k + j`` is not negative. 30 times fewer bytes than fp32.

    Bias: of ``|y|^2`` it keeps ``|y|_1^2 / n``.
    Error feedback: always on.
    Sources: 1-Bit Stochastic Gradient Descent (Seide et al. 2014, Interspeech); Error Feedback Fixes SignSGD
    (Karimireddy et al. 2019, arXiv:1901.09847).
    """

    name = "sign"
    biased = True
    suits_adaptive_optimizers = False
    error_feedback = True
    block = 512

    def body_bytes(self, num_elements: int) -> int:
        return self._num_blocks(num_elements) * (4 + self.block // 8)

    def pack(self, x: torch.Tensor, body: torch.Tensor, stamp: Stamp, feedback: Feedback | None) -> int:
        scales, packed = self._cut(body, x.numel())
        loops = loops_for(x)
        if loops is not None:
            loops.pack_signs(array(x), self.block, array(packed), array(scales), *arrays(feedback))
        else:
            y = x if feedback is None else feedback.corrected(x)
            missing = -y.numel() % self.block
            rows = F.pad(y, (0, missing)).view(-1, self.block)
            counts = torch.full_like(scales, self.block)
            counts[-1] -= missing
            scales.copy_((rows.abs() / counts.unsqueeze(1)).sum(1))
            bits = (rows >= 0).view(-1, 8, self.block // 8).to(torch.uint8)
            places = torch.arange(8, dtype=torch.uint8, device=y.device).view(1, 8, 1)
            packed.view(-1, self.block // 8).copy_((bits << places).sum(1, dtype=torch.uint8))
            if feedback is not None:
                decoded = torch.where(rows >= 0, scales.unsqueeze(1), -scales.unsqueeze(1)).view(-1)
                feedback.keep(y, decoded[: y.numel()])
        return self.body_bytes(x.numel())

    def unpack(self, body: torch.Tensor, shared_key: int, out: torch.Tensor) -> None:
        scales, packed = self._cut(body, out.numel())
        loops = loops_for(out)
        if loops is not None:
            loops.unpack_signs(array(packed), self.block, array(scales), array(out))
        else:
            places = torch.arange(8, dtype=torch.uint8, device=out.device).view(1, 8, 1)
            bits = (packed.view(-1, 1, self.block // 8) >> places & 1).view(-1, self.block)
            out.copy_(torch.where(bits > 0, scales.unsqueeze(1), -scales.unsqueeze(1)).view(-1)[: out.numel()])
