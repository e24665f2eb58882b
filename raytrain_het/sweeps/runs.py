"""A trial's run folder, the source of truth on a trial: its reports as rows, and how it ended."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from raytrain_het.files import write_whole
from raytrain_het.ray_train.run_folder import append_lines, last_checkpoint_of

OUTCOME = "outcome.json"


def run_name(settings: Mapping[str, Any]) -> str:
    """The name of the run with these settings, by path as written. The same settings give the same name."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]


class Rows:
    """Reports as rows: the job's metrics, and what it took to get there, added up from report to report.

    A row has ``epoch`` (epochs done), ``step``, ``seconds`` of training without the start of workers, ``samples``,
    ``bytes_sent`` by all workers, ``samples_per_s`` and ``clipped_share`` since the report before, ``lr_now`` (the rate
    of the last step), and ``fraction_of_aggregate`` (the speed of all workers over the sum of their own speeds).
    """

    def __init__(self) -> None:
        self._sums = {"seconds": 0.0, "samples": 0, "bytes_sent": 0}

    def add(self, report: Mapping[str, Any]) -> dict[str, Any]:
        """The row of the next report."""
        since = report.get("since_last") or {}
        for name in self._sums:
            self._sums[name] += since.get(name, 0)
        steps, seconds = since.get("steps", 0), since.get("seconds", 0.0)
        return {
            **report.get("metrics", {}),
            "epoch": report["epoch"] + 1,
            "step": report["step"],
            **self._sums,
            "samples_per_s": since["samples"] / seconds if seconds else None,
            "clipped_share": min(1.0, since["clipped_steps"] / steps) if steps else None,
            "lr_now": report.get("lr"),
            "fraction_of_aggregate": report.get("fraction_of_aggregate"),
        }


def read_reports(folder: Path) -> list[dict[str, Any]]:
    """The reports in ``metrics.jsonl``. A line that a killed process has not finished is left out."""
    try:
        lines = (folder / "metrics.jsonl").read_text("utf-8").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def add_lost_report(folder: Path, reports: list[dict[str, Any]]) -> None:
    """Add the report of a checkpoint whose line a killed process has not written. It is without times and bytes."""
    last = last_checkpoint_of(str(folder.parent), folder.name)
    if last is not None and last.epoch > max((report["epoch"] + 1 for report in reports), default=0):
        line = {"step": last.step, "epoch": last.epoch - 1, "metrics": last.metrics, "checkpoint": last.path}
        reports.append(line)
        append_lines(folder / "metrics.jsonl", json.dumps(line) + "\n")


def rows_of(reports: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for each epoch.

    An epoch may have been trained twice, if its checkpoint was not stored. Its second row counts; the sums hold the
    time and the bytes of both.
    """
    rows, by_epoch = Rows(), dict[int, dict[str, Any]]()
    for report in reports:
        row = rows.add(report)
        by_epoch = {epoch: r for epoch, r in by_epoch.items() if epoch < row["epoch"]}
        by_epoch[row["epoch"]] = row
    return list(by_epoch.values())


def read_outcome(folder: Path) -> dict[str, Any]:
    """How a run ended: its ``status`` (complete, pruned or failed), and the ``error``. Empty while it has not ended."""
    try:
        outcome = json.loads((folder / OUTCOME).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return outcome if isinstance(outcome, dict) else {}


def write_outcome(folder: Path, **outcome: Any) -> None:
    """Write what :func:`read_outcome` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / OUTCOME, json.dumps(outcome) + "\n")
