"""Raw data of the benchmarks: reading it, and what a page shows of it."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "results"


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What a page shows of its raw data."""

    figure: Any
    """A ``matplotlib.figure.Figure``."""

    rows: Sequence[dict[str, str]]
    """The table; the keys of the first row are its columns."""

    sources: Sequence[str]
    """The files that it is made of, below ``experiments/results``."""

    caption: str
    """What the plot shows, in a sentence."""


def read(source: str) -> dict[str, Any]:
    """One result of a benchmark."""
    result: dict[str, Any] = json.loads((RESULTS / source).read_text())
    return result


def read_rows(source: str) -> list[dict[str, str]]:
    """The rows of a CSV file."""
    with (RESULTS / source).open(newline="") as file:
        return list(csv.DictReader(file))


def date_of(source: str) -> str:
    """The day on which a result was measured: its folder begins with it."""
    return source[:10]


def interval(values: dict[str, float], digits: int = 2) -> str:
    """``0.81 (0.64 to 0.88)``."""
    return f"{values['fraction']:.{digits}f} ({values['low']:.{digits}f} to {values['high']:.{digits}f})"
