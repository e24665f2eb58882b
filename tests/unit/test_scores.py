"""Scores by policy, and what is wrong with those that cannot be."""

from __future__ import annotations

import math
from typing import Any

import pytest

from raytrain_het.balance.batch_shares import StepCost
from raytrain_het.balance.profile import Measurement, Profile
from raytrain_het.balance.scores import scores
from raytrain_het.errors import ConfigError


def profile(flops: float = 1e9, bandwidth: float = 1e9, step: StepCost | None = None) -> Profile:
    return Profile(
        hardware="box",
        device="cpu",
        cores=1,
        num_threads=1,
        flops={"fp32": Measurement(flops, 0, 5)},
        memory_bandwidth=Measurement(bandwidth, 0, 5),
        step=step,
    )


FAST = profile(3e9, 6e9, StepCost(0.0, 0.001))
SLOW = profile(1e9, 4e9, StepCost(0.1, 0.002))


def test_each_policy_reads_its_own_measurement() -> None:
    both = {0: FAST, 5: SLOW}
    assert scores(both, "flops") == {0: pytest.approx(1.5), 5: pytest.approx(0.5)}
    assert scores(both, "memory_bandwidth") == {0: pytest.approx(1.2), 5: pytest.approx(0.8)}
    # At 50 samples each: 1000 and 250 samples per second.
    assert scores(both, global_batch_size=100) == {0: pytest.approx(1.6), 5: pytest.approx(0.4)}
    assert scores(both, lambda p: p.flops["fp32"].median ** 2) == {0: pytest.approx(1.8), 5: pytest.approx(0.2)}


@pytest.mark.parametrize(
    ("policy", "damaged", "words"),
    [
        ("train_step", profile(), ["worker 7", "training step", "raytrain-het probe --model"]),
        ("flops", Profile(hardware="", device="cpu", cores=1, num_threads=1), ["worker 7", "matrix products"]),
        ("memory_bandwidth", Profile(hardware="", device="cpu", cores=1, num_threads=1), ["worker 7", "memory"]),
        (lambda p: "fast" if p is FAST else 1.0, FAST, ["worker", "'fast'", "finite number"]),
        (
            lambda p: p.host_to_device.median,
            SLOW,
            ["'<lambda>'", "worker 3 (box, cpu)", "AttributeError", "host_to_device"],
        ),
        ("speed", SLOW, ["policy='speed'", "'train_step'", "'flops'", "'memory_bandwidth'", "function"]),
        (None, SLOW, ["policy=None"]),
    ],
)
def test_a_policy_that_cannot_be_followed_says_why_and_what_to_do(policy: Any, damaged: Profile, words: list) -> None:
    with pytest.raises(ConfigError) as error:
        scores({3: FAST, 7: damaged}, policy, global_batch_size=100)
    assert all(word in str(error.value) for word in words), error.value


def test_train_step_needs_a_batch_size() -> None:
    with pytest.raises(ConfigError, match="global_batch_size=None"):
        scores({0: FAST})


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_a_score_that_is_no_positive_number_names_its_worker(bad: float) -> None:
    with pytest.raises(ValueError, match=r"worker 7 is .*above 0"):
        scores({3: FAST, 7: SLOW}, lambda p: 1.0 if p is FAST else bad)
    with pytest.raises(ValueError, match="worker 7"):
        scores({3: FAST, 7: profile(flops=bad)}, "flops")
