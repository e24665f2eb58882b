"""From profiles to scores: one number ``p_i`` per worker, with mean 1, by a policy."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping
from typing import TypeVar

from raytrain_het.balance.gradient_weights import normalised_scores
from raytrain_het.balance.profile import Profile
from raytrain_het.errors import ConfigError

_T = TypeVar("_T")
Policy = Callable[[Profile], float]


def scores(
    profiles: Mapping[int, Profile], policy: str | Policy = "train_step", *, global_batch_size: int | None = None
) -> dict[int, float]:
    """Scores by worker, scaled to mean 1.

    Args:
        profiles: by worker.
        policy: ``train_step``: samples per second of the model's own step at an equal share,
            ``b / t(b)`` with ``b = global_batch_size / N``; ``flops``: of an fp32 matrix product;
            ``memory_bandwidth``; or a function from a profile to any number above 0.
        global_batch_size: needed by ``train_step`` alone.

    Raises:
        ConfigError: no such policy, or it needs what was not measured of some worker, or it raises an error.
        ValueError: a score is zero, negative or not finite; the message names the worker.
    """
    if policy == "train_step":
        if global_batch_size is None or global_batch_size < 1:
            raise ConfigError(
                f"global_batch_size={global_batch_size!r} is not valid: allowed for the policy 'train_step' is a whole "
                "number from 1. Write global_batch_size=512, or policy='flops'."
            )
        share = global_batch_size / max(len(profiles), 1)
        raw = {w: share / _measured(w, p.step, "train_step").step_s(share) for w, p in profiles.items()}
    elif policy == "flops":
        raw = {w: _measured(w, p.flops.get("fp32"), "flops").median for w, p in profiles.items()}
    elif policy == "memory_bandwidth":
        raw = {w: _measured(w, p.memory_bandwidth, "memory_bandwidth").median for w, p in profiles.items()}
    elif callable(policy):
        raw = {w: _number(w, _called(policy, w, p)) for w, p in profiles.items()}
    else:
        raise ConfigError(
            f"policy={policy!r} is not valid: allowed is {', '.join(map(repr, POLICIES))}, or a function from a "
            "Profile to a number. Write policy='train_step'."
        )
    return normalised_scores(raw)


POLICIES = {
    "train_step": ("the model's own training step", "raytrain-het probe --model JOB.yaml"),
    "flops": ("fp32 matrix products", "raytrain-het probe"),
    "memory_bandwidth": ("the memory's bandwidth", "raytrain-het probe"),
}
"""What a policy needs, and what measures it."""


def _measured(worker: int, value: _T | None, policy: str) -> _T:
    if value is None:
        what, fix = POLICIES[policy]
        raise ConfigError(
            f"policy={policy!r} needs {what}, which has not been measured on worker {worker}: run {fix}, or take "
            "another policy."
        )
    return value


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
