"""The space of a sweep: one dimension for each setting that varies."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from raytrain_het.errors import ConfigError
from raytrain_het.jobs.validation import yaml_text
from raytrain_het.plain import is_number, nearest

RANGES = ("uniform", "loguniform", "integers", "logintegers")
LISTS = ("choice", "grid")
_EXAMPLE = "{uniform: [-1, 1]}, {loguniform: [0.001, 0.1]}, {integers: [1, 8]}, {choice: [a, b]} or {grid: [1, 2, 3]}"


@dataclass(frozen=True, kw_only=True)
class Dimension:
    """One setting and the values that it may have.

    ``uniform`` and ``loguniform`` are ranges of numbers, ``integers`` and ``logintegers`` of whole numbers with both
    ends; ``choice`` is drawn from, every value of a ``grid`` is tried.
    """

    path: str
    """The setting's path, as written."""
    whole: str
    """The whole path, with ``het.``."""
    kind: str
    low: float = 0.0
    high: float = 0.0
    choices: dict[Any, Any] = dataclasses.field(default_factory=dict)
    """The values by their names: a number, a text or a bool is its own name, anything else has a text."""

    @property
    def is_finite(self) -> bool:
        """Whether it has a list of values, all of which can be tried."""
        return bool(self.choices)

    def value_of(self, sampled: Any) -> Any:
        """The value that a job is given."""
        return self.choices[sampled] if self.is_finite else sampled

    def extremes(self) -> list[Any]:
        """Values that are checked beforehand: each choice, or both ends of a range and a number within it."""
        if self.is_finite:
            return list(self.choices)
        whole = self.kind.endswith("integers")
        return [self.low, self.high, *([] if whole else [self.low + (self.high - self.low) / math.pi])]

    def domain(self, *, grid: bool) -> Any:
        """Ray Tune's domain.

        Args:
            grid: Whether every value of a list is tried; else values are drawn from it.
        """
        from ray import tune

        match self.kind:
            case "uniform":
                return tune.uniform(self.low, self.high)
            case "loguniform":
                return tune.loguniform(self.low, self.high)
            case "integers":
                return tune.randint(int(self.low), int(self.high) + 1)
            case "logintegers":
                return tune.lograndint(int(self.low), int(self.high) + 1)
        every = list(self.choices)
        return tune.grid_search(every) if grid or self.kind == "grid" else tune.choice(every)


def dimension(path: str, whole: str, written: Any) -> Dimension:
    """The dimension that a sweep's file writes for one setting.

    Raises:
        ConfigError: It is neither a range nor a list, or it is empty.
    """
    if not isinstance(written, Mapping) or len(written) != 1:
        hint = f" Write {path}: {{choice: {yaml_text(written)}}}" if isinstance(written, list) else ""
        raise ConfigError(f"={yaml_text(written)} is not valid: allowed is {_EXAMPLE}.{hint}")
    ((kind, values),) = written.items()
    if kind not in (*RANGES, *LISTS):
        near = nearest(kind, (*RANGES, *LISTS))
        hint = f" Did you mean {near!r}?" if near else ""
        raise ConfigError(f".{kind}={yaml_text(values)}: there is no such way to vary it; allowed is {_EXAMPLE}.{hint}")
    if kind in LISTS:
        if not isinstance(values, list) or not values:
            raise ConfigError(f".{kind}={yaml_text(values)} is not valid: allowed is a list of one value or more.")
        choices = {name_of(value): value for value in values}
        if len(choices) < len(values):
            raise ConfigError(f".{kind}={yaml_text(values)} is not valid: a value is there twice. Leave one out.")
        return Dimension(path=path, whole=whole, kind=kind, choices=choices)
    numbers = isinstance(values, list) and len(values) == 2 and all(map(is_number, values))
    if numbers and kind.endswith("integers"):
        numbers = all(value == int(value) for value in values)
    what = "two whole numbers" if kind.endswith("integers") else "two numbers"
    if not numbers:
        raise ConfigError(f".{kind}={yaml_text(values)} is not valid: allowed is [low, high], {what}.")
    low, high = values
    if not low < high:
        turned = (
            f" Write [{yaml_text(high)}, {yaml_text(low)}]" if high < low else " For one value write {choice: [...]}"
        )
        raise ConfigError(f".{kind}={yaml_text(values)} is not valid: the range is empty.{turned}")
    if kind.startswith("log") and low <= 0:
        raise ConfigError(f".{kind}={yaml_text(values)} is not valid: on a logarithmic scale numbers are above 0.")
    whole_numbers = kind.endswith("integers")
    return Dimension(
        path=path,
        whole=whole,
        kind=kind,
        low=int(low) if whole_numbers else float(low),
        high=int(high) if whole_numbers else float(high),
    )


def name_of(value: Any) -> Any:
    """The name of a value in tables and in Tune: itself, or a text as in a job file."""
    return value if isinstance(value, bool | int | float | str) else yaml_text(value)
