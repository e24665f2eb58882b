"""The worker group of slots: its workers differ, and each comes and goes without the others.

The controller's poll runs everything here, except the starts, which have threads of their own. Ray Train sees a
constant world size: a slot without a worker reads as "running" while others run. Its replica group is inactive, so that
nobody calls it, and it is refilled between polls. The membership actor, not Ray, tells the other workers.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayActorError
from ray.train import Checkpoint
from ray.train.v2._internal.execution.checkpoint.report_handler import ReportCallbackHandler
from ray.train.v2._internal.execution.training_report import _TrainingReport
from ray.train.v2._internal.execution.worker_group import ReplicaGroup, WorkerGroup, WorkerGroupPollStatus
from ray.train.v2._internal.execution.worker_group.poll import PollTask, WorkerStatus
from ray.train.v2._internal.execution.worker_group.state import WorkerGroupState, _shutdown_workers
from ray.train.v2._internal.execution.worker_group.worker import Worker
from ray.train.v2._internal.util import time_monotonic
from ray.util.placement_group import PlacementGroup

from raytrain_het.errors import RunFailedError
from raytrain_het.ray_train.cluster_view import describe_free
from raytrain_het.ray_train.drains import Drains
from raytrain_het.ray_train.failures import ErrorMeaning, foremost, meaning_of
from raytrain_het.ray_train.hub import HubActor
from raytrain_het.ray_train.placement import SlotPlacement
from raytrain_het.ray_train.slots import MAX_START_FAILURES, LocalRanks, Slot, SlotState, StartCancelled, StartContext
from raytrain_het.ray_train.worker_entry import set_hub

logger = logging.getLogger(__name__)

_STOPPED_S = 1.0
"""A worker that its generation has dropped is replaced, if it has not answered a poll for so long."""
_REASON_S = 3.0
_TELL_VACANT_S = 5.0
_TELL_USER_S = 15.0


class HetWorkerGroup(WorkerGroup):
    """A ``WorkerGroup`` of slots. See the module's text.

    Args:
        train_run_context: Ray Train's; its scaling config holds the slots.
        worker_group_context: Ray Train's.
        callbacks: Ray Train's.
        hub: The membership actor of this attempt.
        on_group: Called with every placement group.
        on_end: Called at the end with the membership actor's last word.
    """

    def __init__(
        self,
        train_run_context: Any,
        worker_group_context: Any,
        callbacks: list[Any],
        *,
        hub: HubActor,
        on_group: Callable[[PlacementGroup], None],
        on_end: Callable[[dict[str, Any]], None],
    ) -> None:
        super().__init__(train_run_context, worker_group_context, callbacks)
        self._hub, self._on_group, self._on_end = hub, on_group, on_end
        self.slots = [Slot(i, spec) for i, spec in enumerate(train_run_context.scaling_config.slots)]
        self._errors: dict[int, Exception] = {}
        self._failing_since: float | None = None
        self._drains = Drains(hub)
        # A report handler's queues are filled and emptied within one poll: a refill has nothing to reset.
        self._replica_group_callbacks: list[Any] = [
            c for c in self._replica_group_callbacks if not isinstance(c, ReportCallbackHandler)
        ]

    # Start

    def start(self) -> None:
        """Ask for all placement groups, and begin to start the workers. Does not wait for the workers."""
        self._assert_inactive()
        for callback in self._callbacks:
            callback.before_worker_group_start(self._worker_group_context)
        placement = SlotPlacement([slot.spec for slot in self.slots], self._on_group)
        self._plan = StartContext(
            placement=placement,
            runtime_env=_or_none(self._get_worker_runtime_env(self._train_run_context.run_config.worker_runtime_env)),
            worker_cls=self._worker_cls,
            init_worker=self._init_worker,
            run_worker=self._run_worker,
            ranks=LocalRanks(),
            world_size=len(self.slots),
        )
        self._worker_group_state = WorkerGroupState(time_monotonic(), placement, [], None)
        if placement.wait(2):
            for slot in self.slots:  # in the order of the slots, so that local ranks follow it
                node_id = placement.node_of(slot.index)
                if node_id:
                    self._plan.ranks.assign(slot.index, node_id)
        for slot in self.slots:
            slot.begin(self._plan)
        for callback in self._callbacks:
            callback.after_worker_group_start(self)
        for callback in self._callbacks:
            callback.after_worker_group_training_start(self)

    def _init_worker(self, worker: Worker) -> None:
        """Prepare a new worker. Runs in the thread of the slot's start."""
        ray.get(worker.actor.execute.remote(set_hub, self._hub.handle))
        self._init_train_context([worker], None)
        group = ReplicaGroup([worker], dict(worker.resources), self._replica_group_callbacks)
        for callback in self._replica_group_callbacks:
            callback.after_replica_group_start(group)

    def _run_worker(self, worker: Worker) -> None:
        ray.get(worker.actor.run_train_fn.remote(self._worker_group_context.train_fn_ref))

    # Poll

    def poll_status(self, timeout: float | None = None) -> WorkerGroupPollStatus:
        """One round: ask the workers, then the membership actor; refill; pass reports on to Ray.

        The membership actor is asked last: workers finish a report before they return, so an answer that was asked for
        after all have returned has the last report.
        """
        self._assert_active()
        timeout = timeout or 0.5
        self._poll_workers_once(timeout)
        reports = self._hub.ask(timeout)
        self._collect_starts()
        self._settle(fresh=reports is not None)
        self._drains.tell(self.slots)
        for report in reports or []:
            self._tell(self._statuses(running=True, report=self._training_report(report)))
            self._hub.acknowledge([report["key"]])
        errors = self._errors_to_raise()
        over = not errors and reports is not None and self._all_finished()
        status = self._statuses(running=not over, errors=errors)
        self._tell(status)
        self._latest_poll_status = status
        return status

    def _poll_workers_once(self, timeout: float) -> None:
        """Ask every live worker; a question that is still open is not asked again."""
        live = [slot for slot in self.slots if slot.state is SlotState.LIVE]
        for slot in live:
            assert slot.worker is not None
            slot.answer = None
            if slot.ongoing_poll is None:
                slot.ongoing_poll = PollTask(time_monotonic(), slot.worker.actor.poll_status.remote())
        asked = [(slot, slot.ongoing_poll) for slot in live if slot.ongoing_poll is not None]
        refs = [task.task for _, task in asked]
        done = set(ray.wait(refs, num_returns=len(refs), timeout=timeout)[0]) if refs else set()
        for slot, task in asked:
            if task.task in done:
                slot.ongoing_poll = None
                try:
                    slot.answer = ray.get(task.task)
                except ActorUnavailableError:
                    slot.ongoing_poll = None  # The worker cannot be reached now; the next round asks again.
                except RayActorError as error:
                    slot.answer = error
                except Exception as error:
                    # If the worker has already told the others of its error, with a traceback, that one is shown.
                    failure = RunFailedError(
                        f"what worker {slot.index}'s training function returned or raised could not be brought here: "
                        f"{type(error).__name__}: {_short(error)}"
                    )
                    slot.answer = WorkerStatus(running=False, error=failure)

    def _collect_starts(self) -> None:
        """Take over the workers that have started, and start those again that have not."""
        for slot in self.slots:
            if slot.state is not SlotState.STARTING or slot.start is None:
                continue
            if not slot.start.done:
                self._tell_of_waiting(slot)
                continue
            start, slot.start = slot.start, None
            if start.worker is not None:
                slot.go_live(start.worker, self._replica_group_callbacks)
            elif isinstance(start.error, StartCancelled):
                slot.state = SlotState.DEAD
            elif isinstance(start.error, RayActorError):
                slot.start_failures += 1
                if slot.start_failures >= MAX_START_FAILURES:
                    self._bury(slot, f"its worker died {MAX_START_FAILURES} times while starting: {start.error}")
                else:
                    slot.begin(self._plan, delay_s=float(slot.start_failures))
            elif any(other.state is SlotState.LIVE for other in self.slots):
                self._try_again_later(slot, start.error)
            else:
                self._errors[slot.index] = (
                    start.error
                    if isinstance(start.error, Exception)
                    else RunFailedError(f"Worker {slot.index} could not be started: {start.error!r}")
                )
                slot.state = SlotState.DEAD

    def _try_again_later(self, slot: Slot, error: BaseException | None) -> None:
        """A worker could not be started for a reason that may pass: others train, so it costs them nothing to wait."""
        pause_s = slot.begin_again(self._plan)
        reason = f"it could not be started ({type(error).__name__}: {_short(error or Exception())})"
        until_then = f"The next try is in {pause_s:.0f} s; the run goes on without it until then."
        logger.warning("Worker %d: %s. %s", slot.index, reason, until_then)
        self._hub.slot_vacant(slot.index, reason)

    def _settle(self, *, fresh: bool) -> None:
        """Decide what the answers mean for each slot.

        Args:
            fresh: Whether the membership actor has answered in this round.
        """
        status = self._hub.status
        ended, failed = status.get("state") == "ended", status.get("state") == "failed"
        members = {m["slot"]: m for m in status.get("members", [])} if fresh else {}
        for slot in self.slots:
            if slot.state is not SlotState.LIVE:
                continue
            member = members.get(slot.index)
            present = member is not None and member.get("alive", True)
            # It may have joined and been dropped between two polls.
            slot.was_member |= present or status.get("num_joined", {}).get(slot.index, 0) > slot.num_joined
            answer = slot.answer
            if isinstance(answer, RayActorError):
                self._lose(slot, f"its process died: {_short(answer)}", refill=not (ended or failed), over=ended)
            elif answer is None:
                self._check_hanging(slot, fresh and not present, ended or failed)
            elif answer.error is not None:
                if meaning_of(answer.error) is ErrorMeaning.LEFT:
                    self._lose(slot, "it was dropped by its peers", refill=not (ended or failed), over=ended)
                else:
                    self._errors.setdefault(slot.index, answer.error)
            elif not answer.running and fresh:
                if ended or (member or {}).get("finished"):
                    slot.finish(answer.return_value)
                else:
                    self._lose(slot, "it left", refill=not failed, over=False)
        live = any(slot.state is SlotState.LIVE for slot in self.slots)
        if ended or (not live and any(slot.state is SlotState.FINISHED for slot in self.slots)):
            for slot in self.slots:
                if slot.state in (SlotState.STARTING, SlotState.DEAD):
                    slot.finish(None)
        for index in status.get("dead_slots", []):
            if self.slots[index].state is SlotState.STARTING:
                self._bury(self.slots[index], "its workers died three times without a committed step")
        if failed and self._failing_since is None:
            self._failing_since = time.monotonic()

    def _check_hanging(self, slot: Slot, dropped: bool, over: bool) -> None:
        if slot.ongoing_poll is None:
            return
        silent_s = time_monotonic() - slot.ongoing_poll.start_time
        if silent_s > self._worker_health_check_timeout_s:
            self._lose(slot, f"it did not answer for {silent_s:.0f} s", refill=not over, over=over)
        elif silent_s > _STOPPED_S and dropped and slot.was_member:
            self._lose(slot, f"its peers dropped it, and it has not answered for {silent_s:.1f} s", refill=not over)

    def _lose(self, slot: Slot, reason: str, *, refill: bool, over: bool = False) -> None:
        """Drop a slot's worker, and refill the slot or not."""
        self._hub.slot_lost(slot.index, reason)
        logger.warning("Worker %d is lost: %s.%s", slot.index, reason, " It is started anew." if refill else "")
        slot.drop_worker()
        slot.num_joined = self._hub.status.get("num_joined", {}).get(slot.index, 0)
        if over:
            slot.finish(None)
        elif refill:
            slot.begin(self._plan)
        else:
            slot.state = SlotState.DEAD

    def _bury(self, slot: Slot, reason: str) -> None:
        logger.warning("Worker %d is not started again: %s.", slot.index, reason)
        self._hub.slot_vacant(slot.index, reason)
        slot.stop_start()
        slot.state, slot.lost_reason = SlotState.DEAD, reason

    def _tell_of_waiting(self, slot: Slot) -> None:
        waited = time.monotonic() - slot.waiting_since
        if slot.start is None or slot.start.placed:
            return
        if waited > _TELL_VACANT_S and not slot.vacant_told:
            slot.vacant_told = True
            self._hub.slot_vacant(slot.index, "no node has room for it")
        if waited > _TELL_USER_S and not slot.user_told:
            slot.user_told = True
            logger.warning(
                "Worker %d waits for %s; free in the cluster: %s. The run goes on without it until then.",
                slot.index,
                slot.spec.resources,
                describe_free([slot.spec]),
            )

    # What Ray is told

    def _errors_to_raise(self) -> dict[int, Exception]:
        """The errors to end the run with, once the one that matters is known."""
        if not self._errors and all(slot.state is SlotState.DEAD for slot in self.slots):
            reasons = dict.fromkeys(slot.lost_reason for slot in self.slots if slot.lost_reason)
            return {0: RunFailedError("No worker is left: " + "; ".join(reasons) + ".")}
        if not self._errors and self._failing_since is None:
            return {}
        if any(meaning_of(error) is ErrorMeaning.USER for error in self._errors.values()):
            return foremost(self._errors)
        # Workers that only report a failure often come before the one that knows the reason: wait for that one.
        self._failing_since = self._failing_since or time.monotonic()
        if time.monotonic() - self._failing_since < _REASON_S:
            return {}
        failure = self._hub.status.get("failure")
        return {0: RunFailedError(failure)} if failure else self._errors

    def _all_finished(self) -> bool:
        return all(slot.state is SlotState.FINISHED for slot in self.slots)

    def _training_report(self, report: dict[str, Any]) -> _TrainingReport:
        path = report.get("checkpoint")
        checkpoint = Checkpoint(path, filesystem=self._storage_context.storage_filesystem) if path else None
        return _TrainingReport(checkpoint=checkpoint, metrics=dict(report["metrics"]), validation=False)

    def _statuses(
        self, *, running: bool, report: _TrainingReport | None = None, errors: dict[int, Exception] | None = None
    ) -> WorkerGroupPollStatus:
        errors = errors or {}
        # Ray takes Result.return_value from slot 0, which may have ended without a worker.
        value = next((slot.return_value for slot in self.slots if slot.return_value is not None), None)
        return WorkerGroupPollStatus(
            worker_statuses={
                slot.index: WorkerStatus(
                    running=running and slot.index not in errors,
                    error=errors.get(slot.index),
                    training_report=report,
                    return_value=None if running else value if slot.index == 0 else slot.return_value,
                )
                for slot in self.slots
            }
        )

    def _tell(self, status: WorkerGroupPollStatus) -> None:
        for callback in self._callbacks:
            callback.after_worker_group_poll_status(status)

    # End

    def shutdown(self) -> None:
        """Stop all workers and free all places."""
        self._assert_active()
        for callback in self._callbacks:
            callback.before_worker_group_shutdown(self)
        self._end(patience_s=2)
        for callback in self._callbacks:
            callback.after_worker_group_shutdown(self._worker_group_context)

    def abort(self) -> None:
        """Stop all workers at once, after Ctrl-C."""
        self._assert_active()
        for callback in self._callbacks:
            callback.before_worker_group_abort(self._worker_group_context)
        self._end(patience_s=0.2)
        for callback in self._callbacks:
            callback.after_worker_group_abort(self._worker_group_context)

    def _end(self, patience_s: float) -> None:
        starts = [slot.start for slot in self.slots if slot.start is not None]
        for start in starts:
            start.cancel()
        last_word = self._hub.last_word()
        last_word["errors"] = {slot: str(error) for slot, error in self._errors.items()}
        self._on_end(last_word)
        _shutdown_workers(self.get_workers(), patience_s=patience_s)
        self._hub.end()
        self._plan.placement.shutdown()
        for start in starts:
            start.join(2)
        self._clear_state()

    # What Ray's callbacks see: the slots are counted, the live workers are called.

    def get_workers(self) -> list[Worker]:
        return [slot.worker for slot in self.slots if slot.worker is not None]

    def get_worker_group_state(self) -> WorkerGroupState:
        self._assert_active()
        state = self._worker_group_state
        return WorkerGroupState(state.start_time, state.placement_group_handle, self.get_workers(), None)

    def get_replica_groups(self) -> list[ReplicaGroup]:
        return [slot.replica_group for slot in self.slots if slot.replica_group is not None]

    def __len__(self) -> int:
        return len(self.slots)


def _short(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _or_none(runtime_env: dict[str, Any]) -> dict[str, Any] | None:
    """None instead of an empty runtime environment: Ray then takes a process that it keeps ready."""
    return runtime_env if any(runtime_env.values()) else None
