"""Predict how fast a fleet trains, from measurements of its machines: pure arithmetic."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from raytrain_het.balance.batch_shares import StepCost, balanced_shares, slowest_s

ENOUGH = 0.95
"""So much of the best throughput is enough: a still larger batch gains little."""
MESSAGES_S = 1.2e-3
"""CPU time that a member spends on a step's messages, whatever their size
(``experiments.benchmarks.protocol_cost``)."""
MESSAGES_S_PER_BYTE = 1.5e-9
"""CPU time that a member spends on messages for each byte of the gradient (measured likewise)."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """One worker of a fleet."""

    cost: StepCost
    """The cost of its step alone, without communication."""
    latency_s: float = 0.0
    """Seconds of a round trip over its slowest link."""
    bandwidth: float = math.inf
    """Bytes per second that it can send, and receive at the same time, over its slowest link."""
    cores: float = math.inf
    """The CPU cores that it computes with. Messages take time of the same cores."""
    spread: float = 0.0
    """Relative standard deviation of its step's time."""


@dataclass(frozen=True, kw_only=True)
class FleetPrediction:
    """What a fleet will do at a global batch size."""

    shares: tuple[int, ...]
    """Samples of each machine."""
    compute_s: float
    """Seconds of a step that the slowest machine computes, with its work for messages."""
    communication_s: float
    """Seconds that messages are on their way, see :func:`communication_s`."""
    chance_s: float
    """Seconds that a step waits because some machine is slower than on average, see :func:`chance`."""

    @property
    def step_s(self) -> float:
        """Seconds of a step."""
        return self.compute_s + self.communication_s + self.chance_s

    @property
    def samples_per_s(self) -> float:
        """Throughput of the fleet."""
        return sum(self.shares) / self.step_s


@dataclass(frozen=True, kw_only=True)
class Advice:
    """A fleet's prediction, and what would make it faster."""

    prediction: FleetPrediction
    """All machines, at the batch size that was asked for."""
    solo_samples_per_s: tuple[float, ...]
    """Samples per second of each machine alone, with its share: ``b / t(b)``."""
    gains: tuple[float, ...]
    """Throughput with a machine over throughput without it; infinite for the only one."""
    costs_more: tuple[int, ...]
    """Positions of machines without which the fleet is faster. They are left out one at a time, the worst first, while
    a gain is 1 or less: beside a machine that all others wait for, those look useless too."""
    without_them: FleetPrediction
    """The prediction for the machines that are left."""
    best_batch_size: int
    """The global batch size with the best throughput within the bound."""
    best_samples_per_s: float
    enough_batch_size: int
    """The smallest global batch size that reaches ``ENOUGH`` of the best throughput."""

    @property
    def fraction_of_aggregate(self) -> float:
        """The predicted throughput over the sum of the solo speeds."""
        return self.prediction.samples_per_s / sum(self.solo_samples_per_s)


def communication_s(machines: Sequence[Machine], gradient_bytes: float) -> float:
    """Seconds of a sharded all-reduce that does not overlap with computation.

    ``2 (N-1)/N * bytes / min_i bandwidth_i + 2 max_i latency_i``: there are two exchanges, one of parts and one of
    sums. In each, every member sends, and at the same time receives, ``(N-1)/N`` of the gradient's bytes over its
    slowest link, and waits for a round trip. 0 for a single member.
    """
    n = len(machines)
    if n < 2:
        return 0.0
    return 2 * (n - 1) / n * gradient_bytes / min(m.bandwidth for m in machines) + 2 * max(
        m.latency_s for m in machines
    )


def messages_s(machine: Machine, gradient_bytes: float) -> float:
    """Seconds that a member's own work for a step's messages takes: ``(1.2 ms + 1.5 ns * bytes) / cores``."""
    return (MESSAGES_S + MESSAGES_S_PER_BYTE * gradient_bytes) / machine.cores


