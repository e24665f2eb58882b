"""The objective of a sweep: a metric's last value, or the time or the bytes that a run takes to reach a value."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from raytrain_het.errors import ConfigError
from raytrain_het.jobs.validation import yaml_text
from raytrain_het.plain import nearest

Mode = Literal["min", "max"]
RUN_METRICS: dict[str, Mode] = {
    "seconds": "min",
    "bytes_sent": "min",
    "samples_per_s": "max",
    "fraction_of_aggregate": "max",
}
"""Metrics that every run has, besides those that its job reports."""
_WORST = 1e30
_TARGETS = {"time_to": "seconds", "bytes_to": "bytes_sent"}


@dataclass(frozen=True, kw_only=True)
class Objective:
    """``metric``'s last value; or, with a ``target``, the ``cost`` at the first report in which ``metric`` has reached
    the target."""

    metric: str
    mode: Mode
    """Whether less or more of the metric is better."""
    target: float | None = None
    cost: str | None = None
    """``seconds`` or ``bytes_sent``, with a target."""

    @property
    def name(self) -> str:
        """The objective's name in tables."""
        if self.target is None:
            return self.metric
        return f"{self.cost} to {self.metric} {self.target:g}"

    @property
    def best(self) -> Mode:
        """Whether less or more of :meth:`value` is better."""
        return "min" if self.cost is not None else self.mode

    def reached(self, row: Mapping[str, Any]) -> bool:
        """Whether a report's metric has reached the target. NaN has not."""
        value = row.get(self.metric)
        if self.target is None or not isinstance(value, int | float):
            return False
        return value >= self.target if self.mode == "max" else value <= self.target

    def value(self, rows: Sequence[Mapping[str, Any]]) -> float | None:
        """The value of a run, by its reports; None if it has none, or has not reached the target."""
        if self.cost is not None:
            return next((row[self.cost] for row in rows if self.reached(row)), None)
        value = rows[-1].get(self.metric) if rows else None
        finite = isinstance(value, int | float) and math.isfinite(value)
        return value if finite else None

    def for_search(self, rows: Sequence[Mapping[str, Any]]) -> float:
        """A number for searchers, which need one of every run: :meth:`value`, or else a number that is worse than any
        value. Without its target a run is worse the farther it is from it."""
        value = self.value(rows)
        if value is not None:
            return float(value)
        if self.cost is None or self.target is None:
            return self._worst(self.mode)
        gap = abs(self.target - self.for_scheduler(rows[-1])) / max(abs(self.target), 1e-12)
        return min(1e18 * (1 + gap), _WORST)

    def for_scheduler(self, row: Mapping[str, Any]) -> float:
        """A number for schedulers, which compare unfinished trials: the metric, or else a number that is worse than any
        metric."""
        value = row.get(self.metric)
        if isinstance(value, int | float) and math.isfinite(value):
            return float(value)
        return self._worst(self.mode)

    @staticmethod
    def _worst(mode: Mode) -> float:
        return -_WORST if mode == "max" else _WORST


def objective_of(written: Any, mode: Mode | None, reported: Mapping[str, Mode]) -> Objective:
    """The objective of a sweep's ``metric`` and ``mode``.

    Args:
        written: A metric's name, or ``{"time_to": {"accuracy": 0.97}}``, or the same with ``bytes_to``.
        mode: Replaces the metric's own.
        reported: The metrics that the job reports, and which way is better.

    Raises:
        ConfigError: ``written`` is something else, or names a metric that the job does not report.
    """
    cost, target, name = None, None, written
    if isinstance(written, Mapping):
        ok = len(written) == 1 and next(iter(written)) in _TARGETS
        inner = next(iter(written.values())) if ok else None
        if not isinstance(inner, Mapping) or len(inner) != 1:
            raise ConfigError(
                f"metric={yaml_text(written)} is not valid: allowed is a metric's name, or the time or the bytes to a "
                "value of one. Write metric: {time_to: {accuracy: 0.97}}"
            )
        cost = _TARGETS[next(iter(written))]
        ((name, target),) = inner.items()
        if not isinstance(target, int | float) or isinstance(target, bool) or not math.isfinite(target):
            raise ConfigError(f"metric={yaml_text(written)} is not valid: allowed for {name!r} is a number.")
    known = {**RUN_METRICS, **reported} if cost is None else dict(reported)
    if not isinstance(name, str) or name not in known:
        near = nearest(name, known)
        hint = f"; did you mean {near!r}?" if near else "."
        also = f"; of any run {', '.join(RUN_METRICS)}" if cost is None else ""
        raise ConfigError(
            f"metric={yaml_text(name)}: the job does not report it{hint} Allowed: {', '.join(reported)}{also}."
        )
    return Objective(metric=name, mode=mode or known[name], target=target, cost=cost)
