"""Unequal workers: what they do together, how shares follow a change, what is predicted."""

from __future__ import annotations

import statistics
from typing import Any

from experiments.docs_plots.raw import Shown, date_of, interval, read
from experiments.docs_plots.svg import BOUND, DDP, ORACLE, OURS, dots, panels

_FLEETS = [
    "2026-11-21_parts/mixed_fleet_1024_2.json",
    "2026-11-21_parts/mixed_fleet_1024.json",
    "2026-11-22_fleet/mixed_fleet_1024.json",
    "2026-11-22_fleet/mixed_fleet_ray.json",
    "2026-11-21_parts/mixed_fleet_4096.json",
    "2026-11-21_tcp/mixed_fleet_4096_2.json",
    "2026-11-22_fleet/mixed_fleet_4096.json",
    "2026-11-21_tcp/mixed_fleet_8to1.json",
]
_SIDES = {
    "ddp": ("DDP, equal batches", DDP),
    "static": ("DDP, oracle shares", ORACLE),
    "het": ("raytrain_het", OURS),
    "bound": ("bound", BOUND),
}


def unequal_workers() -> Shown:
    """The fraction of the sum of solo speeds, by side and run."""
    results = [read(source) for source in _FLEETS]
    figure, (panel,) = panels(height=3.6)
    for k, (side, (label, colour)) in enumerate(_SIDES.items()):
        at = [(place + 0.18 * (k - 1.5), result[side]) for place, result in enumerate(results) if side in result]
        middle = [x["fraction"] for _, x in at]
        below = [max(0.0, x["fraction"] - x["low"]) for _, x in at]
        above = [max(0.0, x["high"] - x["fraction"]) for _, x in at]
        panel.errorbar(middle, [y for y, _ in at], xerr=[below, above], fmt="o", color=colour, label=label)
    names = [_fleet_name(source, result) for source, result in zip(_FLEETS, results, strict=True)]
    panel.set_yticks(range(len(results)), names)
    panel.invert_yaxis()
    panel.set_xlim(0, 1.1)
    panel.set_xlabel("fraction of the sum of solo speeds")
    figure.legend(loc="outside upper center", ncols=4)
    rows = [
        {
            "cores": ", ".join(f"{c:g}" for c in result["cores"]),
            "global batch": str(result["global_batch"]),
            "DDP": f"{result['ddp']['fraction']:.2f}",
            "DDP, oracle shares": f"{result['static']['fraction']:.2f}",
            "raytrain_het (95 % interval)": interval(result["het"]),
            "times DDP": _times(result, "ddp"),
            "times oracle": _times(result, "static"),
            "bound": f"{result['bound']['fraction']:.2f}" if "bound" in result else "",
            "raw data": f"`{source}`",
        }
        for source, result in zip(_FLEETS, results, strict=True)
    ]
    caption = "Medians over rounds and their 95 % intervals; 1 is what all workers do alone, added up."
    return Shown(figure=figure, rows=rows, sources=_FLEETS, caption=caption)


def _times(result: dict[str, Any], side: str) -> str:
    """The median over rounds of the ratio within a round, where a round has both sides."""
    within = result.get(f"het against {side}")
    return f"{within or result['het']['fraction'] / result[side]['fraction']:.2f}"


def _fleet_name(source: str, result: dict[str, Any]) -> str:
    cores = ", ".join(f"{c:g}" for c in result["cores"])
    return f"{cores}\nbatch {result['global_batch']}{', Ray' if 'ray' in source else ''}"


def adapting() -> Shown:
    """Steps until all shares are near their new values, by run."""
    sources = [f"2026-11-21_{folder}/slow_down{n}.json" for folder in ("tcp", "parts") for n in ("", "_2")]
    results = [read(source)["results"] for source in sources]
    longest = 105
    figure, (panel,) = panels()
    for name, colour, missing in (("reached", BOUND, 0.0), ("steps", OURS, float(longest))):
        places, values = [], []
        for place, runs in enumerate(results):
            places += [place + (0.15 if name == "steps" else -0.15)] * len(runs)
            values += [missing if run[name] is None else float(run[name]) for run in runs]
        label = "for the first time" if name == "reached" else "to stay (at the top: not within the run)"
        dots(panel, places, values, color=colour, label=label)
    panel.set_xticks(range(len(sources)), [f"runs {letter}" for letter in "abcd"])
    panel.set_ylim(0, longest + 5)
    panel.set_ylabel("steps after the change")
    figure.legend(loc="outside upper center", ncols=2)
    rows = [
        {
            "runs": letter,
            "near for the first time after (steps)": ", ".join(str(run["reached"]) for run in runs),
            "near to stay after (steps)": ", ".join(
                "never" if run["steps"] is None else str(run["steps"]) for run in runs
            ),
            "raw data": f"`{source}`",
        }
        for letter, source, runs in zip("abcd", sources, results, strict=True)
    ]
    caption = "A dot is a run; near is within 10 % of the shares that the run ends with. Runs d are the newest code."
    return Shown(figure=figure, rows=rows, sources=sources, caption=caption)


def predictions() -> Shown:
    """Predicted throughput over measured throughput, by run."""
    sources = [f"2026-11-21_parts/predictions_{n}.json" for n in (1, 2, 3)] + ["2026-11-22_fleet/predictions.json"]
    runs = [(source, row) for source in sources for row in read(source)["rows"]]
    figure, (panel,) = panels()
    for k, (name, colour) in enumerate((("before", ORACLE), ("after", OURS))):
        label = "before the first step" if name == "before" else "after some 20 steps"
        values = [row[name] / row["measured"] for _, row in runs]
        dots(panel, [place + 0.2 * (k - 0.5) for place in range(len(runs))], values, color=colour, label=label)
    panel.axhline(1, color=DDP, linewidth=1)
    panel.set_xticks(range(len(runs)), [str(place + 1) for place in range(len(runs))])
    panel.set_xlabel("run")
    panel.set_ylabel("predicted / measured")
    figure.legend(loc="outside upper center", ncols=2)
    rows = [
        {
            "run": str(place + 1),
            "date": date_of(source),
            "predicted before (samples/s)": f"{row['before']:,.0f}",
            "predicted after some 20 steps": f"{row['after']:,.0f}",
            "measured": f"{row['measured']:,.0f}",
            "before / measured": f"{row['before'] / row['measured']:.2f}",
            "after / measured": f"{row['after'] / row['measured']:.2f}",
            "raw data": f"`{source}`",
        }
        for place, (source, row) in enumerate(runs)
    ]
    off = {name: [100 * abs(row[name] / row["measured"] - 1) for _, row in runs] for name in ("before", "after")}
    summary = dict.fromkeys(rows[0], "") | {
        "run": "off by",
        "before / measured": _off(off["before"]),
        "after / measured": f"{_off(off['after'][5:])} (runs 6 to 11)",
    }
    rows.append(summary)
    caption = "1 is a prediction that came true."
    return Shown(figure=figure, rows=rows, sources=sources, caption=caption)


def _off(percent: list[float]) -> str:
    return f"{statistics.median(percent):.1f} % (median), {max(percent):.0f} % at most"