def chance(spreads: Sequence[float]) -> float:
    """By which part the largest of ``N`` times of equal mean exceeds that mean, on average.

    ``sqrt(mean_i spread_i^2) * Phi^-1((N - 3/8) / (N + 1/4))``: normal deviates, and Blom's approximation (1958) of the
    mean of the largest of them. 0 for a single one.
    """
    n = len(spreads)
    largest = statistics.NormalDist().inv_cdf((n - 0.375) / (n + 0.25))
    return largest * math.sqrt(statistics.fmean(spread**2 for spread in spreads))


def predict(machines: Sequence[Machine], *, global_batch_size: int, gradient_bytes: float) -> FleetPrediction:
    """The fleet with balanced shares: ``T = (1 + chance) max_i (t_i(b_i) + messages_s_i) + communication_s``.

    A fleet of one machine has no messages.

    Raises:
        ValueError: The batch has less than one sample for each machine, or a cost is not valid.
    """
    costs = [m.cost for m in machines]
    if len(machines) > 1:
        costs = [StepCost(m.cost.fixed_s + messages_s(m, gradient_bytes), m.cost.per_sample_s) for m in machines]
    shares = balanced_shares(costs, global_batch_size)
    compute_s = slowest_s(costs, shares)
    return FleetPrediction(
        shares=tuple(shares),
        compute_s=compute_s,
        communication_s=communication_s(machines, gradient_bytes),
        chance_s=compute_s * chance([m.spread for m in machines]),
    )


def advice(
    machines: Sequence[Machine], *, global_batch_size: int, gradient_bytes: float, max_batch_size: int | None = None
) -> Advice:
    """Predict a fleet, and find machines and batch sizes that would make it faster.

    Args:
        machines: One or more.
        global_batch_size: B, at least one sample for each machine.
        gradient_bytes: The bytes of a whole gradient in messages.
        max_batch_size: The largest global batch to consider; the default is B.

    Raises:
        ValueError: See :func:`predict`.
    """

    def at(members: Sequence[Machine], batch: int) -> FleetPrediction:
        return predict(members, global_batch_size=batch, gradient_bytes=gradient_bytes)

    whole = at(machines, global_batch_size)
    kept, costs_more = list(range(len(machines))), []
    gains = first = _gains(machines, global_batch_size, gradient_bytes)
    while min(gains) <= 1:
        costs_more.append(kept.pop(gains.index(min(gains))))
        gains = _gains([machines[i] for i in kept], global_batch_size, gradient_bytes)
    speeds = {b: at(machines, b).samples_per_s for b in _batch_sizes(len(machines), global_batch_size, max_batch_size)}
    best = max(speeds, key=lambda b: speeds[b])
    return Advice(
        prediction=whole,
        solo_samples_per_s=tuple(b / m.cost.step_s(b) for m, b in zip(machines, whole.shares, strict=True)),
        gains=tuple(first),
        costs_more=tuple(costs_more),
        without_them=at([machines[i] for i in kept], global_batch_size),
        best_batch_size=best,
        best_samples_per_s=speeds[best],
        enough_batch_size=min(b for b, speed in speeds.items() if speed >= ENOUGH * speeds[best]),
    )


def _gains(machines: Sequence[Machine], batch: int, gradient_bytes: float) -> list[float]:
    if len(machines) == 1:
        return [math.inf]

    def speed(members: Sequence[Machine]) -> float:
        return predict(members, global_batch_size=batch, gradient_bytes=gradient_bytes).samples_per_s

    whole = speed(machines)
    return [whole / speed([*machines[:i], *machines[i + 1 :]]) for i in range(len(machines))]


def _batch_sizes(least: int, batch: int, most: int | None) -> list[int]:
    """Powers of two, B and the bound itself."""
    most = max(batch, most or batch)
    return sorted({least, batch, most, *(2**i for i in range(most.bit_length()) if least <= 2**i <= most)})
