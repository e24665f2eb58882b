"""``--simulate 1,0.5,0.25``: which workers a job gets then, how much of a core each, and what there is to say of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from raytrain_het.errors import ConfigError
from raytrain_het.jobs.validation import plural

MAX_WORKERS = 16
MIN_CORES = 0.02
"""Less of a core, and a worker would be taken for one that hangs."""
LEFT_CORES = 0.4
"""For Ray's own processes, the driver and the membership actor."""
LARGER_BATCHES = ("global_batch_size=512", "epochs=80", "lr=0.15")
"""For the default job, whose steps are otherwise shorter than a slow worker's rest."""
BELIEVABLE = 1.4
"""Scores that are off by a larger factor have not measured the speeds."""


def parse_speeds(text: str) -> tuple[float, ...]:
    """``"1,0.5,0.25"`` as numbers.

    Raises:
        ConfigError: One is not a number above 0, or there are none, or more than 16.
    """
    parts = [part.strip() for part in text.split(",")] if text.strip() else []
    allowed = f"1 to {MAX_WORKERS} numbers above 0, with commas between them"
    if not 1 <= len(parts) <= MAX_WORKERS:
        raise ConfigError(
            f"--simulate {text!r} names {len(parts)} workers: allowed are {allowed}. Write --simulate 1,0.5,0.25"
        )
    return tuple(_speed(part, text, allowed) for part in parts)


def _speed(part: str, text: str, allowed: str) -> float:
    try:
        speed = float(part)
    except ValueError:
        speed = math.nan
    if not (0 < speed < math.inf):
        raise ConfigError(
            f"--simulate {text!r}: the speed {part!r} is not valid: allowed are {allowed}. Write --simulate 1,0.5,0.25"
        )
    return speed


def fitting_cores(speeds: Sequence[float], num_cores: float) -> tuple[float, ...]:
    """Each worker's part of a core: ``s_i min(1 / max s, (num_cores - 0.4) / sum s)``.

    Raises:
        ConfigError: One would have less than 0.02 of a core.
    """
    unit = min(1 / max(speeds), (num_cores - LEFT_CORES) / math.fsum(speeds))
    cores = tuple(speed * unit for speed in speeds)
    if min(cores) < MIN_CORES:
        raise ConfigError(
            f"--simulate: the speed {min(speeds):g} would be {min(cores):.2g} of a core, as there are {num_cores:.3g}: "
            f"allowed is {MIN_CORES} or more. Write speeds that differ less, or fewer of them: "
            "--simulate 1,0.5,0.25"
        )
    return cores


def with_simulated_workers(given: Iterable[str], num_workers: int, *, default_job: bool) -> list[str]:
    """``--set`` overrides around those that were given: the job's workers go, its shares unless given.

    Args:
        default_job: No job was named: the digits are trained in larger batches then, unless given.
    """
    larger = LARGER_BATCHES if default_job else ()
    return ["het.shares=auto", *larger, *given, f"workers=[{{count: {num_workers}, resources: {{CPU: 1}}}}]"]


def check_alone(*, workers: object, address: str | None) -> None:
    """Refuse what contradicts simulated workers on this machine.

    Args:
        workers: as the job would have them.

    Raises:
        ConfigError: There is an address, or the workers are what the cluster has.
    """
    if address is not None:
        raise ConfigError(
            f"--simulate with --address {address}: allowed is no address, since simulated workers run on this machine. "
            "Leave out --address, or --simulate"
        )
    if workers == "auto":
        raise ConfigError(
            "--simulate with workers='auto': allowed is a list, which the simulated workers replace; 'auto' takes what "
            "a cluster has. Write --set workers='[{count: 2}]', or leave out --simulate"
        )


def announcement(cores: Sequence[float], how: str) -> str:
    """What is being simulated."""
    parts = ", ".join(f"{c:.2f}" for c in cores)
    return f"simulating {plural(len(cores), 'worker')} with {parts} of a core, each held back {how}"


def verdict(summary: Mapping[str, Any], cores: Sequence[float]) -> str:
    """What equal shares would have given, computed from the scores ``p_i``: ``min p / mean p`` of the sum of speeds.

    With equal shares all wait for the slowest. That leaves out what messages cost, and is as good as the scores are.

    Args:
        summary: The run's.
        cores: What the workers had, by world rank: scores that tell another tale are not believed.
    """
    workers = summary["workers"]
    scores = [worker.get("score") for worker in workers]
    if not scores or None in scores:
        return "what equal shares would have given is not known: the run ended before every worker's speed was"
    equal, simulated = _of_the_slowest(scores), _of_the_slowest(cores)
    slowest = workers[scores.index(min(scores))]["world_rank"]
    text = (
        f"computed from the scores, not run: with equal shares all would go at the pace of worker {slowest}, about "
        f"{equal:.0%} of the sum of their solo speeds"
    )
    if not 1 / BELIEVABLE < equal / simulated < BELIEVABLE:
        return (
            f"{text}; the simulated speeds say {simulated:.0%}: steps were too short, or this machine too busy, to "
            "measure them. Train in larger batches, or for longer"
        )
    fraction = summary.get("fraction_of_aggregate")
    return text if fraction is None else f"{text}; this run's last steps were {fraction / equal:.1f} times as fast"


def _of_the_slowest(speeds: Sequence[float]) -> float:
    """What all do at the pace of the slowest, as a part of what they can do."""
    return min(speeds) / (math.fsum(speeds) / len(speeds))
