"""What a score policy is: a worker's profile as one number."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from raytrain_het.named_options import NamedOptions

if TYPE_CHECKING:
    from raytrain_het.balance.profile import Profile


@dataclass(frozen=True, kw_only=True)
class ScorePolicy(NamedOptions, abc.ABC):
    """How fast a worker is, compared with the others of its run. Only ratios between workers count."""

    field = "score_policy"
    example = "'flops'"

    needs: ClassVar[str]
    """What a profile must hold, for messages."""
    measured_by: ClassVar[str] = "raytrain-het probe"
    """The command that measures it, for messages."""
    from_hardware: ClassVar[bool] = True
    """Whether a probe of the hardware is enough; else the model's own step must have been measured."""

    @abc.abstractmethod
    def score(self, profile: Profile, share: float) -> float | None:
        """The worker's score before it is scaled to mean 1.

        Args:
            profile: What was measured of the worker.
            share: Samples in the worker's part of a global batch, if all parts are equal. 0 where ``from_hardware``
                holds and no batch is known.

        Returns:
            A number above 0; None where the profile lacks what the policy needs.
        """
