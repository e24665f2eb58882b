"""The columns of a table: which are used, which are refused, and warnings of others."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from raytrain_het.errors import ConfigError
from raytrain_het.jobs.tabular.csv_dialect import is_number
from raytrain_het.jobs.tabular.reading import some
from raytrain_het.jobs.validation import plural
from raytrain_het.plain import nearest

MAX_CLASSES = 1000
"""A target with more different values than this is not a classification's."""
FEW = 20
"""A target with at most so many different whole numbers may be a classification's."""
MIN_ROWS = 10
_NAMED = 5
_ID = re.compile(r"(^|.*[_ .-])(id|idx|index|uuid|guid|key|rowid|rownum|row|nr|no)$|.*[a-z]I[dD]$")


@dataclass(frozen=True)
class Source:
    """Where a table comes from, and which of its columns are used."""

    data: str | None
    rows: int
    columns: int
    target: str | None
    features: tuple[str, ...] | None
    task: str
    seed: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Source:
        """The table of a tabular job.

        Args:
            config: What the job's training function is given.
        """
        features = config["features"]
        own = {field.name: config[field.name] for field in dataclasses.fields(cls)}
        return cls(**own | {"features": tuple(features) if features is not None else None})


def choose_columns(source: Source, names: list[str]) -> tuple[list[str], str]:
    """The feature columns and the target.

    Raises:
        ConfigError: A column does not exist, is named twice, or is both target and feature.
    """
    target = source.target if source.target is not None else names[-1]
    features = list(source.features) if source.features is not None else [n for n in names if n != target]
    missing = [name for name in (target, *features) if name not in names]
    if missing:
        near = nearest(missing[0], names)
        raise ConfigError(
            f"data={source.data!r} has no column {some(missing)}: there are {some(names)}. Look at target and "
            f"features.{f' Did you mean {near!r}?' if near else ''}"
        )
    twice = sorted({name for name in features if features.count(name) > 1})
    if target in features or twice:
        what = f"the target {target!r} is one of the features" if target in features else f"twice: {some(twice)}"
        others = json.dumps([n for n in dict.fromkeys(features) if n != target] or ["COLUMN"], ensure_ascii=False)
        raise ConfigError(
            f"features={features!r} is not valid: {what}: allowed are columns other than the target (target=null is "
            f"the last one), each once. Write --set features={shlex.quote(others)}, or another target"
        )
    return features, target


def check_columns(source: Source, table: pa.Table, features: list[str], target: str) -> None:
    """Refuse columns that cannot be trained on, and a table without enough rows.

    Raises:
        ConfigError: The message has the columns, their types, and what to write.
    """
    _check_target(source, table, target)
    _check_numbers(source, table, features)
    _check_complete(source, table, features, target)
    if table.num_rows < MIN_ROWS:
        raise ConfigError(f"data={source.data!r} has {table.num_rows} rows: allowed are {MIN_ROWS} or more.")


def _check_numbers(source: Source, table: pa.Table, names: list[str]) -> None:
    """Refuse columns that are not numeric."""
    text = [n for n in names if not _is_number(table.schema.field(n).type)]
    if text:
        kinds = ", ".join(f"{n!r} is {_kind(table, n)}{_all_but(table, n)}" for n in text[:_NAMED])
        rest = json.dumps([n for n in names if n not in text], ensure_ascii=False)
        leave_out = f", or leave out: --set features={shlex.quote(rest)}" if rest != "[]" else ": no other is left"
        count = "1 column is" if len(text) == 1 else f"{len(text)} columns are"
        raise ConfigError(
            f"data={source.data!r}: {count} not numeric ({kinds}): allowed are numbers and true/false. Encode as "
            f"numbers{leave_out}"
        )


def _check_target(source: Source, table: pa.Table, target: str) -> None:
    """Refuse a target that is neither a number nor, for a classification, text."""
    what = _kind(table, target)
    if _is_number(table.schema.field(target).type) or (what == "text" and source.task == "classification"):
        return
    allowed = "numbers and true/false" + (" and text" if source.task == "classification" else "")
    other = "write --set task=classification, or another target" if what == "text" else "write another target"
    almost = _all_but(table, target)
    if almost:
        other = "correct or drop those rows, or write another target"
    raise ConfigError(
        f"data={source.data!r}: the target {target!r} is {what}{almost}: allowed are {allowed}: {other}: --set "
        "target=COLUMN"
    )


def _kind(table: pa.Table, name: str) -> str:
    kind = table.schema.field(name).type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return "text"
    if pa.types.is_temporal(kind):
        return f"{kind} (a date or time)"
    # Arrow reads text in Latin-1 as binary.
    return "binary, or text that is not UTF-8" if pa.types.is_binary(kind) else str(kind)


def _all_but(table: pa.Table, name: str) -> str:
    """For a column of text that is mostly numbers: the values that are not; else an empty text."""
    if _kind(table, name) != "text":
        return ""
    values = [value for value in table.column(name).to_pylist() if value is not None]
    others = [value for value in values if not is_number(value)]
    if len(others) > len(values) / 2:
        with_digits = [value for value in others if any(map(str.isdigit, value))]
        return f" such as {with_digits[0]!r}" if len(with_digits) > len(values) / 2 else ""
    if not others:
        return ""
    return f": {len(others)} of {plural(len(values), 'value')} are no numbers, such as {others[0]!r}"


