"""The driver's thread that watches a run: it polls the membership actor, writes the run folder and calls a display."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayError

from raytrain_het.ray_train.hub import hub_name
from raytrain_het.ray_train.narration import log_update
from raytrain_het.ray_train.run_folder import LastCheckpoint, RunFolder

logger = logging.getLogger(__name__)

OnUpdate = Callable[[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]]], None]
_INTERVAL_S = 0.5
_WORKER_KEYS = ("device", "node_ip", "batch_share", "compute_s", "wait_s", "bytes_sent", "bytes_received")
_RUN_SPEEDS = ("effective_batch_size", "fraction_of_aggregate", "samples_per_s", "predicted_samples_per_s")
_LASTING_KEYS = ("score", "lr_scale", "solo_samples_per_s", "codec")


class Monitor:
    """Polls the membership actor until it is stopped.

    Args:
        run_id: Ray Train's id of the run.
        folder: Writes the run's files.
        on_update: Called from this thread with (status, new events, new reports).
        resumed: The checkpoint that the run resumes from. Its samples do not count as this process's.
    """

    def __init__(
        self, run_id: str, folder: RunFolder, on_update: OnUpdate | None = None, resumed: LastCheckpoint | None = None
    ) -> None:
        self._run_id, self._folder, self._on_update, self._resumed = run_id, folder, on_update, resumed
        self._complained: set[type[BaseException]] = set()
        self._checkpoint = resumed.path if resumed is not None else None
        self._num_checkpoints = self._num_failed = 0
        self._steps = self._clipped = 0
        """Steps, and steps with clipped gradients, of the epochs that were reported."""
        self._attempt = 0
        self._handle: Any = None
        self._events_seen = self._reports_seen = 0
        self._stopped = threading.Event()
        self._workers: dict[int, dict[str, Any]] = {}
        self._sent: dict[int, tuple[str, int, int]] = {}
        """By slot: the worker's uid, its steps, and the bytes that it had sent, when they were last written."""
        self._status: dict[str, Any] = {}
        self._last_report: dict[str, Any] = {}
        self._speeds: dict[str, float | None] = dict.fromkeys(_RUN_SPEEDS)
        self._started: tuple[float, int] | None = None
        self._ended: tuple[float, int] | None = None
        self._thread = threading.Thread(target=self._run, name="het-monitor", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def finish(self, last_word: dict[str, Any] | None) -> None:
        """Stop the thread, and take in the membership actor's last word."""
        self._stopped.set()
        self._thread.join(5)
        if last_word:
            self._take_in(
                last_word.get("status") or {},
                [e for e in last_word.get("events", []) if e["seq"] >= self._events_seen],
                [r for r in last_word.get("reports", []) if r["seq"] >= self._reports_seen],
            )
        self._folder.close()

    def summary(self, metrics: dict[str, Any] | None) -> dict[str, Any]:
        """The figures of the run, and the last known ones of every worker.

        Args:
            metrics: The metrics of the ``Result``; None takes those of the last report.
        """
        throughput = 0.0
        if self._started and self._ended and self._ended[0] > self._started[0]:
            throughput = (self._ended[1] - self._started[1]) / (self._ended[0] - self._started[0])
        steps = self._status.get("step", 0)
        return {
            "metrics": metrics if metrics is not None else self._last_report.get("metrics", {}),
            "steps": steps,
            "steps_now": max(0, steps - (self._resumed.step if self._resumed is not None else 0)),
            "samples": self._status.get("samples", 0),
            "throughput_samples_per_s": throughput,
            **self._speeds,
            "clipped_share": min(1.0, self._clipped / self._steps) if self._steps else None,
            "checkpoint": self._checkpoint,
            "num_checkpoints": self._num_checkpoints,
            "num_checkpoints_failed": self._num_failed,
            "resumed_from": self._resumed.path if self._resumed is not None else None,
            "workers": [self._workers[slot] for slot in sorted(self._workers)],
        }

    def _run(self) -> None:
        while not self._stopped.wait(_INTERVAL_S):
            try:
                self._poll()
            except (RayError, TimeoutError):
                self._handle = None
            except ValueError:
                self._handle = None  # There is no such actor yet, or no longer.
            except Exception as error:
                self._complain(error)

    def _complain(self, error: Exception) -> None:
        """Warn of an error, once for each class of error; in one line, if it is the disk's."""
        if type(error) in self._complained:
            return
        self._complained.add(type(error))
        if isinstance(error, OSError):
            logger.warning("What is shown of the run could not be written (%s); the run goes on.", error)
        else:
            logger.warning("The display of the run failed; the run goes on.", exc_info=error)

    def _poll(self) -> None:
        if self._handle is None:
            self._handle = self._find()
        # Without retries: Ray would print an error for each call that is open when the actor ends.
        asked = {"status": (), "events": (self._events_seen,), "reports": (self._reports_seen,)}
        status, events, reports = ray.get(
            [getattr(self._handle, name).options(max_task_retries=0).remote(*args) for name, args in asked.items()],
            timeout=2,
        )
        self._take_in(status, events, reports)

    def _find(self) -> Any:
        """The actor of the latest attempt. Its events and reports are counted from 0."""
        try:
            handle = ray.get_actor(hub_name(self._run_id, self._attempt + 1))
            self._attempt += 1
            self._events_seen = self._reports_seen = 0
            return handle
        except ValueError:
            return ray.get_actor(hub_name(self._run_id, self._attempt))

    def _take_in(self, status: dict[str, Any], events: list[dict[str, Any]], reports: list[dict[str, Any]]) -> None:
        self._events_seen = max([self._events_seen, *(e["seq"] + 1 for e in events)])
        self._reports_seen = max([self._reports_seen, *(r["seq"] + 1 for r in reports)])
        self._folder.add_events(events)
        self._folder.add_reports(reports)
        for report in reports:
            self._last_report = report
            stored, failed = report.get("checkpoint"), report.get("checkpoint_error")
            self._checkpoint = stored or self._checkpoint
            self._num_checkpoints += bool(stored or failed)
            self._num_failed += bool(failed)
            since = report.get("since_last") or {}
            self._steps += since.get("steps", 0)
            self._clipped += since.get("clipped_steps", 0)
        if status:
            samples = int(status.get("samples", 0))
            # A resumed run's earlier samples come with the first answer of a worker.
            first = None if self._started is None else self._started[1]
            if first is None or first == samples or (first == 0 and self._resumed is not None):
                self._started = (time.monotonic(), samples)  # No step has been done yet.
            if samples > self._status.get("samples", 0):
                self._ended = (time.monotonic(), samples)
            self._status = status
            for member in status.get("members", []):
                slot = member["slot"]
                before = self._workers.get(slot, {})
                self._workers[slot] = {"world_rank": slot} | {key: member.get(key) for key in _WORKER_KEYS}
                # A worker that is gone has no speed: the last known one stays.
                self._workers[slot] |= {
                    k: v if (v := member.get(k)) is not None else before.get(k) for k in _LASTING_KEYS
                }
                self._note_traffic(member)
            # At the end, when workers are gone, speeds are unknown: the last known ones stay.
            self._speeds |= {k: status[k] for k in _RUN_SPEEDS if status.get(k) is not None}
        log_update(events, reports)
        if self._on_update is not None:
            try:
                self._on_update(status, events, reports)
            except Exception as error:
                self._complain(error)

    def _note_traffic(self, member: dict[str, Any]) -> None:
        """Write down a worker's bytes per step since the last time."""
        told = (member.get("uid", ""), member.get("steps", 0), member.get("bytes_sent", 0))
        uid, steps, sent = self._sent.get(member["slot"], ("", 0, 0))
        if told[0] != uid:
            self._sent[member["slot"]] = told
        elif told[1] > steps:
            self._sent[member["slot"]] = told
            self._folder.add_bytes_per_step(member["slot"], (told[2] - sent) / (told[1] - steps), member["step"])
