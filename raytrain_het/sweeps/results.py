"""The results of a sweep, as tables: a row for each trial, and a row for each epoch of each trial."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from raytrain_het.errors import ConfigError
from raytrain_het.files import write_whole
from raytrain_het.jobs.config import JobConfig
from raytrain_het.jobs.lines import COLUMNS, Sentence, fits
from raytrain_het.jobs.summary import jsonable, size
from raytrain_het.jobs.validation import yaml_text
from raytrain_het.ray_train.narration import number
from raytrain_het.sweeps.ledger import TrialEntry, last_line, read_ledger
from raytrain_het.sweeps.paths import flat
from raytrain_het.sweeps.runs import read_reports, rows_of
from raytrain_het.sweeps.sweep import Sweep
from raytrain_het.sweeps.sweep_file import load_sweep

SEED = "het.seed"
NUM_FINALISTS = 3
_LEAST_NEEDED = ("wall s", "sent")
"""Columns that are left out first, if the table is too wide."""
_COUNTS = ("epoch", "step", "samples", "bytes_sent")


@dataclass(frozen=True)
class Results:
    """The results of a sweep.

    Attributes:
        folder: The sweep's folder.
        sweep: The sweep.
        trials: A row for each trial, the best first, those without a value last. Columns: ``trial``, its number;
            ``status``, which is complete, pruned, failed or unfinished; ``value``, what the sweep looks for (empty if a
            target was not reached, which ``reached`` says); the settings that vary, by their paths; all settings of the
            job, as ``job.*``; from the last report the job's metrics, ``epoch`` (epochs done), ``step``, ``seconds`` of
            training, ``samples``, ``bytes_sent``, ``samples_per_s``, ``fraction_of_aggregate``, ``lr_now`` (of the last
            step) and ``clipped_share``; ``wall_s``, with the start of workers; ``run_folder``, below the sweep's; and
            ``error``.
        epochs: A row for each epoch of each trial, with ``trial`` and the figures of its report.
        finalists: The jobs of up to three complete trials, the best first, ready to run.
    """

    folder: Path
    sweep: Sweep
    trials: pd.DataFrame
    epochs: pd.DataFrame
    finalists: list[JobConfig]

    @property
    def best(self) -> JobConfig | None:
        """The best job; None if no complete trial has a value."""
        return self.finalists[0] if self.finalists else None

    @property
    def num_by_status(self) -> dict[str, int]:
        """How many trials are complete, pruned, failed, unfinished, and how many have not begun."""
        counts = {s: int((self.trials["status"] == s).sum()) for s in ("complete", "pruned", "failed", "unfinished")}
        return counts | {"not begun": max(0, self.sweep.num_trials - len(self.trials))}

    @property
    def is_finished(self) -> bool:
        """Whether there is nothing left to run."""
        counts = self.num_by_status
        return counts["unfinished"] == counts["not begun"] == 0

    def write(self) -> None:
        """Write ``trials`` and ``epochs`` as Parquet and CSV, and ``best.yaml``, ``best-2.yaml`` and ``best-3.yaml``,
        into the sweep's folder."""
        for place, job in enumerate(self.finalists, start=1):
            write_whole(self.folder / ("best.yaml" if place == 1 else f"best-{place}.yaml"), job.to_yaml())
        for name, table in (("trials", self.trials), ("epochs", self.epochs)):
            table.to_csv(self.folder / f"{name}.csv", index=False)
            table.to_parquet(self.folder / f"{name}.parquet", index=False)

    def to_json(self) -> str:
        """One line: counts, the best trial, and all trials' settings and values, best first."""
        paths = [d.path for d in self.sweep.dimensions]
        told = ["trial", "status", "value", *paths, "epoch", "seconds", "wall_s", "bytes_sent", "error"]
        trials = self.trials.assign(error=[last_line(e) if isinstance(e, str) else None for e in self.trials["error"]])
        rows = trials.reindex(columns=told).astype(object).where(lambda t: t.notna(), None).to_dict("records")
        best = rows[0] if self.best is not None else None
        return json.dumps(
            jsonable(
                {
                    "folder": str(self.folder),
                    "objective": self.sweep.objective.name,
                    "trials": rows,
                    "best": best,
                    "best_job": str(self.folder / "best.yaml") if best else None,
                    **self.num_by_status,
                }
            ),
            allow_nan=False,
        )

    def table(self, width: int = COLUMNS) -> RenderableType:
        """A table for people. Columns that do not fit are left out, and named below it.

        Args:
            width: The terminal's width, in characters.
        """
        figures = [*_others(self.sweep.objective.name, self), "epochs", "s", "wall s", "sent"]
        left_out: list[str] = []
        while not fits(table := self._table([f for f in figures if f not in left_out]), width):
            rest = [name for name in _LEAST_NEEDED if name in figures and name not in left_out] or [
                name for name in reversed(figures) if name not in left_out
            ]
            if not rest:
                break  # Settings and the value always stay, and may take several lines.
            left_out.append(rest[0])
        counts = ", ".join(f"{n} {status}" for status, n in self.num_by_status.items() if n)
        failed = self.trials[self.trials["status"] == "failed"]
        errors = [f"trial {n} failed: {last_line(e)}" for n, e in zip(failed["trial"], failed["error"], strict=True)]
        narrow = [f"not shown for want of room: {', '.join(left_out)}"] if left_out else []
        return Group(table, *map(Sentence, [*narrow, *errors, counts, *_by_seed(self)]))

    def _table(self, figures: Sequence[str]) -> Table:
        """The table with these figures, besides the settings and the value."""
        objective, paths = self.sweep.objective, [d.path for d in self.sweep.dimensions]
        table = Table(
            title=f"Trials, best first by {objective.name}",
            title_justify="left",
            box=box.SIMPLE,
            pad_edge=False,
            collapse_padding=True,
        )
        for name in ("trial", *paths, objective.name, *figures):
            table.add_column(name.replace(".", ".\n") if len(name) > 12 else name, justify="right", overflow="fold")
        table.add_column("")
        for row in self.trials.to_dict("records"):
            sent = row.get("bytes_sent")
            known = {
                "epochs": _said(row.get("epoch")),
                "s": _said(row.get("seconds")),
                "wall s": f"{row['wall_s']:.0f}",
                "sent": size(sent) if _known(sent) else "-",
            }
            cells = [
                str(row["trial"]),
                *(_said(row.get(path)) for path in paths),
                _said(row["value"]),
                *(known.get(name) or _said(row.get(name)) for name in figures),
                _remark(row),
            ]
            table.add_row(*map(Text, cells))
        return table


