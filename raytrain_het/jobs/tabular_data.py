"""A table as arrays that all workers of a machine share: read once, checked, and mapped into memory.

The first worker that needs a table converts it into a folder of its own below the machine's temporary folder; it and
all others map the arrays, so that the machine holds one copy in its page cache, whatever the number of workers. Another
split, version or choice of columns of a file is another copy; the next conversion removes those that nobody uses.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shlex
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from raytrain_het.errors import ConfigError
from raytrain_het.jobs.validation import plural

HELD_OUT = 0.2
"""This part of the rows is held out."""
MAX_CLASSES = 1000
"""More values than this in a column to be classified are a mistake."""
GS_RETRY_S = 20.0
"""For so long Google's storage may be unreachable, unless the URI says otherwise."""
_GS_LIMIT = "retry_limit_seconds"
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORMAT = 2
"""Another one where the files in a table's folder are others."""
_BLOCK = 65536
_NAMED = 5


@dataclass(frozen=True)
class Source:
    """Where a table comes from, and which of it is used."""

    data: str | None
    rows: int
    columns: int
    target: str | None
    features: tuple[str, ...] | None
    task: str
    seed: int


@dataclass(frozen=True)
class TableData:
    """Standardised columns, and what they were before.

    The arrays are mapped from files: rows of the training part first, in the order of a permutation by seed.
    """

    x: np.ndarray
    """Shape (rows, features), fp32, with mean 0 and deviation 1 over the training part."""
    y: np.ndarray
    """Shape (rows,): fp32, standardised alike, or the classes' numbers as int64."""
    num_train: int
    features: tuple[str, ...]
    target: str
    classes: tuple[str, ...] | None
    target_deviation: float
    """A squared error of standardised values, times this squared, is one in the target's own unit."""
    fingerprint: str
    """Of what was read: a run that goes on, and all its workers, have the same."""


def open_table(source: Source) -> TableData:
    """The table, converted if nobody on this machine has done so.

    Raises:
        ConfigError: The file is missing, unreadable, empty or malformed, a column is missing or not numeric, or
            values are missing; the message names the columns and what to do.
    """
    folder = _home() / f"table-{_key(source)}"
    with _one_at_a_time(folder.with_suffix(".lock")):
        if not (folder / "table.json").exists():
            _remove_unused(source)
            part = folder.with_suffix(".part")
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            try:
                _convert(source, part)
                shutil.rmtree(folder, ignore_errors=True)
                part.rename(folder)
            except OSError as error:
                if error.errno not in _NO_SPACE:
                    raise
                raise ConfigError(
                    f"data={source.data!r}: no space left in {folder.parent} for the table as arrays. Free some, or "
                    "set TMPDIR to a folder that has it."
                ) from None
            finally:
                shutil.rmtree(part, ignore_errors=True)
        about = json.loads((folder / "table.json").read_text())
        # Copy on write: torch wants arrays it may write to, and nobody does.
        x, y = (np.load(folder / f"{name}.npy", mmap_mode="c") for name in ("x", "y"))
        used = os.open(folder, os.O_RDONLY)
        fcntl.flock(used, fcntl.LOCK_SH)
        weakref.finalize(x, os.close, used)  # The model's tensors share its memory, and keep it.
    return TableData(
        x=x, y=y, num_train=about["num_train"], features=tuple(about["features"]), target=about["target"],
        classes=tuple(about["classes"]) if about["classes"] is not None else None,
        target_deviation=about["target_deviation"], fingerprint=about["fingerprint"],
    )  # fmt: skip


def _home() -> Path:
    path = Path(tempfile.gettempdir()) / f"raytrain_het-{os.getuid()}"
    path.mkdir(mode=0o700, exist_ok=True)
    return path


