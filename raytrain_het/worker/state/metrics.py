"""Metrics as users give them become plain values, or are refused by name before anything is sent."""

from __future__ import annotations

import decimal
import json
import math
import numbers
from collections.abc import Mapping
from typing import Any

from raytrain_het.errors import ConfigError
from raytrain_het.membership.merging import REDUCTIONS, is_averaged

MAX_TEXT = 10_000
MAX_JSON = 1_000_000
"""Characters of one metric that is a text, and of all metrics of a report."""
_WHOLE = 2**63


def check_metrics(metrics: Any, reduce: Any) -> dict[str, Any]:
    """Metrics as plain values by name, those in nested dictionaries as ``"outer/inner"``.

    Raises:
        ConfigError: a metric is no number, text or flag, or ``reduce`` names what is not there.
    """
    plain: dict[str, Any] = {}
    for name, value in _flat("report()", metrics):
        plain[name] = _plain("report()", name, value)
    if len(json.dumps(plain)) > MAX_JSON:
        raise ConfigError(
            f"report(): {len(plain)} metrics take {len(json.dumps(plain)):,} characters; allowed are {MAX_JSON:,}. "
            "Write large results to a file, and report its name."
        )
    for name, how in reduce.items():
        if name not in plain or how not in REDUCTIONS:
            raise ConfigError(
                f"report(reduce={{{name!r}: {how!r}}}): allowed are the metrics {sorted(plain)} with one of "
                f"{REDUCTIONS}."
            )
        if plain[name] is not None and not is_averaged(plain[name]):
            raise ConfigError(
                f"report(reduce={{{name!r}: {how!r}}}): metric {name!r} is {plain[name]!r}, and only numbers are "
                "reduced. Leave it out of reduce, or report a number."
            )
    return plain


def check_reduce(reduce: Any) -> dict[str, Any]:
    """``reduce`` by the same names; it may be nested as the metrics are."""
    return dict(_flat("report(reduce=)", reduce)) if reduce is not None else {}


def check_sums(returned: Any) -> dict[str, float]:
    """What an evaluation's function has returned for one batch, as floats by name.

    Raises:
        ConfigError: something in it is no number.
    """
    sums = {}
    for name, value in _flat("evaluate(): fn", returned):
        plain = _plain("evaluate(): fn", name, value)
        if plain is None or isinstance(plain, str):
            raise ConfigError(
                f"evaluate(): fn returned {name!r}: {plain!r}; allowed are numbers, each the sum over the batch's "
                "samples. Return {'loss': F.cross_entropy(model(x), y, reduction='sum')}, for example."
            )
        sums[name] = float(plain)
    return sums


def _flat(who: str, metrics: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if not isinstance(metrics, Mapping):
        raise ConfigError(
            f"{who} got a {type(metrics).__name__}: allowed is a dictionary of numbers by name. Write "
            "{'loss': loss.item()}."
        )
    found: list[tuple[str, Any]] = []
    for key, value in metrics.items():
        name = f"{prefix}{_name(who, key)}"
        found += _flat(who, value, f"{name}/") if isinstance(value, Mapping) else [(name, value)]
    names = [name for name, _ in found]
    twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if twice:
        raise ConfigError(f"{who}: metric {twice[0]!r} is given twice, once by a nested dictionary. Rename one.")
    return found


def _name(who: str, key: Any) -> str:
    if hasattr(key, "item") and getattr(key, "size", 1) == 1:
        key = key.item()
    if isinstance(key, str | int | float) and str(key):
        return str(key)
    raise ConfigError(f"{who}: {key!r} names a metric; allowed are texts and numbers. Write a text.")


def _plain(who: str, name: str, value: Any) -> Any:
    count = value.numel() if hasattr(value, "numel") else getattr(value, "size", 1)
    if hasattr(value, "item") and isinstance(count, int) and count == 1:
        try:
            value = value.item()
        except Exception as error:  # A tensor without memory ("meta"), say.
            raise ConfigError(f"{who}: metric {name!r} has no value that could be read ({error}).") from error
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        if len(value) > MAX_TEXT:
            raise ConfigError(
                f"{who}: metric {name!r} is a text of {len(value):,} characters; allowed are {MAX_TEXT:,}. Write it to "
                "a file, and report its name."
            )
        return str(value)
    if isinstance(value, numbers.Integral) and abs(int(value)) < _WHOLE:
        return int(value)
    if isinstance(value, numbers.Real | decimal.Decimal):
        try:
            number = float(value)
        except (OverflowError, ValueError):
            number = math.nan
        if math.isnan(number) and value == value:
            raise ConfigError(f"{who}: metric {name!r} is a number that no float holds. Scale it, or report its log.")
        return number
    raise ConfigError(
        f"{who}: metric {name!r} is a {type(value).__name__}{f' of {count} elements' * (count != 1)}; allowed are "
        "numbers, texts, flags, tensors of one element, and dictionaries of these. Reduce it first, for example with "
        ".mean().item(), or give each element a name."
    )
