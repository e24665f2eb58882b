"""The controller: Ray Train's, with a worker group of slots, a membership actor, and the last report as the result."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Any

import ray
from ray.train import Result
from ray.train.v2._internal.constants import HEALTH_CHECK_INTERVAL_S_ENV_VAR
from ray.train.v2._internal.execution.callback import ReportCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.worker_group import WorkerGroupContext

from raytrain_het.config import HetConfig
from raytrain_het.errors import CheckpointError
from raytrain_het.membership.cursor import Cursor
from raytrain_het.ray_train.cleaner_callback import PlacementCleanerCallback
from raytrain_het.ray_train.hub import HubActor, Parts
from raytrain_het.ray_train.storage import snapshot_writer
from raytrain_het.ray_train.worker_group import HetWorkerGroup

POLL_S = 0.5
META_FILE = "het.json"


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """The settings of a run that the controller needs besides Ray's own contexts."""

    config: HetConfig
    parts: Parts


class _LastReport(ReportCallback):
    metrics: dict[str, Any] | None = None

    def after_report(self, training_report: Any, metrics: list[dict[str, Any]]) -> None:
        self.metrics = training_report.metrics


class HetController(TrainController):
    """Ray Train's controller for unequal workers. Every attempt at a run has its own membership actor."""

    worker_group_cls = HetWorkerGroup

    def __init__(self, *, plan: RunSettings, callbacks: list[Any], **rays: Any) -> None:
        # This is an async actor whose poll blocks, as Ray's own controller does. Ray would warn of that.
        ray._private.worker.blocking_get_inside_async_warned = True
        self._plan = plan
        self._attempt = -1
        self._last_word: dict[str, Any] = {}
        self._last_report = _LastReport()
        self._cleaner = PlacementCleanerCallback()
        super().__init__(callbacks=[*callbacks, self._cleaner, self._last_report], **rays)
        self._checkpoint_manager._write_state_to_storage = snapshot_writer(self._checkpoint_manager)
        if HEALTH_CHECK_INTERVAL_S_ENV_VAR not in os.environ:
            self._health_check_interval_s = POLL_S

    def _start_worker_group(self, num_workers: int, resources_per_worker: dict[str, float]) -> None:
        self._attempt += 1
        checkpoint, cursor = self._latest_checkpoint()
        hub = HubActor(
            self._plan.parts,
            self._plan.config,
            run_id=self._train_run_context.run_id,
            attempt=self._attempt,
            num_slots=num_workers,
            checkpoint=checkpoint,
            checkpoint_cursor=cursor,
        )
        context = WorkerGroupContext(
            run_attempt_id=self._get_run_attempt_id(),
            train_fn_ref=self._train_fn_ref,
            num_workers=num_workers,
            resources_per_worker=resources_per_worker,
        )
        group = HetWorkerGroup(
            self._train_run_context,
            context,
            self._worker_group_callbacks_to_propagate,
            hub=hub,
            on_group=self._cleaner.register,
            on_end=self._keep,
        )
        self._worker_group = group
        group.start()

    def _latest_checkpoint(self) -> tuple[str | None, Cursor | None]:
        """The path of the run's last registered checkpoint, and the cursor in it; or (None, None)."""
        latest = self._checkpoint_manager.latest_checkpoint_result
        if latest is None:
            return None, None
        path = latest.checkpoint.path
        try:
            with latest.checkpoint.filesystem.open_input_stream(f"{path}/{META_FILE}") as stream:
                return path, Cursor.from_dict(json.loads(stream.read())["cursor"])
        except Exception as error:
            raise CheckpointError(
                f"The run {self._run_config.name!r} has a checkpoint that raytrain_het cannot go on from: {path}/"
                f"{META_FILE} {'does not exist' if isinstance(error, FileNotFoundError) else 'is not readable'}. "
                "Write another RunConfig(name=...) to start anew."
            ) from None

    def _keep(self, last_word: dict[str, Any]) -> None:
        self._last_word = last_word

    def last_word(self) -> dict[str, Any]:
        """After the run's end: status, events and reports of the last attempt, and the full texts of errors."""
        return self._last_word

    def _build_result(self) -> Result:
        result = super()._build_result()
        if self._last_report.metrics is not None:
            result.metrics = self._last_report.metrics
        return result
