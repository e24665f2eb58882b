"""One slot: the place of one worker, and the thread that starts a worker in it.

To start a worker takes seconds. A thread of its own does it, and the controller's poll only looks whether it is done.
The first start and a refill are the same.
"""

from __future__ import annotations

import enum
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError
from ray.train.v2._internal.execution.context import DistributedContext
from ray.train.v2._internal.execution.worker_group import ReplicaGroup
from ray.train.v2._internal.execution.worker_group.poll import PollTask, WorkerStatus
from ray.train.v2._internal.execution.worker_group.worker import Worker
from ray.train.v2._internal.util import bundle_to_remote_args
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from raytrain_het.ray_train.cluster_view import node_alive, node_stays
from raytrain_het.ray_train.placement import SlotPlacement
from raytrain_het.ray_train.resources import SlotSpec

logger = logging.getLogger(__name__)

MAX_START_FAILURES = 3
MAX_PAUSE_S = 60.0
"""A worker that cannot be started for a reason that may pass is tried again at least so often."""


class SlotState(enum.Enum):
    """What a slot is doing."""

    STARTING = "starting"
    LIVE = "live"
    FINISHED = "finished"
    """The slot's worker has finished, or the run has ended without it."""
    DEAD = "dead"
    """The slot is not refilled, since its workers keep dying."""


class StartCancelled(Exception):
    """The run ended while the worker was starting."""


@dataclass
class Slot:
    """What the worker group knows of one slot."""

    index: int
    spec: SlotSpec
    state: SlotState = SlotState.STARTING
    worker: Worker | None = None
    replica_group: ReplicaGroup | None = None
    ongoing_poll: PollTask | None = None
    return_value: Any = None
    start: Start | None = None
    start_failures: int = 0
    answer: WorkerStatus | RayActorError | None = None
    """The worker's answer to this round's poll; None if it did not answer in time."""
    was_member: bool = False
    """Whether this worker has joined the others."""
    num_joined: int = 0
    """How many earlier workers of this slot had joined the others when this one was started."""
    vacant_told: bool = False
    user_told: bool = False
    lost_reason: str = ""
    waiting_since: float = field(default_factory=time.monotonic)

    def begin(self, plan: StartContext, *, delay_s: float = 0.0) -> None:
        """Begin to start a worker."""
        self.state, self.waiting_since = SlotState.STARTING, time.monotonic()
        self.vacant_told = self.user_told = False
        self.start = Start(self, plan, delay_s=delay_s)

    def begin_again(self, plan: StartContext) -> float:
        """Begin to start a worker after a pause, which doubles each time; returns the pause, seconds."""
        self.start_failures += 1
        pause_s = min(2.0**self.start_failures, MAX_PAUSE_S)
        self.begin(plan, delay_s=pause_s)
        self.vacant_told = True
        return pause_s

    def go_live(self, worker: Worker, callbacks: list[Any]) -> None:
        """Take over a worker that runs the training function."""
        self.state, self.worker, self.was_member, self.start_failures = SlotState.LIVE, worker, False, 0
        self.replica_group = ReplicaGroup([worker], dict(self.spec.resources), callbacks)

    def drop_worker(self) -> None:
        """Forget the worker and kill its process, without waiting."""
        if self.replica_group is not None:
            self.replica_group._active = False
        if self.worker is not None:
            ray.kill(self.worker.actor)
        self.worker = self.replica_group = self.ongoing_poll = self.answer = None

    def stop_start(self) -> None:
        """Give up the start that is under way, if there is one."""
        if self.start is not None:
            self.start.cancel()
            self.start = None

    def finish(self, return_value: Any) -> None:
        """Mark the slot as finished."""
        self.stop_start()
        self.state, self.return_value = SlotState.FINISHED, return_value


@dataclass(kw_only=True)
class StartContext:
    """What all starts of a run have in common. The worker group makes it."""

    placement: SlotPlacement
    runtime_env: dict[str, Any] | None
    worker_cls: type
    init_worker: Callable[[Worker], None]
    """Gives a worker Ray Train's context, the callbacks and the membership actor's handle."""

    run_worker: Callable[[Worker], None]
    """Calls the training function on a worker."""
    ranks: LocalRanks
    world_size: int


