"""Two pictures of a sweep: what was found by each setting, and the metric by epoch.

python -m experiments.sweeps.figures sweeps/mine --out experiments/results/mine
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from raytrain_het.jobs.schedules import save
from raytrain_het.sweeps import Results, read_results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the sweep")
    parser.add_argument("--out", type=Path, help="where the pictures go (default: the sweep's folder)")
    arguments = parser.parse_args()
    results = read_results(arguments.folder)
    out = arguments.out or arguments.folder
    for name, draw in (("by_setting", by_setting), ("by_epoch", by_epoch)):
        save(draw(results), str(out / f"{name}.png"))
        print(out / f"{name}.png")


def by_setting(results: Results) -> Any:
    """A panel for each setting: the value of every trial, and the mean by what the setting was."""
    figure, panels = panels_of(results)
    table = results.trials[results.trials["status"] == "complete"]
    for panel, dimension in zip(panels, results.sweep.dimensions, strict=True):
        if not dimension.is_finite:
            panel.plot(table[dimension.path], table["value"], "o", alpha=0.5)
        for place, choice in enumerate(dimension.choices):
            values = table["value"][table[dimension.path] == choice]
            panel.plot([place] * len(values), values, "o", alpha=0.5, color="C0")
            panel.plot(place, values.mean(), "_", markersize=24, color="black")
        if dimension.is_finite:
            panel.set_xticks(range(len(dimension.choices)), map(str, dimension.choices))
            panel.set_xlim(-0.5, len(dimension.choices) - 0.5)
        panel.set_xlabel(dimension.path)
        panel.tick_params(axis="x", labelrotation=20)
    panels[0].set_ylabel(results.sweep.objective.name)
    return figure


def by_epoch(results: Results) -> Any:
    """A panel for each setting: the metric of every trial by epoch, coloured by what the setting was."""
    figure, panels = panels_of(results)
    metric = results.sweep.objective.metric
    for panel, dimension in zip(panels, results.sweep.dimensions, strict=True):
        values = list(results.trials[dimension.path].drop_duplicates().sort_values())
        shades = {value: f"C{k}" for k, value in enumerate(values)}
        for row in results.trials.to_dict("records"):
            epochs = results.epochs[results.epochs["trial"] == row["trial"]]
            panel.plot(epochs["epoch"], epochs[metric], color=shades[row[dimension.path]], alpha=0.6)
        for value, shade in shades.items():
            panel.plot([], [], color=shade, label=str(value))
        panel.legend(title=dimension.path, fontsize="small")
        panel.set_xlabel("epoch")
    panels[0].set_ylabel(metric)
    return figure


def panels_of(results: Results) -> tuple[Any, list[Any]]:
    """A figure with a panel for each setting that was varied."""
    from matplotlib.figure import Figure

    count = len(results.sweep.dimensions)
    figure = Figure(figsize=(4 * count, 4), layout="constrained")
    return figure, list(figure.subplots(1, count, sharey=True, squeeze=False)[0])


if __name__ == "__main__":
    main()
