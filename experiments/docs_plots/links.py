"""Compression: step time behind slow links, and what it costs in quality."""

from __future__ import annotations

from typing import Any

from experiments.docs_plots.raw import Shown, read
from experiments.docs_plots.svg import BOUND, DDP, OURS, dots, panels

_LINKS = {
    "2026-11-22_hierarchy/20_4.json": "20 Mbit/s",
    "2026-11-22_links/100_6.json": "100 Mbit/s",
    "2026-11-22_hierarchy/100_4.json": "100 Mbit/s, again",
    "2026-11-22_hierarchy/1000_4.json": "1000 Mbit/s",
    "2026-11-22_hierarchy/mixed.json": "one worker 20, three 1000 Mbit/s",
    "2026-11-22_links/unshaped.json": "unshaped",
}
_NAMES = {"ddp": "DDP", "ddp bf16": "DDP, bf16 hook", "ddp powersgd": "DDP, PowerSGD hook", "auto": "auto"}


def slow_links() -> Shown:
    """Milliseconds a step with stock DDP, with each codec and with what ``auto`` chose."""
    results = {source: read(source) for source in _LINKS}
    shown = ["2026-11-22_hierarchy/20_4.json", "2026-11-22_links/100_6.json", "2026-11-22_links/unshaped.json"]
    figure, three = panels(3, height=3.4, sharex=True)
    for panel, source in zip(three, shown, strict=True):
        sides = {name: side for name, side in results[source]["sides"].items() if name != "compute"}
        colours = [DDP if name.startswith("ddp") else OURS if name == "auto" else BOUND for name in sides]
        panel.barh(range(len(sides)), [side["step_ms"] for side in sides.values()], color=colours)
        panel.set_yticks(range(len(sides)), [_short(name) for name in sides], fontsize=7)
        panel.invert_yaxis()
        panel.set_xscale("log")
        panel.set_xlim(40, 20_000)
        panel.set_xticks([100, 10_000], ["100", "10,000"])
        panel.set_title(_LINKS[source])
        panel.set_xlabel("ms a step")
    rows = [
        {
            "links": name,
            "DDP (ms)": _ms(results[source], "ddp"),
            "its bf16 hook": _ms(results[source], "ddp bf16"),
            "its PowerSGD hook": _ms(results[source], "ddp powersgd"),
            "`auto` (ms)": _ms(results[source], "auto"),
            "it chose": f"`{results[source]['chosen'][0]}`",
            "best codec, fixed": _best(results[source]),
            "MiB a step, DDP and `auto`": f"{results[source]['sides']['ddp']['mib']:.1f}, "
            f"{results[source]['sides']['auto']['mib']:.2f}",
            "raw data": f"`{source}`",
        }
        for source, name in _LINKS.items()
    ]
    caption = "Grey: stock DDP. Green: what `auto` chose. Blue: codecs set by hand. All axes are the same, logarithmic."
    return Shown(figure=figure, rows=rows, sources=list(_LINKS), caption=caption)


def _short(name: str) -> str:
    return _NAMES.get(name, name.replace("(error_feedback=true)", "").replace("density=", "").replace("rank=", ""))


def _ms(result: dict[str, Any], side: str) -> str:
    return f"{result['sides'][side]['step_ms']:,.0f}"


def _best(result: dict[str, Any]) -> str:
    ours = {k: v for k, v in result["sides"].items() if k not in _NAMES and k != "compute"}
    best = min(ours, key=lambda name: ours[name]["step_ms"])
    return f"`{best}` {ours[best]['step_ms']:,.0f}"


def quality() -> Shown:
    """The held-out metric with each codec less that without, seed by seed."""
    sources = {"2026-11-22_links/digits.json": "digits, accuracy (points)"}
    sources["2026-11-22_links/char_lm.json"] = "characters, bits (less is better)"
    figure, both = panels(2)
    table = []
    for panel, (source, title) in zip(both, sources.items(), strict=True):
        result = read(source)
        codecs = [name for name in result["runs"] if name != "none"]
        for place, codec in enumerate(codecs):
            plain = result["runs"]["none"]
            differences = [a["value"] - b["value"] for a, b in zip(result["runs"][codec], plain, strict=True)]
            dots(panel, [place] * len(differences), [round(d, 6) for d in differences], color=OURS)
        panel.axhline(0, color=DDP, linewidth=1)
        panel.set_xticks(range(len(codecs)), [_short(name) for name in codecs], rotation=20, fontsize=8)
        panel.set_title(title)
        table += [
            {
                "job": result["job"],
                "codec": f"`{row['codec']}`",
                "mean of three seeds": f"{row['mean']:.4g}",
                "against `none`": f"{row['against none']:+.3f}",
                "least and most": f"{row['least']:+.3f}, {row['most']:+.3f}",
                "steps": str(row["steps"]),
                "raw data": f"`{source}`",
            }
            for row in result["rows"]
        ]
    both[0].set_ylabel("difference to no compression")
    caption = "A dot is a seed; equal dots stand beside each other."
    return Shown(figure=figure, rows=table, sources=list(sources), caption=caption)