class LocalRanks:
    """Local ranks, by node. A slot keeps its local rank as long as it stays on its node."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._of: dict[int, tuple[str, int]] = {}
        self._nodes: list[str] = []

    def assign(self, slot: int, node_id: str) -> tuple[int, int, int]:
        """Assign a local rank; returns it, the local world size as known now, and the node's rank."""
        with self._lock:
            if node_id not in self._nodes:
                self._nodes.append(node_id)
            if self._of.get(slot, ("", 0))[0] != node_id:
                taken = {rank for node, rank in self._of.values() if node == node_id}
                self._of[slot] = (node_id, next(r for r in range(len(taken) + 1) if r not in taken))
            size = sum(node == node_id for node, _ in self._of.values())
            return self._of[slot][1], size, self._nodes.index(node_id)


class Start:
    """One attempt to start a worker in a slot, in a thread of its own."""

    def __init__(self, slot: Slot, plan: StartContext, *, delay_s: float = 0.0) -> None:
        self._slot, self._plan, self._delay_s = slot.index, plan, delay_s
        self._resources = slot.spec.resources
        self._cancelled = threading.Event()
        self._actor: Any = None
        self.placed = False
        self.worker: Worker | None = None
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=f"start-slot-{slot.index}", daemon=True)
        self._thread.start()

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    def cancel(self) -> None:
        """Give up the attempt. Does not wait."""
        self._cancelled.set()
        if self._actor is not None:
            ray.kill(self._actor)

    def join(self, timeout_s: float) -> None:
        self._thread.join(timeout_s)

    def _run(self) -> None:
        try:
            self._cancelled.wait(self._delay_s)
            self.worker = self._start_worker()
        except BaseException as error:
            self.error = error
            if self._actor is not None:
                ray.kill(self._actor)

    def _start_worker(self) -> Worker:
        while True:
            node_id = self._wait_for_place()
            actor = self._actor = (
                ray.remote(runtime_env=self._plan.runtime_env, **bundle_to_remote_args(self._resources))(
                    self._plan.worker_cls
                )
                .options(
                    scheduling_strategy=PlacementGroupSchedulingStrategy(
                        placement_group=self._plan.placement.groups[self._slot], placement_group_bundle_index=0
                    )
                )
                .remote()
            )
            metadata = self._await(actor.get_metadata.remote(), node_id)
            if metadata is not None:
                break
            ray.kill(actor)
        worker = Worker(actor, metadata, dict(self._resources), placement_group_bundle_index=0)
        local_rank, local_size, node_rank = self._plan.ranks.assign(self._slot, metadata.node_id)
        worker.distributed_context = DistributedContext(
            world_rank=self._slot,
            world_size=self._plan.world_size,
            local_rank=local_rank,
            local_world_size=local_size,
            node_rank=node_rank,
        )
        self._plan.init_worker(worker)
        self._check()
        self._plan.run_worker(worker)
        return worker

    def _wait_for_place(self) -> str:
        while True:
            self._check()
            group = self._plan.placement.request(self._slot)
            if group is None:
                raise StartCancelled
            if not group.wait(1):
                continue
            node_id = self._plan.placement.node_of(self._slot)
            if node_id is not None and node_stays(node_id):
                self.placed = True
                return node_id
            if node_id is not None:
                self._plan.placement.give_up_node(self._slot)

    def _await(self, ref: Any, node_id: str) -> Any:
        """The answer; None if the node is gone. The slot then needs another place."""
        while True:
            self._check()
            try:
                return ray.get(ref, timeout=1)
            except GetTimeoutError:
                if node_alive(node_id):
                    continue
            except RayActorError:
                if node_alive(node_id):
                    raise
            self.placed = False
            self._plan.placement.give_up_node(self._slot)
            return None

    def _check(self) -> None:
        if self._cancelled.is_set():
            raise StartCancelled
