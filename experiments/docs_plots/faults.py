"""Faults: how long others wait, whether anything is lost, whether anything leaks."""

from __future__ import annotations

import statistics
import textwrap
from typing import Any

from experiments.docs_plots.raw import Shown, date_of, read
from experiments.docs_plots.svg import BAD, BOUND, DDP, ORACLE, OURS, dots, panels

_POINTS = ("slice", "backward", "between_buckets", "decoded", "updated", "report")
_RUNS = {
    "2026-11-21_engine": "2026-11-21, gloo",
    "2026-11-21_tcp": "2026-11-21, connections of our own",
    "2026-11-30_never_silently_wrong": "2026-11-30, busy machine",
}


def recovery() -> Shown:
    """Seconds from a fault until all others have begun the step again, by the point at which it happened."""
    kills = ["2026-11-21_engine/recovery_kill.json", "2026-11-21_tcp/recovery_kill_2.json"]
    kills += ["2026-11-30_never_silently_wrong/recovery_kill.json"]
    stops = ["2026-11-21_engine/recovery_stop.json", "2026-11-21_tcp/recovery_stop_2.json"]
    figure, both = panels(2)
    for panel, sources, title in zip(both, (kills, stops), ("killed (kill -9)", "stopped (SIGSTOP)"), strict=True):
        for k, (source, colour) in enumerate(zip(sources, (DDP, OURS, ORACLE), strict=False)):
            faults = read(source)["faults"]
            places = [_POINTS.index(fault["point"]) + 0.22 * (k - 1) for fault in faults]
            dots(
                panel,
                places,
                [fault["recovery_s"] for fault in faults],
                color=colour,
                label=_RUNS[source.split("/")[0]],
            )
        panel.set_title(title)
        panel.set_xticks(range(len(_POINTS)), [point.replace("_", "\n") for point in _POINTS], fontsize=7)
        panel.set_ylim(0, None)
    figure.legend(*both[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    both[0].set_ylabel("seconds until the others continue")
    rows = []
    for source in kills + stops:
        seconds = [fault["recovery_s"] for fault in read(source)["faults"]]
        rows.append(
            {
                "fault": read(source)["kind"],
                "date": date_of(source),
                "faults": str(len(seconds)),
                "median (s)": f"{statistics.median(seconds):.3f}",
                "largest (s)": f"{max(seconds):.3f}",
                "raw data": f"`{source}`",
            }
        )
    caption = "A dot is a fault; points are places of a step, from its opening to a report."
    return Shown(figure=figure, rows=rows, sources=kills + stops, caption=caption)


def faults() -> Shown:
    """Campaigns of scripted faults: what was lost, and how far parameters are from those of a run without faults."""
    sources = ["2026-11-21_engine/campaign_52.json"]
    folders = ("2026-11-21_tcp", "2026-11-21_parts", "2026-11-30_never_silently_wrong")
    sources += [f"{folder}/campaign_{seed}.json" for folder in folders for seed in (61, 62)]
    sources += [f"2026-12-01_headers/campaign_{seed}.json" for seed in (111, 112)]
    results = [read(source) for source in sources]
    names = [f"{date_of(source)[5:]}, seed {source.removesuffix('.json').rpartition('_')[2]}" for source in sources]
    figure, (left, right) = panels(2, sharey=True)
    done = [0] * len(results)
    known = {"kill": OURS, "leave": BOUND, "stop": ORACLE, "of the network, the hub, the machine": BAD}
    for kind, colour in known.items():
        counts = [
            sum(n for k, n in result["by_kind"].items() if k == kind or (k not in known and colour == BAD))
            for result in results
        ]
        left.barh(range(len(results)), counts, left=done, color=colour, label=kind)
        done = [a + b for a, b in zip(done, counts, strict=True)]
    left.set_xlabel("faults")
    left.set_yticks(range(len(results)), names)
    left.invert_yaxis()
    right.plot([result["worst_relative_error"] for result in results], range(len(results)), "o", color=OURS)
    right.axvline(2.2e-16, color=DDP, linewidth=1, label="a unit of fp64's last place")
    right.set_xscale("log")
    right.set_xlim(1e-16, 1e-14)
    right.set_xlabel("largest relative difference")
    figure.legend(loc="outside upper center", ncols=4)
    rows = [_campaign_row(source, result) for source, result in zip(sources, results, strict=True)]
    caption = "Left: what happened in each campaign. Right: parameters against the same run without faults, in fp64."
    return Shown(figure=figure, rows=rows, sources=sources, caption=caption)


def _campaign_row(source: str, result: dict[str, Any]) -> dict[str, str]:
    return {
        "date": date_of(source),
        "faults": str(result["faults"]),
        "steps": f"{result['steps']:,}",
        "samples lost or doubled": str(len(result["ledger_violations"])),
        "differing replicas": str(result["differing_replicas"]),
        "largest relative difference": f"{result['worst_relative_error']:.1e}",
        "largest recovery (s)": f"{result['recovery_s']['largest']:.2f}",
        "checkpoints lost": str(result["lost_checkpoints"]),
        "raw data": f"`{source}`",
    }


def false_alarms() -> Shown:
    """Failures after which everything lives: how often a worker was lost or suspended, and what that has cost."""
    source = "2026-12-01_suspended/false_alarms.json"
    results = read(source)
    places, names = range(len(results)), [textwrap.fill(name, 34) for name in results]
    figure, (left, right) = panels(2, sharey=True, height=4.2)
    for label, colour, shift in (("suspended", OURS, -0.2), ("lost", BAD, 0.2)):
        counts = [result[label] for result in results.values()]
        left.barh([place + shift for place in places], counts, height=0.35, color=colour, label=label)
    left.set_xlabel("workers")
    left.set_xlim(0, 2)
    left.set_xticks([0, 1, 2])
    left.set_yticks(places, names, fontsize=7)
    left.invert_yaxis()
    right.barh(places, [result["longest_s"] for result in results.values()], height=0.35, color=OURS)
    right.set_xlabel("longest suspension (s)")
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=2)
    rows = [
        {
            "failure": name,
            "lost": str(result["lost"]),
            "suspended": str(result["suspended"]),
            "longest suspension (s)": f"{result['longest_s']:.1f}",
            "begun again from a checkpoint": str(result["resets"]),
            "steps repeated": str(result["redone"]),
            "checkpoints lost": str(result["checkpoints_lost"]),
            "differing replicas": str(result["differing"]),
            "largest relative difference": f"{result['error']:.1e}",
            "raw data": f"`{source}`",
        }
        for name, result in results.items()
    ]
    caption = "A row is a run, the last one 80 runs. No worker was lost in any of them."
    return Shown(figure=figure, rows=rows, sources=[source], caption=caption)


def leaks() -> Shown:
    """Memory of the survivors and of the hub over a thousand kills and refills."""
    sources = ["2026-11-21_engine/churn.json", "2026-11-21_tcp/churn.json"]
    figure, both = panels(2, sharey=True)
    rows = []
    for panel, source in zip(both, sources, strict=True):
        result = read(source)
        for (name, course), colour in zip(result["course"].items(), (OURS, BOUND, ORACLE), strict=True):
            first = course[0]["rss_kib"]
            label = "hub" if name == "hub" else f"survivor {name[0]}"
            refills = [x["refills"] for x in course]
            panel.plot(refills, [(x["rss_kib"] - first) / 1024 for x in course], color=colour, label=label)
        panel.axhline(0, color=DDP, linewidth=1)
        panel.set_title("gloo" if "engine" in source else "connections of our own")
        panel.set_xlabel("kills and refills")
        panel.legend(fontsize="small")
        for process in result["processes"]:
            rows.append(
                {
                    "process": "hub" if process["process"] == "hub" else f"survivor {process['process'][0]}",
                    "threads": f"{process['threads']:g}, then {process['threads at the end']:g}",
                    "descriptors": f"{process['descriptors']:g}, then {process['descriptors at the end']:g}",
                    "KiB a refill": f"{process['KiB a refill']:g}",
                    "raw data": f"`{source}`",
                }
            )
    both[0].set_ylabel("memory since the start (MiB)")
    caption = "Resident memory of each process against its first value."
    return Shown(figure=figure, rows=rows, sources=sources, caption=caption)
