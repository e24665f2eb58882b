"""What codecs that lose something have in common: a head that tells a damaged payload, and error feedback."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import ClassVar

import torch

from raytrain_het.allreduce.codecs.base import RESIDUAL, Codec, Stamp, State
from raytrain_het.allreduce.codecs.compiled import array, kernels, loops_for
from raytrain_het.errors import ProtocolError

_HEAD_BYTES = 16
"""The head: the body's true length and the shared key, 4 bytes each, and a checksum of 8 bytes."""


@dataclass(frozen=True)
class Feedback:
    """``y = x + weight * residual`` is encoded, and ``(y - decoded(y)) / weight`` is the next residual."""

    residual: torch.Tensor
    following: torch.Tensor
    weight: float

    def corrected(self, x: torch.Tensor) -> torch.Tensor:
        """``y``, in the memory of the next residual."""
        return torch.add(x, self.residual, alpha=self.weight, out=self.following)

    def keep(self, y: torch.Tensor, decoded: torch.Tensor) -> None:
        """Write the next residual."""
        torch.sub(y, decoded, out=self.following).div_(self.weight)


class PackedCodec(Codec):
    """A codec that loses something. It works in fp32, behind a head that tells a damaged payload.

    Payload: a head of 16 bytes (true length of the body, shared key, checksum), and the body, padded to 8 bytes.

    With *error feedback* it encodes ``y = x + W r``, with ``W`` the sum of weights and ``r`` the residual, and keeps
    ``r' = (y - decoded(y)) / W``, which is added to the next gradient. The residual is in units of the mean gradient,
    so it means the same under another global batch.

    Sources: 1-Bit Stochastic Gradient Descent (Seide et al. 2014, Interspeech); Error Feedback Fixes SignSGD
    (Karimireddy et al. 2019, arXiv:1901.09847).
    """

    uses_stamp = True
    spares_small = True
    length_varies: ClassVar[bool] = False
    error_feedback: bool

    def init(self, num_elements: int, dtype: torch.dtype, device: torch.device) -> State:
        return {RESIDUAL: torch.zeros(num_elements, dtype=torch.float32, device=device)} if self.error_feedback else {}

    def prepare(self) -> None:
        kernels()

    def capacity_bytes(self, num_elements: int, dtype: torch.dtype) -> int:
        return _HEAD_BYTES + -(-self.body_bytes(num_elements) // 8) * 8

    def encode(self, x: torch.Tensor, payload: torch.Tensor, stamp: Stamp, state: State, new_state: State) -> None:
        body = payload[_HEAD_BYTES:]
        if x.dtype != torch.float32:
            x = x.to(torch.float32).clamp_(_LOWEST, _LARGEST)
        feedback = Feedback(state[RESIDUAL], new_state[RESIDUAL], stamp.weight) if RESIDUAL in state else None
        length = self.pack(x.to(payload.device), body, stamp, feedback)
        body[length:].zero_()
        head = payload[:_HEAD_BYTES].view(torch.int64)
        first = length | stamp.shared_key << 32
        head[0], head[1] = first, _checksum(first, body)

    def decode(self, payload: torch.Tensor, out: torch.Tensor) -> None:
        body, shared_key = self._checked_body(payload, out.numel())
        values = out
        if out.dtype != torch.float32 or out.device != payload.device:
            values = torch.empty(out.numel(), dtype=torch.float32, device=payload.device)
        self.unpack(body, shared_key, values)
        if values is not out:
            out.copy_(values)

    def add(self, payload: torch.Tensor, total: torch.Tensor, scratch: torch.Tensor) -> None:
        if total.dtype != torch.float32 or total.device != payload.device:
            super().add(payload, total, scratch)
            return
        body, shared_key = self._checked_body(payload, total.numel())
        self.unpack_and_add(body, shared_key, total, scratch)

    def _checked_body(self, payload: torch.Tensor, num_elements: int) -> tuple[torch.Tensor, int]:
        """The body and the shared key.

        Raises:
            ProtocolError: the payload is not as it was sent.
        """
        body = payload[_HEAD_BYTES:]
        first, checksum = payload[:_HEAD_BYTES].view(torch.int64).tolist()
        length, shared_key = first & 0xFFFFFFFF, first >> 32
        most = self.body_bytes(num_elements)
        if checksum != _checksum(first, body) or length > most or (length < most and not self.length_varies):
            raise ProtocolError(
                f"a payload of {payload.numel()} bytes in codec {self.name!r} does not decode: its checksum or its "
                "length is wrong. It was damaged on its way, or sender and receiver run different versions."
            )
        return body[:length], shared_key

    @abc.abstractmethod
    def body_bytes(self, num_elements: int) -> int:
        """The most bytes that so many elements can take, without the head."""

    @abc.abstractmethod
    def pack(self, x: torch.Tensor, body: torch.Tensor, stamp: Stamp, feedback: Feedback | None) -> int:
        """Encode ``x`` (n,) fp32, or with feedback what that makes of it, into ``body`` (body_bytes or more,) uint8.

        Returns:
            Bytes written.
        """

    @abc.abstractmethod
    def unpack(self, body: torch.Tensor, shared_key: int, out: torch.Tensor) -> None:
        """Decode ``body`` (length,) uint8 into ``out`` (n,) fp32."""

    def unpack_and_add(self, body: torch.Tensor, shared_key: int, total: torch.Tensor, scratch: torch.Tensor) -> None:
        """Add what :meth:`unpack` would give to ``total`` (n,) fp32; ``scratch`` (n,) may be written over."""
        self.unpack(body, shared_key, scratch)
        total.add_(scratch)


_LARGEST = torch.finfo(torch.float32).max
_LOWEST = torch.finfo(torch.float32).min


def _checksum(first: int, body: torch.Tensor) -> int:
    """``sum (2 i + 1) word_i`` of the 8-byte words, and the head's first word, so that zeros are no payload."""
    loops, words = loops_for(body), body.view(torch.int64)
    if loops is not None:
        total = int(loops.weighted_sum(array(words)))
    else:
        total = int(torch.arange(1, 2 * words.numel(), 2, device=words.device).mul_(words).sum())
    return (total + (first + 1) * 0x9E3779B97F4A7C15 + 2**63) % 2**64 - 2**63
