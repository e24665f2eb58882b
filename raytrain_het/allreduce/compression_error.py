"""How much of the real gradients a worker's codec loses: measured now and then, on one shard."""

from __future__ import annotations

from collections import deque

import torch

from raytrain_het.allreduce.codecs import Codec, relative_error

EVERY_STEPS = 20


class CompressionErrorMeter:
    """One worker's meter. Its communication thread measures; any thread may take the results."""

    def __init__(self) -> None:
        self._measured: deque[tuple[str, float]] = deque(maxlen=64)
        self._last_step = -1

    def is_due(self, step: int, bucket: int, num_buckets: int) -> bool:
        """Whether to measure a shard of this bucket: one in every 20th step, of another bucket each time."""
        return step % EVERY_STEPS == 0 and step != self._last_step and bucket == step // EVERY_STEPS % num_buckets

    def measure(
        self,
        step: int,
        word: str,
        codec: Codec,
        payload: torch.Tensor,
        *,
        shard: torch.Tensor,
        residual: torch.Tensor | None,
    ) -> None:
        """Measure ``|y - decoded(y)| / |y|``, with ``y`` the shard and its residual before.

        Args:
            step: which one.
            word: the codec as the record names it.
            codec: the codec.
            payload: what the shard was encoded into.
            shard: the weighted gradient (n,).
            residual: what encoding has left out of ``y``, in the shard's units; None without error feedback.
        """
        out = torch.empty(shard.numel(), dtype=shard.dtype, device=payload.device)
        codec.decode(payload, out)
        y = out + residual if residual is not None else shard.to(out.device)
        self.record(step, word, relative_error(y, out))

    def record(self, step: int, word: str, error: float) -> None:
        """Record a loss that the caller has measured itself."""
        self._last_step = step
        self._measured.append((word, error))

    def take(self) -> list[tuple[str, float]]:
        """Codecs and their errors since the last call."""
        measured = list(self._measured)
        for _ in measured:  # In one go: another thread appends.
            self._measured.popleft()
        return measured
