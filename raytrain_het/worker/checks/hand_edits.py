"""Parameters that the loop's body changes by hand: clamps after ``step()``, weights that are perturbed for a pass.

A share that comes in several passes runs the body several times for one step. What the body does to parameters counts
once, in the last pass. Between passes they become what they were when the step was opened.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


class HandEdits:
    """Of one model's parameters. Used by the training thread.

    Args:
        parameters: all of the model's.
    """

    def __init__(self, parameters: Sequence[torch.Tensor]) -> None:
        self._parameters = parameters
        self._copies: list[torch.Tensor] | None = None
        self._versions: list[int] = []

    def step_begins(self, num_passes: int) -> None:
        """A step is opened; with several passes a copy is kept until the next one."""
        self._copies = [p.detach().clone() for p in self._parameters] if num_passes > 1 else None
        self._versions = self._versions_now()

    def step_fails(self) -> None:
        """The step will be done again: what the body does from here on is taken back too."""
        if self._copies is None and self._versions == self._versions_now():
            self._copies = [p.detach().clone() for p in self._parameters]

    def take_back(self) -> bool:
        """Make parameters what they were when the step was opened.

        Returns:
            False if some were changed, and there is no copy.
        """
        if self._copies is None:
            return self._versions == self._versions_now()
        with torch.no_grad():
            for p, copy in zip(self._parameters, self._copies, strict=True):
                if not torch.equal(p, copy):
                    p.copy_(copy)
        return True

    def _versions_now(self) -> list[int]:
        return [p._version for p in self._parameters]
