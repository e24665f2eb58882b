"""``--simulate 1,0.5,0.25``: the workers that a job gets, each worker's part of a core, and what is printed of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from raytrain_het.errors import ConfigError
from raytrain_het.jobs.validation import plural

MAX_WORKERS = 16
MIN_CORES = 0.02
"""With less of a core, a worker would look as if it hung."""
LEFT_CORES = 0.4
"""Cores that are left to Ray's own processes, the driver and the membership actor."""
LARGER_BATCHES = ("global_batch_size=512", "epochs=80", "lr=0.15")
"""Settings of the default job, whose steps would otherwise be shorter than a slow worker's pauses."""
BELIEVABLE = 1.4
"""If scores differ from the simulated speeds by a larger factor, they are not believed."""


def parse_speeds(text: str) -> tuple[float, ...]:
    """``"1,0.5,0.25"`` as numbers.

    Raises:
        ConfigError: A speed is not a number above 0, or there are no speeds, or more than 16.
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
        ConfigError: A worker would have less than 0.02 of a core.
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
    """The ``--set`` overrides of a simulation, around those that were given.

    The simulated workers replace the job's. Shares follow speeds, unless an override sets them.

    Args:
        given: The overrides of the command line.
        num_workers: How many workers are simulated.
        default_job: Whether no job was named. The digits are then trained in larger batches, unless an override says
            otherwise.
    """
    larger = LARGER_BATCHES if default_job else ()
    return ["het.shares=auto", *larger, *given, f"workers=[{{count: {num_workers}, resources: {{CPU: 1}}}}]"]


def check_alone(*, workers: object, address: str | None) -> None:
    """Refuse settings that contradict simulated workers on this machine.

    Args:
        workers: The job's own workers.
        address: The address of the command line.

    Raises:
        ConfigError: There is an address, or the workers are ``auto``.
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
    """A line that says what is simulated."""
    parts = ", ".join(f"{c:.2f}" for c in cores)
    return f"simulating {plural(len(cores), 'worker')} with {parts} of a core, each held back {how}"


def verdict(summary: Mapping[str, Any], cores: Sequence[float]) -> str:
    """What equal shares would have given, computed from the scores ``p_i``: ``min p / mean p`` of the sum of speeds.

    With equal shares all workers wait for the slowest. The formula leaves out the cost of messages.

    Args:
        summary: The run's.
        cores: By world rank, the part of a core that a worker had. Scores that contradict it are not believed.
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
    """The speed of all workers at the pace of the slowest, as a part of the sum of their own speeds."""
    return min(speeds) / (math.fsum(speeds) / len(speeds))