def read_results(folder: str | Path) -> Results:
    """Read the results of a sweep from its folder, also while it runs."""
    folder = Path(folder)
    sweep = load_sweep(folder / "sweep.yaml")
    trials, epochs, ledger = [], [], list(read_ledger(folder).values())
    for entry in ledger:
        rows = rows_of(read_reports(folder / "runs" / entry.run))
        trials.append(_row(sweep, entry, rows, folder))
        epochs += [{"trial": entry.number, **row} for row in rows]
    trials.sort(key=lambda row: _rank(sweep, row))
    names = ["trial", "status", "value", *(d.path for d in sweep.dimensions)]
    table = _whole(pd.DataFrame(trials, columns=None if trials else [*names, "wall_s", "error"]))
    by_number = {entry.number: entry for entry in ledger}
    won = [by_number[row["trial"]] for row in trials if row["status"] == "complete" and row["value"] is not None]
    different = list({entry.run: entry for entry in won}.values())
    finalists = [sweep.job_of(entry.settings) for entry in different[:NUM_FINALISTS]]
    return Results(folder, sweep, table, _whole(pd.DataFrame(epochs)), finalists)


def _whole(table: pd.DataFrame) -> pd.DataFrame:
    """The table in types that Parquet has: counts stay whole numbers although some are missing, and a column of several
    types, such as a choice between a text and a number, becomes a column of texts."""
    mixed = [
        name
        for name in table.columns
        if table[name].dtype == object and len({type(value) for value in table[name] if _known(value)}) > 1
    ]
    texts = {name: [yaml_text(value) if _known(value) else None for value in table[name]] for name in mixed}
    return table.assign(**texts).astype({name: "Int64" for name in _COUNTS if name in table.columns})