@contextlib.contextmanager
def _one_at_a_time(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Raises BlockingIOError where somebody else has the lock, and is not to be waited for."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield


def _remove_unused(source: Source) -> None:
    """Remove what was made of the same file and is mapped by no process, and what a killed one left half-made."""
    for path in _home().glob("table-*"):
        if path.suffix == ".lock":
            continue
        with contextlib.suppress(OSError, ValueError), _one_at_a_time(path.with_suffix(".lock"), wait=False):
            if path.suffix != ".part":
                about = json.loads((path / "table.json").read_text())
                if about.get("data") != source.data or _is_used(path):
                    continue
            shutil.rmtree(path, ignore_errors=True)


def _is_used(folder: Path) -> bool:
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def _key(source: Source) -> str:
    """Another one for another file, version of it, or choice of columns."""
    version: Any = None
    if source.data is not None:
        info = _file_info(source.data)
        version = (info.size, info.mtime_ns)
    return hashlib.sha256(repr((_FORMAT, source, version)).encode()).hexdigest()[:16]


# ---------------------------------------------------------------- reading


def _file_system(data: str) -> tuple[Any, str]:
    from pyarrow import fs

    if "://" not in data:
        return fs.LocalFileSystem(), str(Path(data).expanduser().resolve())
    if data.startswith("gs://") and _GS_LIMIT not in data:
        # Else it tries again for a quarter of an hour, without a word.
        data += f"{'&' if '?' in data else '?'}{_GS_LIMIT}={GS_RETRY_S:g}"
    try:
        return fs.FileSystem.from_uri(data)
    except (pa.ArrowInvalid, OSError, ImportError, NotImplementedError) as error:
        # Of these, ImportError and NotImplementedError are what a pyarrow says that was built without this file system.
        raise ConfigError(
            f"data={data!r} cannot be opened: {_first_line(error)}. Allowed are paths, and URIs whose library is "
            "installed: s3://, gs:// and file:// come with pyarrow; hdfs:// needs Hadoop's libhdfs (set "
            "ARROW_LIBHDFS_DIR and CLASSPATH)."
        ) from None


def _file_info(data: str) -> Any:
    from pyarrow import fs

    system, path = _file_system(data)
    try:
        info = system.get_file_info(path)
    except OSError as error:
        raise ConfigError(f"data={data!r} cannot be reached: {_first_line(error)}. Look at its address.") from None
    if info.type == fs.FileType.NotFound:
        raise ConfigError(f"data={data!r} does not exist: allowed is a CSV or Parquet file. Look at its path.")
    if info.type != fs.FileType.File:
        raise ConfigError(f"data={data!r} is a folder: allowed is one CSV or Parquet file. Name the file.")
    if info.size == 0:
        raise ConfigError(f"data={data!r} is empty: allowed is a table with a header and rows.")
    return info


def read_table(data: str) -> pa.Table:
    """All columns of a CSV or Parquet file; which of both it is, its first bytes say.

    Raises:
        ConfigError: see :func:`open_table`.
    """
    from pyarrow import csv, parquet

    _file_info(data)
    system, path = _file_system(data)
    try:
        with system.open_input_file(path) as file:
            if file.read(4) == b"PAR1":
                file.seek(0)
                table = parquet.read_table(file)
            else:
                file.seek(0)
                # An empty label is missing, and no class of its own.
                table = csv.read_csv(file, convert_options=csv.ConvertOptions(strings_can_be_null=True))
        names = table.column_names
    except UnicodeDecodeError:
        raise ConfigError(
            f"data={data!r}: the names of its columns are not UTF-8. If the file is Latin-1, write: iconv -f latin1 "
            "-t utf-8"
        ) from None
    except (pa.ArrowInvalid, OSError) as error:
        raise ConfigError(
            f"data={data!r} is neither CSV nor Parquet, or damaged: {_first_line(error)}. Allowed is CSV with a header "
            "line and the same number of values in every line, or Parquet."
        ) from None
    if table.num_rows == 0 or table.num_columns < 2:
        raise ConfigError(
            f"data={data!r} has {table.num_rows} rows of {table.num_columns} columns: allowed are rows, and two "
            "columns or more. For CSV the first line has the columns' names."
        )
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"data={data!r} has columns of the same name: {_some(twice)}. Name each column once.")
    for i, field in enumerate(table.schema):
        if pa.types.is_decimal(field.type):
            table = table.set_column(i, field.name, table.column(i).cast(pa.float64()))
        elif pa.types.is_dictionary(field.type):
            table = table.set_column(i, field.name, table.column(i).cast(field.type.value_type))
    return table


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(map(repr, names[:_NAMED])) + more


