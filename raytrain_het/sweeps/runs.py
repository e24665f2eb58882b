"""A trial's run folder, which is the truth about it: its reports as rows, and how it ended."""

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
    """The name of the run with these settings, by path as written: the same for the same."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]


class Rows:
    """Reports as rows: the job's metrics, and what it took to get there, added up from report to report.

    ``epoch``: those that are done; ``step``; ``seconds`` in training, without the start of workers; ``samples``;
    ``bytes_sent`` by all workers; ``samples_per_s`` and ``clipped_share`` since the report before; ``lr_now``, the rate
    of the last step; ``fraction_of_aggregate``, what all do together over the sum of what each would do by itself.
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
    """What ``metrics.jsonl`` holds. A line that a killed process has not finished counts for nothing."""
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
    """A process that is killed may have stored a checkpoint and not written the line of its report: that comes from the
    checkpoint then, without what it took."""
    last = last_checkpoint_of(str(folder.parent), folder.name)
    if last is not None and last.epoch > max((report["epoch"] + 1 for report in reports), default=0):
        line = {"step": last.step, "epoch": last.epoch - 1, "metrics": last.metrics, "checkpoint": last.path}
        reports.append(line)
        append_lines(folder / "metrics.jsonl", json.dumps(line) + "\n")


def rows_of(reports: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for each epoch. One that was trained again, after a checkpoint that was not stored, counts as it came out
    last; what the first time took stays in the sums."""
    rows, by_epoch = Rows(), dict[int, dict[str, Any]]()
    for report in reports:
        row = rows.add(report)
        by_epoch = {epoch: r for epoch, r in by_epoch.items() if epoch < row["epoch"]}
        by_epoch[row["epoch"]] = row
    return list(by_epoch.values())


def read_outcome(folder: Path) -> dict[str, Any]:
    """How a run ended: its ``status`` (complete, pruned or failed), and the ``error``. Nothing while it has not."""
    try:
        outcome = json.loads((folder / OUTCOME).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return outcome if isinstance(outcome, dict) else {}


def write_outcome(folder: Path, **outcome: Any) -> None:
    """See :func:`read_outcome`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / OUTCOME, json.dumps(outcome) + "\n")
