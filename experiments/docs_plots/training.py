"""What training comes out as: against one process, and with other values of alpha."""

from __future__ import annotations

import statistics

from experiments.docs_plots.raw import Shown, date_of, read, read_rows
from experiments.docs_plots.svg import BAD, BOUND, DDP, ORACLE, OURS, dots, panels


def one_process() -> Shown:
    """What became of generated programs, by run of 500."""
    folders = ("2026-11-30_never_silently_wrong", "2026-11-30_exchange")
    sources = [f"{folder}/programs_{seed}.json" for folder in folders for seed in (1, 2, 3)]
    results = [read(source)["kinds"] for source in sources]
    kinds = {
        "equal": ("equal to one process", OURS),
        "refused": ("refused by name", BOUND),
        "late": ("named a step late", ORACLE),
        "wrong": ("wrong", BAD),
        "misnamed": ("refused, wrong name", DDP),
    }
    figure, (panel,) = panels()
    left = [0] * len(results)
    for kind, (label, colour) in kinds.items():
        counts = [result.get(kind, 0) for result in results]
        panel.barh(range(len(results)), counts, left=left, color=colour, label=label)
        left = [a + b for a, b in zip(left, counts, strict=True)]
    names = [f"{source.split('/')[0][11:]}, seed {source[-6]}" for source in sources]
    panel.set_yticks(range(len(sources)), names, fontsize=8)
    panel.invert_yaxis()
    panel.set_xlabel("programs")
    figure.legend(loc="outside upper center", ncols=3)
    rows = [
        {"date": date_of(source), "seed": source[-6]}
        | {label: str(result.get(kind, 0)) for kind, (label, _) in kinds.items()}
        | {"raw data": f"`{source}`"}
        for source, result in zip(sources, results, strict=True)
    ]
    caption = "500 generated programs a run. The lower three are the newer code."
    return Shown(figure=figure, rows=rows, sources=sources, caption=caption)


def alpha() -> Shown:
    """Held-out accuracy by alpha: one seed with three schedules, and three seeds of the best settings."""
    sources = ["2026-11-22_alpha_digits_dense/trials.csv", "2026-11-22_alpha_digits_dense/finalists/trials.csv"]
    first, finalists = (read_rows(source) for source in sources)
    figure, (left, right) = panels(2, sharey=True)
    schedules = {"null": ("constant", OURS), "linear": ("linear", BOUND), "cosine": ("cosine", ORACLE)}
    for schedule, (label, colour) in schedules.items():
        trials = [row for row in first if row["schedule"] == schedule]
        values = [100 * float(row["value"]) for row in trials]
        dots(left, [float(row["alpha"]) for row in trials], values, color=colour, label=label)
    left.set_title("one seed, three schedules")
    left.legend(fontsize="small")
    dots(
        right, [float(row["alpha"]) for row in finalists], [100 * float(row["value"]) for row in finalists], color=OURS
    )
    right.set_title("three other seeds, constant rate")
    left.set_ylabel("held-out accuracy (%)")
    for panel in (left, right):
        panel.set_xlabel("alpha")
        panel.set_xticks([-0.5, 0, 0.5, 1])
        panel.set_xlim(-0.7, 1.2)
    rows = []
    for value in sorted({row["alpha"] for row in finalists}, key=float):
        accuracies = [100 * float(row["value"]) for row in finalists if row["alpha"] == value]
        rows.append(
            {
                "alpha": f"{float(value):g}",
                "accuracy of each seed (%)": ", ".join(f"{a:.2f}" for a in sorted(accuracies)),
                "mean (%)": f"{statistics.mean(accuracies):.2f}",
                "deviation": f"{statistics.stdev(accuracies):.2f}",
                "raw data": f"`{sources[1]}`",
            }
        )
    caption = "A dot is a run of 120 steps with four workers at 4:2:1:1."
    return Shown(figure=figure, rows=rows, sources=sources, caption=caption)
