"""Workers' numbers become one: sums that no number can break, and the rules by which metrics are merged."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from raytrain_het.membership.protocol import Report

REDUCTIONS = ("mean", "sum", "max", "min")


def exact_sum(values: Iterable[float]) -> float:
    """``math.fsum``, for every float: infinities of both signs make NaN, and what no float holds is infinite."""
    values = list(values)
    try:
        return math.fsum(values)
    except ValueError:  # Infinities of both signs.
        return math.nan
    except OverflowError:  # On the way, or in the end.
        scaled = math.fsum(math.ldexp(v, -128) for v in values)
        try:
            return math.ldexp(scaled, 128)
        except OverflowError:
            return math.copysign(math.inf, scaled)


def weighted_mean(weights: list[float], values: list[float]) -> float:
    """``sum w_i v_i / sum w_i``. A value that is the same everywhere stays as it is, to the bit."""
    if len(set(values)) == 1:
        return values[0]
    total = sum(weights)
    products = [w * v for w, v in zip(weights, values, strict=True)]
    if any(math.isinf(p) and not math.isinf(v) for p, v in zip(products, values, strict=True)):
        return exact_sum(w / total * v for w, v in zip(weights, values, strict=True))
    return exact_sum(products) / total


def extreme(how: str, values: list[float]) -> float:
    """The largest or the least; NaN where any is, whoever said it."""
    return math.nan if any(math.isnan(v) for v in values) else (max if how == "max" else min)(values)


def is_averaged(value: Any) -> bool:
    """Whether it is averaged: a flag is not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def reduce_metrics(parts: Sequence[Report]) -> dict[str, Any]:
    """Merge the workers' metrics, the parts in the order of ranks.

    A number is the mean over those that gave it, weighted by samples, unless a part's ``reduce`` says otherwise (the
    first one's that says anything). A worker that trained on nothing since its last report does not count, in sums
    neither: its body ran on samples that stand in. If all have, they count the same. A text or a flag is the first
    worker's; ``None`` counts as nothing given, as long as another worker gave something.
    """
    merged: dict[str, Any] = {}
    for name in dict.fromkeys(name for part in parts for name in part.metrics):
        having = [p for p in parts if p.metrics.get(name) is not None]
        if any(p.samples for p in having) and all(is_averaged(p.metrics[name]) for p in having):
            having = [p for p in having if p.samples]
        values = [p.metrics[name] for p in having]
        how = next((p.reduce[name] for p in parts if name in p.reduce), "mean")
        if not values or not all(map(is_averaged, values)):
            merged[name] = values[0] if values else None
        elif how == "sum":
            merged[name] = exact_sum(values)
        elif how in ("max", "min"):
            merged[name] = extreme(how, values)
        else:
            merged[name] = weighted_mean([p.samples or 1 for p in having], values)
    return merged


def add_up(parts: Sequence[Report]) -> dict[str, float]:
    """What all have done since the report before: samples and bytes are added up, the rest is as of the worker that has
    done the most steps. A worker that was lost meanwhile does not count."""
    done = [part.since_last for part in parts if part.since_last is not None]
    if not done:
        return {}
    summed = {name: sum(since[name] for since in done) for name in ("samples", "bytes_sent")}
    return {**max(done, key=lambda since: since["steps"]), **summed}


def mixed_up(parts: Mapping[int, Report]) -> str | None:
    """What the workers' parts of one report (by slot) do not agree on, in words; None where they fit together.

    Names may differ, and numbers may be missing: that is merged. One metric that is a number here and a text there,
    another reduction, or a checkpoint that only some want, is nothing that could be merged.
    """
    settings: tuple[tuple[str, Callable[[Report], Any]], ...] = (
        ("checkpoint", lambda part: part.checkpoint),
        ("reduce", lambda part: part.reduce),
    )
    for what, of in settings:
        (first, said), *others = [(slot, of(parts[slot])) for slot in sorted(parts)]
        for slot, other in others:
            if other != said:
                return f"worker {first} has {what}={said!r}, and worker {slot} has {what}={other!r}"
    kinds: dict[str, tuple[int, str]] = {}
    for slot in sorted(parts):
        for name, value in parts[slot].metrics.items():
            if value is None:
                continue
            kind = "a number" if is_averaged(value) else "a flag" if isinstance(value, bool) else "a text"
            first, said = kinds.setdefault(name, (slot, kind))
            if said != kind:
                return f"metric {name!r} is {said} on worker {first}, and {kind} on worker {slot}"
    return None