def _is_number(kind: pa.DataType) -> bool:
    """Whether a type is numeric. A column without any value counts as such: its values are missing."""
    return (
        pa.types.is_null(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
    )


def _check_complete(source: Source, table: pa.Table, features: list[str], target: str) -> None:
    """Refuse missing values and infinities."""
    import pyarrow.compute as pc

    bad = {}
    for name in (*features, target):
        column = table.column(name)
        count = column.null_count
        if pa.types.is_floating(column.type):
            count += pc.sum(pc.invert(pc.is_finite(column))).as_py() or 0
        if count:
            bad[name] = count
    if not bad:
        return
    counts = ", ".join(f"{name!r}: {count}" for name, count in list(bad.items())[:_NAMED])
    more = f" and {len(bad) - _NAMED} more columns" if len(bad) > _NAMED else ""
    fix = (
        "Drop those rows or fill them in, for example with the column's median, or leave the columns out with features."
    )
    if target in bad:
        fix = f"Drop the rows without a target {target!r}." if len(bad) == 1 else f"{fix} Rows without a target go."
    raise ConfigError(
        f"data={source.data!r}: values are missing, NaN or infinite ({counts}{more}; the table has "
        f"{table.num_rows} rows): allowed are finite numbers. {fix}"
    )


# ---------------------------------------------------------------- what columns look like


def feature_notes(table: pa.Table, features: list[str], target: str) -> tuple[str, ...]:
    """Warnings of columns that number the rows. Often they are left over from an index, and predict nothing."""
    numbering = [name for name in features if _numbers_rows(table, name)]
    notes = []
    if numbering:
        rest = json.dumps([n for n in features if n not in numbering], ensure_ascii=False)
        leave_out = (
            f": leave it out? --set features={shlex.quote(rest)}" if rest != "[]" and len(features) <= FEW else ""
        )
        named = [name for name in numbering if name]
        what = [
            *(["the column without a name, as pandas' index,"] if "" in numbering else []),
            *map(repr, named[:_NAMED]),
        ]
        notes.append(f"{', '.join(what)} numbers the rows{', like an ID' if named else ''}{leave_out}")
    if _numbers_rows(table, target):
        notes.append(f"the target {target!r} numbers the rows, like an ID: another? --set target=COLUMN")
    return tuple(notes)


def _numbers_rows(table: pa.Table, name: str) -> bool:
    """Whether whole numbers go up by 1 from row to row, or are all different under a name such as ``user_id``."""
    column = table.column(name)
    if not pa.types.is_integer(column.type) or column.null_count:
        return False
    values = column.to_numpy()
    if (np.diff(values) == 1).all():
        return True
    return bool(not name or _ID.match(name)) and len(np.unique(values)) == len(values)


def check_regression(source: Source, target: str, column: np.ndarray, train: np.ndarray) -> tuple[str, ...]:
    """Warnings of the target of a regression.

    Args:
        source: The table's source.
        target: The target's name.
        column: The target's values.
        train: Those of the values that are trained on.

    Raises:
        ConfigError: The target is the same in all rows to train on.
    """
    if train.min() == train.max():
        where = "every row" if column.min() == column.max() else "every row to train on"
        raise ConfigError(
            f"data={source.data!r}: the target {target!r} is {column[0]:.6g} in {where}: there is nothing to learn. "
            "Write another target: --set target=COLUMN"
        )
    if (column != np.floor(column)).any() and len(np.unique(column[:1000])) > 2:
        return ()
    values = np.unique(column)
    few = len(values) == 2 or (len(values) <= min(FEW, len(column) // 5) and (values == np.floor(values)).all())
    if not few:
        return ()
    said = ", ".join(f"{value:g}" for value in values[:_NAMED]) + (", ..." if len(values) > _NAMED else "")
    return (
        f"the target {target!r} has only {len(values)} different values ({said}): classification? Then write --set "
        "task=classification",
    )


def check_classes(source: Source, target: str, values: np.ndarray, rows: int) -> tuple[str, ...]:
    """Warnings of the target of a classification.

    Args:
        source: The table's source.
        target: The target's name.
        values: The target's different values.
        rows: How many rows the table has.

    Raises:
        ConfigError: There are fewer than two different values, or too many.
    """
    is_text = values.dtype == object
    fractions = [] if is_text else [value for value in values.tolist() if value != int(value)]
    regression = "Write another target: --set target=COLUMN" if is_text else "Regression? Write --set task=regression"
    if not 2 <= len(values) <= MAX_CLASSES:
        fix = "Write task: regression, or another target" if len(values) > MAX_CLASSES else "Write another target"
        raise ConfigError(
            f"target={target!r} has {plural(len(values), 'different value')}: allowed for a classification are 2 "
            f"to {MAX_CLASSES}. {fix}."
        )
    if len(values) > rows / 2:
        raise ConfigError(
            f"target={target!r} has {len(values)} different values in {rows} rows: allowed for a classification are "
            f"values that come again. {regression}"
        )
    if fractions:
        return (
            f"the target {target!r} has {len(values)} different numbers such as {fractions[0]:g}: regression? Then "
            "write --set task=regression",
        )
    if not is_text and len(values) > FEW:
        return (
            f"the target {target!r} has {len(values)} different numbers: regression? Then write --set task=regression",
        )
    numbers = [value for value in values if is_text and is_number(value)]
    if numbers and len(numbers) > len(values) / 2:
        other = next(value for value in values if not is_number(value))
        return (f"the target {target!r} has numbers, and {other!r} as one more class: is that a missing value?",)
    return ()
