"""The run's folder: the resolved configuration, reports and events line by line, and the last checkpoint."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import numbers
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.train.v2._internal.execution.storage import StorageContext

from raytrain_het.config import HetConfig
from raytrain_het.files import write_whole
from raytrain_het.ray_train.scaling import HetScalingConfig

logger = logging.getLogger(__name__)

MAX_ELEMENTS = 1000
"""Arrays of up to so many are written as they are, larger ones by their shape."""
MAX_DEPTH = 50


@dataclass(frozen=True, kw_only=True)
class LastCheckpoint:
    """The checkpoint that a run of this name resumes from."""

    path: str
    epoch: int
    """Epochs that are complete."""
    step: int
    offset: int
    """Samples of the current epoch that are used."""
    metrics: dict[str, Any]
    """The metrics of its report."""

    def __str__(self) -> str:
        return f"{Path(self.path).name} (step {self.step}, epoch {self.epoch})"


def last_checkpoint(context: StorageContext) -> LastCheckpoint | None:
    """The last checkpoint that Ray Train has registered for this run; None if there is none, or it cannot be read."""
    files = context.storage_filesystem
    try:
        with files.open_input_stream(context.checkpoint_manager_snapshot_path) as stream:
            latest = json.loads(stream.read())["latest_checkpoint_result"]
        path = context.build_checkpoint_path_from_name(latest["checkpoint_dir_name"])
        with files.open_input_stream(f"{path}/het.json") as stream:
            cursor = json.loads(stream.read())["cursor"]
        epoch, step, offset = (int(cursor[name]) for name in ("epoch", "step", "offset"))
        return LastCheckpoint(path=path, epoch=epoch, step=step, offset=offset, metrics=latest["metrics"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def last_checkpoint_of(storage: str, name: str) -> LastCheckpoint | None:
    """The last checkpoint of a run that is not under way. Nothing is written."""
    try:
        return last_checkpoint(StorageContext(storage, name, read_only=True))
    except Exception:  # A URI that cannot be reached, or whose library is missing: a write there raises an error.
        return None


def append_lines(path: Path, text: str) -> None:
    """Append whole lines to a file. A full disk or a killed process may have left its last line unfinished.

    Raises:
        OSError: They could not be written.
    """
    with open(path, "ab+") as file:
        if file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
            text = f"\n{text}"
        file.write(text.encode())


class RunFolder:
    """Writes ``config.json``, ``metrics.jsonl``, ``events.jsonl`` and TensorBoard events.

    A resumed run appends to the files. On remote storage nothing is written, after one warning. An error in writing,
    such as a full disk, is warned of once, and never ends the run.

    Args:
        context: Ray Train's storage of this run.
    """

    def __init__(self, context: StorageContext) -> None:
        self._path: Path | None = None
        self._tensorboard: Any = None
        if context.storage_filesystem.type_name == "local":
            self._path = Path(context.experiment_fs_path)
        else:
            logger.warning(
                "The run folder %s is on remote storage: config.json, metrics.jsonl, events.jsonl and TensorBoard "
                "events are not written. Checkpoints are.",
                context.experiment_fs_path,
            )

    def write_config(self, config: HetConfig, scaling: HetScalingConfig, train_loop_config: Any) -> None:
        """Write the resolved settings."""
        slots = scaling.slots or ()
        content = {
            "het_config": {field.name: getattr(config, field.name) for field in dataclasses.fields(config)},
            "workers": [
                {"world_rank": i, "resources": s.resources, "labels": s.labels, "from": s.origin}
                for i, s in enumerate(slots)
            ],
            "train_loop_config": train_loop_config,
        }
        if self._path is not None:
            try:
                write_whole(self._path / "config.json", json.dumps(for_json(content), indent=2) + "\n")
            except OSError as error:
                self._give_up(error)

    def add_reports(self, reports: list[dict[str, Any]]) -> None:
        """Write a line for each report, and its numbers as TensorBoard scalars."""
        self._append("metrics.jsonl", "".join(json.dumps(for_json(r)) + "\n" for r in reports))
        for report in reports:
            for name, value in {**report.get("metrics", {}), **_of_training(report)}.items():
                if not isinstance(value, bool) and isinstance(value, numbers.Real):
                    self._add_scalar(name, _as_float(value), int(report.get("step", 0)))

    def add_bytes_per_step(self, world_rank: int, num_bytes: float, step: int) -> None:
        """Write the bytes that a worker has sent in each of its last steps, as a TensorBoard scalar."""
        self._add_scalar(f"worker_{world_rank}/bytes_sent_per_step", num_bytes, step)

    def add_events(self, events: list[dict[str, Any]]) -> None:
        """Write a line for each membership event."""
        self._append("events.jsonl", "".join(json.dumps(for_json(e)) + "\n" for e in events))

    def close(self) -> None:
        """Flush what is buffered."""
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = None

    def _append(self, name: str, text: str) -> None:
        if self._path is None or not text:
            return
        try:
            append_lines(self._path / name, text)
        except OSError as error:
            self._give_up(error)

    def _add_scalar(self, name: str, value: float, step: int) -> None:
        if self._path is None:
            return
        try:
            if self._tensorboard is None:
                from tensorboardX import SummaryWriter

                # tensorboardX warns of each number that is not finite. The display shows those numbers anyway.
                logging.getLogger("tensorboardX.x2num").setLevel(logging.ERROR)
                self._tensorboard = SummaryWriter(logdir=str(self._path))
            self._tensorboard.add_scalar(name, value, step)
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        logger.warning("The run folder %s can no longer be written (%s); the run goes on.", self._path, error)
        self._path = None


def _as_float(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _of_training(report: dict[str, Any]) -> dict[str, Any]:
    """The figures of a report that become scalars, besides its metrics."""
    since = report.get("since_last") or {}
    drawn = {"training/lr": report.get("lr"), "training/fraction_of_aggregate": report.get("fraction_of_aggregate")}
    if since.get("seconds"):
        drawn["training/samples_per_s"] = since["samples"] / since["seconds"]
    if since.get("steps"):
        drawn["training/bytes_sent_per_step"] = since["bytes_sent"] / since["steps"]
        drawn["training/clipped_share"] = min(1.0, since["clipped_steps"] / since["steps"])
    return drawn


def for_json(value: Any, depth: int = 0) -> Any:
    """Any value as JSON can hold it: numbers of numpy and torch as Python's, small arrays as lists, other keys and
    values as texts. A value that contains itself, or is nested too deeply, is cut."""
    if value is None or isinstance(value, bool | str):
        return value
    if depth > MAX_DEPTH:
        return "..."
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        size = math.prod(value.shape)
        if size <= MAX_ELEMENTS and hasattr(value, "tolist"):
            return for_json(value.tolist(), depth + 1)
        return f"{type(value).__name__} of shape {tuple(value.shape)}, {value.dtype}"
    if isinstance(value, int | float):
        return value
    if isinstance(value, Mapping):
        return {_as_key(k): for_json(v, depth + 1) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [for_json(v, depth + 1) for v in value]
    return _text(value)


def _as_key(key: Any) -> str:
    """A dictionary's key as a text: JSON has no other keys."""
    if isinstance(key, bool) or key is None:
        return json.dumps(key)
    key = key.item() if hasattr(key, "item") and getattr(key, "size", 1) == 1 else key
    return key if isinstance(key, str) else _text(key)


def _text(value: Any) -> str:
    try:
        return str(value)
    except Exception as error:  # A user's own class.
        return f"{type(value).__name__} (its text cannot be made: {type(error).__name__})"
