"""How much of the real gradients a worker's codec loses: looked at now and then, on one shard."""

from __future__ import annotations

from collections import deque

import torch

from raytrain_het.allreduce.codecs import Codec, relative_error

EVERY_STEPS = 20


class Fidelity:
    """Of one worker. Used by its communication thread; what it has seen is taken by another."""

    def __init__(self) -> None:
        self._seen: deque[tuple[str, float]] = deque(maxlen=64)
        self._looked_at = -1

    def is_due(self, step: int, bucket: int, num_buckets: int) -> bool:
        """Whether a shard of this bucket is to be looked at: in every 20th step one, of another bucket each time."""
        return step % EVERY_STEPS == 0 and step != self._looked_at and bucket == step // EVERY_STEPS % num_buckets

    def look(
        self,
        step: int,
        word: str,
        codec: Codec,
        payload: torch.Tensor,
        *,
        shard: torch.Tensor,
        left_out: torch.Tensor | None,
    ) -> None:
        """A shard (n,) was encoded into a payload, by a codec of this name, and with error feedback so much was left
        out.

        The error is ``|y - decoded(y)| / |y|``, with ``y`` the shard and what was left out before.
        """
        out = torch.empty(shard.numel(), dtype=shard.dtype, device=payload.device)
        codec.decode(payload, out)
        y = out + left_out if left_out is not None else shard.to(out.device)
        self.note(step, word, relative_error(y, out))

    def note(self, step: int, word: str, error: float) -> None:
        """So much was lost, as whoever has encoded it knows."""
        self._looked_at = step
        self._seen.append((word, error))

    def take(self) -> list[tuple[str, float]]:
        """Codecs and their errors since the last call."""
        seen = list(self._seen)
        for _ in seen:  # In one go: another thread appends.
            self._seen.popleft()
        return seen