def _choose(source: Source, names: list[str]) -> tuple[list[str], str]:
    """The feature columns and the target."""
    target = source.target if source.target is not None else names[-1]
    features = list(source.features) if source.features is not None else [n for n in names if n != target]
    missing = [name for name in (target, *features) if name not in names]
    if missing:
        raise ConfigError(
            f"data={source.data!r} has no column {_some(missing)}: there are {_some(names)}. Look at target and "
            "features."
        )
    twice = sorted({name for name in features if features.count(name) > 1})
    if target in features or twice:
        what = f"the target {target!r} is one of the features" if target in features else f"twice: {_some(twice)}"
        others = json.dumps([n for n in dict.fromkeys(features) if n != target] or ["COLUMN"], ensure_ascii=False)
        raise ConfigError(
            f"features={features!r} is not valid: {what}: allowed are columns other than the target (target=null is "
            f"the last one), each once. Write --set features={shlex.quote(others)}, or another target"
        )
    return features, target


def _numbers(source: Source, table: pa.Table, names: list[str]) -> None:
    """Refuse columns that are no numbers."""
    text = [n for n in names if not _is_number(table.schema.field(n).type)]
    if text:
        kinds = ", ".join(f"{n!r} is {_kind(table, n)}" for n in text[:_NAMED])
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
    raise ConfigError(
        f"data={source.data!r}: the target {target!r} is {what}: allowed are {allowed}: {other}: --set target=COLUMN"
    )


def _kind(table: pa.Table, name: str) -> str:
    kind = table.schema.field(name).type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return "text"
    # As which Arrow reads a CSV file's text in Latin-1.
    return "binary, or text that is not UTF-8" if pa.types.is_binary(kind) else str(kind)


def _is_number(kind: pa.DataType) -> bool:
    """A column without any value counts: what is wrong with it is that they are missing."""
    return (
        pa.types.is_null(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
    )


def _complete(source: Source, table: pa.Table, names: list[str]) -> None:
    """Refuse missing values and infinities."""
    import pyarrow.compute as pc

    bad = {}
    for name in names:
        column = table.column(name)
        count = column.null_count
        if pa.types.is_floating(column.type):
            count += pc.sum(pc.invert(pc.is_finite(column))).as_py() or 0
        if count:
            bad[name] = count
    if bad:
        counts = ", ".join(f"{name!r}: {count}" for name, count in list(bad.items())[:_NAMED])
        more = f" and {len(bad) - _NAMED} more columns" if len(bad) > _NAMED else ""
        raise ConfigError(
            f"data={source.data!r}: values are missing, NaN or infinite ({counts}{more}; the table has "
            f"{table.num_rows} rows): allowed are finite numbers. Drop those rows or fill them in, for example with "
            "the column's median, or leave the columns out with features."
        )


# ---------------------------------------------------------------- converting


def _convert(source: Source, folder: Path) -> None:
    made_up = source.data is None
    x, y, about = _made_up(source, folder) if made_up else _from_file(source, folder)
    x.flush()
    np.save(folder / "y.npy", y)
    (folder / "table.json").write_text(json.dumps(about | {"data": source.data}))


def _num_train(rows: int) -> int:
    return rows - max(1, round(HELD_OUT * rows))


def _standardised(source: Source, name: str, column: np.ndarray) -> tuple[np.ndarray, float]:
    """A column of float64 as fp32 with mean 0 and deviation 1 over the training part, and what its deviation was.

    Only the result is rounded: of times in seconds since 1970 fp32 would leave steps of two minutes.

    Raises:
        ConfigError: Its numbers are too large, or the held-out ones too far away.
    """
    train = column[: _num_train(len(column))]
    with np.errstate(over="ignore", invalid="ignore"):
        mean, deviation = train.mean(), train.std()
        if train.min() == train.max():  # A constant column says nothing, and becomes 0.
            mean, deviation = train[0], 1.0
        result = ((column - mean) / deviation).astype(np.float32)
    if not (np.isfinite(deviation) and np.isfinite(result).all()):
        raise ConfigError(
            f"data={source.data!r}: the column {name!r}, from {column.min():.3g} to {column.max():.3g}, cannot be "
            "standardised: allowed are numbers whose squares float64 holds, and that do not lie 1e38 deviations "
            "apart. Scale it, or leave it out with features."
        )
    return result, float(deviation)


def _new_x(folder: Path, rows: int, columns: int) -> Any:
    path = folder / "x.npy"
    x = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(rows, columns))
    # A file without blocks of its own would be filled through the mapping, where a full disk is a signal that kills.
    with path.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return x


