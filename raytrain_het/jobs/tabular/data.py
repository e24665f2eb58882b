"""A table as arrays that all workers of a machine share: read once, checked, and mapped into memory.

The first worker that needs a table converts it into a folder below the machine's temporary folder. All workers map the
arrays from there, so the machine holds one copy in its page cache, whatever the number of workers. Another split,
version or choice of columns of a file is another copy. The next conversion removes copies that no process uses.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from raytrain_het.errors import ConfigError
from raytrain_het.jobs.tabular.columns import (
    Source,
    check_classes,
    check_columns,
    check_regression,
    choose_columns,
    feature_notes,
)
from raytrain_het.jobs.tabular.file import file_info
from raytrain_het.jobs.tabular.reading import read_table
from raytrain_het.jobs.validation import plural

HELD_OUT = 0.2
"""The part of the rows that is held out."""
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORMAT = 3
"""The version of the files in a table's folder. A change of the files changes it."""
_BLOCK = 65536


@dataclass(frozen=True)
class TableData:
    """A table's standardised columns, and what their values mean.

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
    """The target's deviation. A squared error times its square is in the target's own unit."""
    fingerprint: str
    """A hash of what was read. All workers of a run, and a resumed run, must have the same."""
    notes: tuple[str, ...] = ()
    """Warnings, a line each."""

    def unlearnable_classes(self) -> list[str]:
        """A warning of classes that only the held-out part has, or none."""
        if self.classes is None:
            return []
        seen = np.bincount(self.y[: self.num_train], minlength=len(self.classes))
        unseen = [name for name, count in zip(self.classes, seen, strict=True) if not count]
        if not unseen:
            return []
        return [
            f"only the held-out part has {plural(len(unseen), 'value')} of the target {self.target!r} "
            f"({', '.join(map(repr, unseen[:5]))}), which cannot be learnt: merge rare values, or drop their rows"
        ]


def open_table(source: Source) -> TableData:
    """The table's arrays. They are made first, if no process on this machine has made them.

    Raises:
        ConfigError: The file is missing, unreadable, empty or malformed, a column is missing or not numeric, or
            values are missing; the message names the columns and what to do.
    """
    folder = _home() / f"table-{_key(source)}"
    with FileLock(folder.with_suffix(".lock")):
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
        # Copy on write: torch asks for writable arrays, although nothing writes to them.
        x, y = (np.load(folder / f"{name}.npy", mmap_mode="c") for name in ("x", "y"))
        # A shared lock, which many processes hold at once: it says that the folder is in use.
        used = os.open(folder, os.O_RDONLY)
        fcntl.flock(used, fcntl.LOCK_SH)
        weakref.finalize(x, os.close, used)  # Tensors that share the array's memory keep it alive.
    return TableData(
        x=x,
        y=y,
        num_train=about["num_train"],
        features=tuple(about["features"]),
        target=about["target"],
        classes=tuple(about["classes"]) if about["classes"] is not None else None,
        target_deviation=about["target_deviation"],
        fingerprint=about["fingerprint"],
        notes=tuple(about["notes"]),
    )


def _home() -> Path:
    path = Path(tempfile.gettempdir()) / f"raytrain_het-{os.getuid()}"
    path.mkdir(mode=0o700, exist_ok=True)
    return path


def _remove_unused(source: Source) -> None:
    """Remove other copies of the same file that no process maps, and what a killed process has left half-made."""
    for path in _home().glob("table-*"):
        if path.suffix == ".lock":
            continue
        with contextlib.suppress(OSError, ValueError), FileLock(path.with_suffix(".lock"), timeout=0):
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
    """The key of a table: another file, another version of it, or another choice of columns has another key."""
    version: Any = None
    if source.data is not None:
        info = file_info(source.data)
        version = (info.size, info.mtime_ns)
    return hashlib.sha256(repr((_FORMAT, source, version)).encode()).hexdigest()[:16]


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

    Only the result is rounded: fp32 would round times in seconds since 1970 to two minutes.

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
    # Reserve the blocks: to fill a sparse file through a mapping on a full disk kills the process by a signal.
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
    rows: int,
    features: list[str],
    target: str,
    classes: list[str] | None,
    deviation: float,
    digest: Any,
    notes: tuple[str, ...] = (),
) -> dict[str, Any]:
    # A hash of what was read. The standardised values may differ in the last bits between unlike machines.
    digest.update(repr((features, target, classes)).encode())
    return {
        "num_train": _num_train(rows),
        "features": features,
        "target": target,
        "classes": classes,
        "target_deviation": deviation,
        "fingerprint": digest.hexdigest()[:16],
        "notes": notes,
    }


def _from_file(source: Source, folder: Path) -> tuple[Any, np.ndarray, dict[str, Any]]:
    assert source.data is not None
    read = read_table(source.data)
    table = read.table
    features, target = choose_columns(source, table.column_names)
    check_columns(source, table, features, target)
    order = np.random.default_rng(source.seed).permutation(table.num_rows)
    x = _new_x(folder, table.num_rows, len(features))
    digest = hashlib.sha256()
    for i, name in enumerate(features):
        column = _column(table, name)
        digest.update(column.data)
        x[:, i], _ = _standardised(source, name, column[order])
    notes = (*read.notes, *feature_notes(table, features, target))
    classes, deviation = None, 1.0
    if source.task == "classification":
        values, codes = np.unique(table.column(target).to_numpy(), return_inverse=True)
        notes += check_classes(source, target, values, table.num_rows)
        classes, y = [str(v) for v in values], codes.astype(np.int64)
        digest.update(y.data)
        y = y[order]
    else:
        column = _column(table, target)
        digest.update(column.data)
        num_train = _num_train(len(column))
        notes += check_regression(source, target, column, column[order[:num_train]])
        y, deviation = _standardised(source, target, column[order])
    return x, y, _about(table.num_rows, features, target, classes, deviation, digest, notes)


def _column(table: Any, name: str) -> np.ndarray:
    values: np.ndarray = table.column(name).to_numpy().astype(np.float64)
    return values
