"""``raytrain-het schedule``: what decay schedules do to a learning rate, as a table or a picture."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from rich import box
from rich.table import Table

from raytrain_het.errors import ConfigError
from raytrain_het.jobs.lines import print_tables
from raytrain_het.jobs.validation import yaml_text
from raytrain_het.optim import SCHEDULES, Schedule, schedule_of
from raytrain_het.ray_train.narration import number

POINTS_PER_EPOCH = 50
PICTURES = (".png", ".pdf", ".svg", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".eps", ".ps", ".pgf", ".gif")
_BAR = 30


def parse(texts: Sequence[str]) -> dict[str, Schedule]:
    """The schedules that the command line names, ``cosine`` or ``{cosine: {floor: 0.01}}``, by what was written.
    Without any name, all schedules.

    Raises:
        ConfigError: A text is not a schedule.
    """
    found = {}
    for text in texts or list(SCHEDULES):
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            value = text
        found[text if isinstance(value, str) else yaml_text(value)] = schedule_of(value)
    return found


def rates(schedule: Schedule, *, epochs: int, lr: float, per_epoch: int = 1) -> list[tuple[float, float]]:
    """Pairs (epochs done, learning rate) at the beginning of each part of an epoch, and at the end.

    Args:
        schedule: The schedule.
        epochs: Of the run.
        lr: The rate before the schedule.
        per_epoch: So many points in an epoch.

    Raises:
        ConfigError: The warm-up is as long as the run.
    """
    schedule.check_run(epochs)
    return [(k / per_epoch, lr * schedule.factor(k / per_epoch, epochs)) for k in range(epochs * per_epoch + 1)]


def print_rates(schedules: dict[str, Schedule], *, epochs: int, lr: float, as_json: bool) -> None:
    """Print the rates of schedules, a line for each epoch."""
    columns = {name: rates(schedule, epochs=epochs, lr=lr) for name, schedule in schedules.items()}
    if as_json:
        print(json.dumps({"epochs": epochs, "lr": lr, "rates": {k: [r for _, r in v] for k, v in columns.items()}}))
        return
    table = Table(box=box.SIMPLE, pad_edge=False)
    table.add_column("epochs\ndone", justify="right")
    for name in columns:
        table.add_column(name.replace(": {", ":\n{"), justify="right")
    alone = next(iter(columns.values())) if len(columns) == 1 else None
    highest = max((rate for _, rate in alone), default=0.0) if alone else 0.0
    if alone:
        table.add_column("")
    for k in range(epochs + 1):
        row = [str(k), *(number(column[k][1]) for column in columns.values())]
        if alone:
            row.append("█" * round(_BAR * alone[k][1] / highest) if highest else "")
        table.add_row(*row)
    print_tables(table, sys.stdout)


def draw(schedules: dict[str, Schedule], *, epochs: int, lr: float, out: str) -> None:
    """Save a picture of schedules. Its format follows from the file's name.

    Raises:
        ConfigError: matplotlib is not installed, or the file cannot be written.
    """
    check_picture(out)
    curves = {
        name: rates(schedule, epochs=epochs, lr=lr, per_epoch=POINTS_PER_EPOCH) for name, schedule in schedules.items()
    }
    figure, axes = new_figure()
    for name, points in curves.items():
        axes.plot(*zip(*points, strict=True), label=name)
    axes.set(xlabel="epochs done", ylabel="learning rate", xlim=(0, epochs), ylim=(0, None))
    axes.legend()
    save(figure, out)


def check_picture(out: str) -> None:
    """Refuse a file name that is not a picture's, before matplotlib is loaded.

    Raises:
        ConfigError: The name has another ending, or its folder does not exist.
    """
    if Path(out).suffix not in PICTURES:
        raise ConfigError(f"--out {out}: allowed is a name that ends with {', '.join(PICTURES)}. Write --out x.png")
    if not Path(out).absolute().parent.is_dir():
        raise ConfigError(f"--out {out}: there is no folder {Path(out).absolute().parent}. Write --out x.png")


def new_figure(**options: Any) -> tuple[Any, Any]:
    """matplotlib's figure and axes, without a window.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError(
            "a picture needs matplotlib, which is not installed. Write: python -m pip install 'raytrain-het[sweeps]'"
        ) from None
    figure = Figure(layout="constrained", **options)
    return figure, figure.subplots()


def save(figure: Any, out: str) -> None:
    """Write a figure.

    Raises:
        ConfigError: matplotlib cannot draw this format, or the file cannot be written.
    """
    kinds = figure.canvas.get_supported_filetypes()
    kind = Path(out).suffix.removeprefix(".")
    if kind not in kinds:
        raise ConfigError(
            f"--out {out}: allowed is a name that ends with .{', .'.join(sorted(kinds))}. Write --out x.png"
        )
    try:
        figure.savefig(out, dpi=150)
    except OSError as error:
        raise ConfigError(f"--out {out}: it cannot be written ({error.strerror}). Write --out x.png") from None