def _made_up(source: Source, folder: Path) -> tuple[Any, np.ndarray, dict[str, Any]]:
    """``y = x w + 1 + 0.1 noise`` with normal x, w and noise: no fit has a squared error below 0.01."""
    random = np.random.default_rng(source.seed)
    weights = random.standard_normal(source.columns)
    x = _new_x(folder, source.rows, source.columns)
    target = np.empty(source.rows)
    for start in range(0, source.rows, _BLOCK):
        block = random.standard_normal((min(_BLOCK, source.rows - start), source.columns))
        x[start : start + len(block)] = block
        target[start : start + len(block)] = block @ weights + 1 + 0.1 * random.standard_normal(len(block))
    names = [f"x{i}" for i in range(source.columns)]
    for i, name in enumerate(names):
        x[:, i], _ = _standardised(source, name, x[:, i].astype(np.float64))
    y, deviation = _standardised(source, "y", target)
    digest = hashlib.sha256(repr((source.rows, source.columns, source.seed)).encode())
    return x, y, _about(source.rows, names, "y", None, deviation, digest)


def _about(
    rows: int, features: list[str], target: str, classes: list[str] | None, deviation: float, digest: Any
) -> dict[str, Any]:
    # Of what was read, not of what became of it: that may differ in the last bits between unlike machines.
    digest.update(repr((features, target, classes)).encode())
    return {
        "num_train": _num_train(rows), "features": features, "target": target, "classes": classes,
        "target_deviation": deviation, "fingerprint": digest.hexdigest()[:16],
    }  # fmt: skip


def _from_file(source: Source, folder: Path) -> tuple[Any, np.ndarray, dict[str, Any]]:
    assert source.data is not None
    table = read_table(source.data)
    features, target = _choose(source, table.column_names)
    classify = source.task == "classification"
    _check_target(source, table, target)
    _numbers(source, table, features)
    _complete(source, table, [*features, target])
    if table.num_rows < 10:
        raise ConfigError(f"data={source.data!r} has {table.num_rows} rows: allowed are 10 or more.")
    order = np.random.default_rng(source.seed).permutation(table.num_rows)
    x = _new_x(folder, table.num_rows, len(features))
    digest = hashlib.sha256()
    for i, name in enumerate(features):
        column = _column(table, name)
        digest.update(column.data)
        x[:, i], _ = _standardised(source, name, column[order])
    classes, deviation = None, 1.0
    if classify:
        values, codes = np.unique(table.column(target).to_numpy(), return_inverse=True)
        if not 2 <= len(values) <= MAX_CLASSES:
            fix = "Write task: regression, or another target" if len(values) > MAX_CLASSES else "Write another target"
            raise ConfigError(
                f"target={target!r} has {plural(len(values), 'different value')}: allowed for a classification are 2 "
                f"to {MAX_CLASSES}. {fix}."
            )
        classes, y = [str(v) for v in values], codes.astype(np.int64)
        digest.update(y.data)
        y = y[order]
    else:
        column = _column(table, target)
        digest.update(column.data)
        y, deviation = _standardised(source, target, column[order])
    return x, y, _about(table.num_rows, features, target, classes, deviation, digest)


def _column(table: pa.Table, name: str) -> np.ndarray:
    return table.column(name).to_numpy().astype(np.float64)