def _rank(sweep: Sweep, row: Mapping[str, Any]) -> tuple[int, float, int]:
    """A trial's place in the table. Complete trials come first, then pruned ones, the best of each first; last the
    trials without a value, of which those nearest to a target come first."""
    value, target = row["value"], sweep.objective.target
    if value is None:
        return 2, 0.0 if target is None else abs(target - sweep.objective.for_scheduler(row)), row["trial"]
    return row["status"] != "complete", value if sweep.objective.best == "min" else -value, row["trial"]


def _row(sweep: Sweep, entry: TrialEntry, rows: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    _, idle = sweep.data_of(entry.settings)
    try:
        job = flat(dataclasses.asdict(sweep.job_of(entry.settings)))
    except ConfigError:  # There is no job with these settings, and so the trial has failed.
        job = {}
    settings = {path: None if path in idle else value for path, value in entry.settings.items()}
    ended = entry.status in ("complete", "pruned")
    return {
        "trial": entry.number,
        "status": entry.status,
        "value": sweep.objective.value(rows) if ended else None,
        **({"reached": any(map(sweep.objective.reached, rows))} if sweep.objective.target is not None else {}),
        **settings,
        **{name: value for name, value in (rows[-1] if rows else {}).items() if name not in settings},
        "wall_s": entry.wall_s,
        "num_starts": entry.num_starts,
        "error": entry.error,
        "run_folder": f"runs/{entry.run}",
        **{f"job.{path}": value for path, value in job.items() if path not in ("name", "storage")},
    }


def _others(objective: str, results: Results) -> list[str]:
    """Up to two metrics of the job that are shown beside the objective."""
    reported = results.sweep.default_job().metrics()
    return [name for name in reported if name != objective and name in results.trials.columns][:2]


def _remark(row: Mapping[str, Any]) -> str:
    if row["status"] == "failed":
        return "failed"
    if row.get("reached") is False and row["status"] == "complete":
        return "target not reached"
    return "" if row["status"] == "complete" else str(row["status"])


def _by_seed(results: Results) -> list[str]:
    """If the seed varies: lines with the mean over seeds, the best first, of settings that have a value for every
    seed."""
    sweep, table = results.sweep, results.trials
    seed = next((d.path for d in sweep.dimensions if d.whole == SEED), None)
    paths = [d.path for d in sweep.dimensions if d.path != seed]
    if seed is None or not paths or not len(table):
        return []
    lines = []
    for settings, group in table.drop_duplicates("run_folder").groupby(paths, dropna=False, sort=False):
        values = group["value"].where(group["status"] == "complete").dropna()
        if len(values) == len(group) > 1:
            named = ", ".join(f"{p} {_said(v)}" for p, v in zip(paths, settings, strict=True))
            lines.append(
                (
                    values.mean(),
                    f"  {named}: {number(values.mean())} (deviation {number(values.std())}, {len(values)} seeds)",
                )
            )
    lines.sort(reverse=sweep.objective.best == "max")
    return [f"means of {sweep.objective.name} over seeds:", *(text for _, text in lines)] if lines else []


def _known(value: Any) -> bool:
    return value is not None and not (isinstance(value, float) and math.isnan(value)) and value is not pd.NA


def _said(value: Any) -> str:
    return number(value) if _known(value) else "-"
