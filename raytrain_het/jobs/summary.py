"""The end of a run: the JSON object of ``--json``, and the final tables."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table

from raytrain_het.jobs.lines import Sentence
from raytrain_het.ray_train.narration import number

RUN_KEYS = (
    "name",
    "run_folder",
    "checkpoint",
    "num_checkpoints_failed",
    "resumed_from",
    "metrics",
    "steps",
    "samples",
    "throughput_samples_per_s",
    "effective_batch_size",
    "clipped_share",
    "fraction_of_aggregate",
    "samples_per_s",
    "predicted_samples_per_s",
    "workers",
)
MEASURED_STEPS = 30
"""After fewer steps than this, the workers' own speeds are hardly known, and not compared."""
WORKER_KEYS = (
    "world_rank",
    "device",
    "node_ip",
    "batch_share",
    "score",
    "lr_scale",
    "solo_samples_per_s",
    "compute_s",
    "wait_s",
    "bytes_sent",
    "bytes_received",
    "codec",
)


def to_json(summary: Mapping[str, Any]) -> str:
    """One line of JSON with exactly ``RUN_KEYS``, and ``WORKER_KEYS`` for each worker.

    NaN and infinity become null: JSON has neither, and many readers refuse them.
    """
    run = {key: summary.get(key) for key in RUN_KEYS}
    run["workers"] = [{key: worker.get(key) for key in WORKER_KEYS} for worker in summary["workers"]]
    return json.dumps(jsonable(run), allow_nan=False)


def jsonable(value: Any) -> Any:
    """``value`` as JSON can hold it; numpy's and torch's scalars as plain numbers."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [jsonable(inner) for inner in value]
    if not isinstance(value, (str, bool, int, float)) and hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, (str, bool, int, float)) else str(value)


def final_tables(summary: Mapping[str, Any], folder: str) -> RenderableType:
    """The table of workers, the metrics, and where the run's files are."""
    metrics = Table(
        "metric",
        "value",
        title="Last report",
        title_justify="left",
        box=box.SIMPLE,
        pad_edge=False,
        collapse_padding=True,
    )
    for name, value in summary["metrics"].items():
        metrics.add_row(name, number(value))
    totals = (
        f"{summary['steps']} steps, {summary['samples']} samples, "
        f"{number(summary['throughput_samples_per_s'])} samples/s"
    )
    effective = summary.get("effective_batch_size")
    if effective is not None:
        totals += f"; effective batch size {number(round(effective))}"
    if summary.get("clipped_share"):
        totals += f"; gradients were clipped in {100 * summary['clipped_share']:.3g} % of the steps"
    fraction = summary.get("fraction_of_aggregate")
    if fraction is not None and len(summary["workers"]) > 1 and summary.get("steps_now", 0) >= MEASURED_STEPS:
        totals += f"; together {100 * fraction:.0f} % of the sum of their solo speeds"
        together, predicted = summary.get("samples_per_s"), summary.get("predicted_samples_per_s")
        if together and predicted:
            totals += f", at last {number(together)} samples/s ({number(predicted)} were predicted)"
    return Group(
        worker_table(summary["workers"]),
        "",
        metrics,
        *map(Sentence, (totals, checkpoint_line(summary), f"run folder: {folder}")),
    )


def checkpoint_line(summary: Mapping[str, Any]) -> str:
    """Where the last checkpoint is, and how many are missing."""
    last, failed = summary.get("checkpoint"), summary.get("num_checkpoints_failed", 0)
    if failed:
        which = f"the last one stored is {last}" if last else "the run has none"
        return f"{failed} of {summary['num_checkpoints']} checkpoints could not be written; {which}"
    return f"last checkpoint: {last}" if last else "the run has no checkpoint"


def worker_table(workers: Iterable[Mapping[str, Any]]) -> Table:
    """A row per worker, by world rank."""
    # Fits in 80 columns, since a live table cannot be scrolled sideways; a long address gives way if it must.
    table = Table(title="Workers", title_justify="left", box=box.SIMPLE, show_edge=False, padding=0)
    names = ("worker", "device", "node", "score", "share", "lr\nscale", "compute\ns", "wait\ns", "sent", "received")
    for name in names:
        side: Literal["left", "right"] = "left" if name in ("device", "node") else "right"
        table.add_column(name, justify=side, no_wrap=name != "node", overflow="fold")
    for worker in sorted(workers, key=lambda w: w["world_rank"]):
        table.add_row(
            str(worker["world_rank"]),
            *(_known(worker.get(key)) for key in ("device", "node_ip")),
            _known(worker.get("score"), "{:.2f}".format),
            _known(worker.get("batch_share")),
            _known(worker.get("lr_scale"), "{:.2f}".format),
            *(_known(worker.get(key), "{:.1f}".format) for key in ("compute_s", "wait_s")),
            *(_known(worker.get(key), size) for key in ("bytes_sent", "bytes_received")),
        )
    return table


def _known(value: Any, form: Callable[[Any], str] = str) -> str:
    """A value, or ``-``: a worker that has just joined has not reported all of its values."""
    return "-" if value is None else form(value)


def size(num_bytes: float) -> str:
    """Bytes for reading, in powers of 1024."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024 or unit == "GiB":
            break
        num_bytes /= 1024
    return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
