"""The run's folder: the resolved configuration, and what happened, line by line."""

from __future__ import annotations

import dataclasses
import json
import logging
import numbers
from pathlib import Path
from typing import Any

from ray.train.v2._internal.execution.storage import StorageContext

from raytrain_het.config import HetConfig
from raytrain_het.ray_train.scaling import HetScalingConfig

logger = logging.getLogger(__name__)


class RunFolder:
    """Writes ``config.json``, ``metrics.jsonl``, ``events.jsonl`` and TensorBoard events.

    A run that goes on under the same name appends. On remote storage nothing is written, with one
    warning. An error while writing (a full disk) is warned about once and never ends the run.

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
        """The settings as they were resolved."""
        slots = scaling.slots or ()
        content = {
            "het_config": dataclasses.asdict(config),
            "workers": [
                {"world_rank": i, "resources": s.resources, "labels": s.labels, "from": s.origin}
                for i, s in enumerate(slots)
            ],
            "train_loop_config": train_loop_config,
        }
        self._write("config.json", "w", json.dumps(content, indent=2, default=str) + "\n")

    def add_reports(self, reports: list[dict[str, Any]]) -> None:
        """One line per report, and its numbers as TensorBoard scalars."""
        self._write("metrics.jsonl", "a", "".join(json.dumps(r, default=_plain) + "\n" for r in reports))
        for report in reports:
            for name, value in report.get("metrics", {}).items():
                if not isinstance(value, bool) and isinstance(value, numbers.Real):
                    self._add_scalar(name, float(value), int(report.get("step", 0)))

    def add_events(self, events: list[dict[str, Any]]) -> None:
        """One line per membership event."""
        self._write("events.jsonl", "a", "".join(json.dumps(e, default=_plain) + "\n" for e in events))

    def close(self) -> None:
        """Flush what is buffered."""
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = None

    def _write(self, name: str, mode: str, text: str) -> None:
        if self._path is None or not text:
            return
        try:
            with open(self._path / name, mode, encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            self._give_up(error)

    def _add_scalar(self, name: str, value: float, step: int) -> None:
        if self._path is None:
            return
        try:
            if self._tensorboard is None:
                from tensorboardX import SummaryWriter

                self._tensorboard = SummaryWriter(logdir=str(self._path))
            self._tensorboard.add_scalar(name, value, step)
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        logger.warning("The run folder %s can no longer be written (%s); the run goes on.", self._path, error)
        self._path = None


def _plain(value: Any) -> Any:
    """Numbers of numpy and torch as Python's, anything else as text."""
    return value.item() if hasattr(value, "item") and getattr(value, "size", 1) == 1 else str(value)
