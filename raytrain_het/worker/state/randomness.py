"""Whose random numbers are drawn when.

Workers usually seed torch alike, so that all build the same model; then they would also draw the same dropout masks
and the same noise, each for its own samples. So there are two kinds of streams:

- *between* the loops over the loader all workers go on with the stream that the program has seeded: decisions for an
  epoch are the same on all;
- *inside* a step each worker draws from a stream of its own, begun anew at each step by ``(seed, step, slot)``, with
  ``seed`` from the common stream. It does not depend on what came before: a step that is done again draws the same.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from raytrain_het.worker.state.checkpoint import random_states, set_random_states


class Randomness:
    """The global generators of torch (CPU, and CUDA once it is in use), numpy and Python. Used by the training thread.

    Args:
        slot: this worker's.
        seed: the run's.
    """

    def __init__(self, slot: int, seed: int) -> None:
        self._slot = slot
        self._key = (seed, torch.initial_seed())
        self._common: dict[str, Any] | None = None
        """The common stream's states, while steps are under way."""

    def step_begins(self, step: int) -> None:
        """What is drawn from here on belongs to this step, on this worker."""
        if self._common is None:
            self._common = random_states()
        words = np.random.SeedSequence([*self._key, step, self._slot]).generate_state(4, np.uint32)
        seed = int(words[0]) | int(words[1]) << 32
        torch.default_generator.manual_seed(seed)
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed_all(seed)
        np.random.seed(words[2])
        random.seed(int(words[3]))

    def steps_end(self) -> None:
        """The loop over the loader is over: the common stream goes on where it was."""
        if self._common is not None:
            common, self._common = self._common, None
            set_random_states(common)

    def state(self) -> dict[str, Any]:
        """The common stream, for a checkpoint or a worker that joins."""
        return {"key": self._key, **(self._common or random_states())}

    def load(self, state: dict[str, Any]) -> None:
        """Go on with what :meth:`state` returned."""
        state = dict(state)
        self._key = tuple(state.pop("key", self._key))
        self._common = None
        set_random_states(state)
