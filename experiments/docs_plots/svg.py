"""Figures for light and dark pages: SVG whose lines and words have the colour of the page's text."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

OURS, DDP, ORACLE, BOUND, BAD = "#009688", "#8c8c94", "#e08e0b", "#4a90d9", "#d9534f"
"""Colours of the sides that are compared: this package, torch's DDP, DDP with oracle shares, the bound, failures."""

_TEXT = "#010203"
"""What becomes the colour of the page's text."""

_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "raytrain_het",
    "font.size": 9,
    "text.color": _TEXT,
    "axes.edgecolor": _TEXT,
    "axes.labelcolor": _TEXT,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _TEXT,
    "grid.alpha": 0.15,
    "xtick.color": _TEXT,
    "ytick.color": _TEXT,
    "legend.frameon": False,
    "legend.fontsize": 8,
}


def drawing() -> AbstractContextManager[None]:
    """Within it figures are made, filled and written."""
    from matplotlib import rc_context

    style: AbstractContextManager[None] = rc_context(_STYLE)  # type: ignore[arg-type]  # Its keys are of one type.
    return style


def panels(columns: int = 1, *, height: float = 2.8, **options: Any) -> tuple[Any, Sequence[Any]]:
    """A figure of the docs' width, and its panels from left to right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, height), layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False, **options)[0])


def to_svg(figure: Any, label: str) -> str:
    """The figure as one line of HTML."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.S)
    svg = re.sub(r'^<svg[^>]*viewBox="([^"]*)"[^>]*>', rf'<svg viewBox="\1" role="img" aria-label="{label}">', svg)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    return " ".join(svg.replace(_TEXT, "currentColor").split())


def dots(panel: Any, places: Sequence[float], values: Sequence[float], **options: Any) -> None:
    """Values one by one, of which equal ones stand beside each other."""
    seen: dict[tuple[float, float], int] = {}
    shifted = []
    for place, value in zip(places, values, strict=True):
        count = seen[place, value] = seen.get((place, value), -1) + 1
        shifted.append(place + 0.06 * ((count + 1) // 2) * (-1) ** count)
    panel.plot(shifted, values, "o", **{"alpha": 0.6, "markersize": 5, "markeredgewidth": 0} | options)
