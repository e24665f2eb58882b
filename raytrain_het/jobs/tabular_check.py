"""What the tabular job looks at before any worker is started. Without torch and Ray."""

from __future__ import annotations

from typing import Any

import numpy as np

from raytrain_het.jobs import table_columns
from raytrain_het.jobs.table_columns import Source
from raytrain_het.jobs.table_reading import names_in
from raytrain_het.jobs.tabular_config import TabularJob
from raytrain_het.jobs.tabular_data import open_table
from raytrain_het.jobs.validation import plural


def source_of(config: dict[str, Any]) -> Source:
    """Which table a job reads."""
    features = config["features"]
    return Source(
        data=config["data"],
        rows=config["rows"],
        columns=config["columns"],
        target=config["target"],
        features=tuple(features) if features is not None else None,
        task=config["task"],
        seed=config["seed"],
    )


def glance(job: TabularJob) -> None:
    """See whether the table is there, and has the columns: from its beginning, so that a large one takes no longer.

    Raises:
        ConfigError: see :func:`raytrain_het.jobs.table_reading.names_in`.
    """
    if job.data is not None and "://" not in job.data:
        table_columns.choose(source_of(job.train_loop_config()), names_in(job.data))


def check(job: TabularJob) -> list[str]:
    """Read the table before any worker is started, for the sake of early errors; returns what there is to warn of.

    Raises:
        ConfigError: see :func:`raytrain_het.jobs.tabular_data.open_table`.
    """
    table = open_table(source_of(job.train_loop_config()))
    notes = list(table.notes)
    if table.classes is not None:
        seen = np.bincount(table.y[: table.num_train], minlength=len(table.classes))
        unseen = [name for name, count in zip(table.classes, seen, strict=True) if not count]
        if unseen:
            notes.append(
                f"only the held-out part has {plural(len(unseen), 'value')} of the target {table.target!r} "
                f"({', '.join(map(repr, unseen[:5]))}), which cannot be learnt: merge rare values, or drop their rows"
            )
    return notes


def num_samples(job: TabularJob) -> int:
    """That a job trains on."""
    return open_table(source_of(job.train_loop_config())).num_train
