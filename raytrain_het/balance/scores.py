"""From profiles to scores: one number ``p_i`` per worker, with mean 1, by a policy."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping

from raytrain_het.balance.gradient_weights import normalised_scores
from raytrain_het.balance.profile import Profile
from raytrain_het.errors import ConfigError
from raytrain_het.score_policies import SCORE_POLICIES, ScorePolicy

Policy = Callable[[Profile], float]


def scores(
    profiles: Mapping[int, Profile], policy: str | Policy = "train_step", *, global_batch_size: int | None = None
) -> dict[int, float]:
    """Scores by worker, scaled to mean 1.

    Args:
        profiles: by worker.
        policy: A name in :data:`raytrain_het.score_policies.SCORE_POLICIES`, or a function from a profile to any
            number above 0.
        global_batch_size: Needed by ``train_step`` alone.

    Raises:
        ConfigError: no such policy, or it needs what was not measured of some worker, or it raises an error.
        ValueError: a score is zero, negative or not finite; the message names the worker.
    """
    if callable(policy):
        return normalised_scores({w: _number(w, _called(policy, w, p)) for w, p in profiles.items()})
    if policy not in SCORE_POLICIES:
        raise ConfigError(
            f"policy={policy!r} is not valid: allowed is {', '.join(map(repr, SCORE_POLICIES))}, or a function from a "
            "Profile to a number. Write policy='train_step'."
        )
    named = SCORE_POLICIES[policy]()
    if not named.from_hardware and (global_batch_size is None or global_batch_size < 1):
        raise ConfigError(
            f"global_batch_size={global_batch_size!r} is not valid: allowed for the policy {policy!r} is a whole "
            "number from 1. Write global_batch_size=512, or policy='flops'."
        )
    share = (global_batch_size or 0) / max(len(profiles), 1)
    return normalised_scores({w: _score(named, w, p, share) for w, p in profiles.items()})


def _score(policy: ScorePolicy, worker: int, profile: Profile, share: float) -> float:
    score = policy.score(profile, share)
    if score is None:
        raise ConfigError(
            f"policy={policy.name!r} needs {policy.needs}, which has not been measured on worker {worker}: run "
            f"{policy.measured_by}, or take another policy."
        )
    return score


def _called(policy: Policy, worker: int, profile: Profile) -> object:
    try:
        return policy(profile)
    except Exception as error:
        raise ConfigError(
            f"the policy {getattr(policy, '__name__', repr(policy))!r} failed on worker {worker} ({profile.hardware}, "
            f"{profile.device}) with {type(error).__name__}: {error}. What was not measured is None in a profile (a "
            "CPU has no host_to_device): let the function return a number above 0 all the same."
        ) from error


def _number(worker: int, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ConfigError(
            f"the policy gave {value!r} for worker {worker}: allowed is a finite number above 0. Let the function "
            "return one for every profile."
        )
    return float(value)
