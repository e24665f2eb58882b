"""One slot: the place of one worker, and the thread that brings a worker into it.

Starting a worker takes seconds, and so happens in a thread of its own: the controller's poll
only looks whether it is done. First start and refill are the same.
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

from raytrain_het.ray_train.cluster_view import node_alive
from raytrain_het.ray_train.placement import SlotPlacement
from raytrain_het.ray_train.resources import SlotSpec

logger = logging.getLogger(__name__)

MAX_START_FAILURES = 3


class SlotState(enum.Enum):
    """Where a slot stands."""

    STARTING = "starting"
    LIVE = "live"
    FINISHED = "finished"
    """Its worker came to the end, or the run ended without it."""
    DEAD = "dead"
    """Not to be refilled: workers keep dying here."""


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
    """Of this round's poll; None when there was none in time."""
    was_member: bool = False
    """Whether this worker has joined the others."""
    num_joined: int = 0
    """How many processes of this slot had done so when this one was begun."""
    vacant_told: bool = False
    user_told: bool = False
    lost_reason: str = ""
    waiting_since: float = field(default_factory=time.monotonic)

    def begin(self, plan: StartContext, *, delay_s: float = 0.0) -> None:
        """Begin to bring a worker in."""
        self.state, self.waiting_since = SlotState.STARTING, time.monotonic()
        self.vacant_told = self.user_told = False
        self.start = Start(self, plan, delay_s=delay_s)

    def go_live(self, worker: Worker, callbacks: list[Any]) -> None:
        """The worker is up and runs the training function."""
        self.state, self.worker, self.was_member, self.start_failures = SlotState.LIVE, worker, False, 0
        self.replica_group = ReplicaGroup([worker], dict(self.spec.resources), callbacks)

    def drop_worker(self) -> None:
        """Forget the worker and end its process; nobody waits for that."""
        if self.replica_group is not None:
            self.replica_group._active = False
        if self.worker is not None:
            ray.kill(self.worker.actor)
        self.worker = self.replica_group = self.ongoing_poll = self.answer = None

    def stop_start(self) -> None:
        """Give up bringing a worker in."""
        if self.start is not None:
            self.start.cancel()
            self.start = None

    def finish(self, return_value: Any) -> None:
        """The slot's part of the run is over."""
        self.stop_start()
        self.state, self.return_value = SlotState.FINISHED, return_value


@dataclass(kw_only=True)
class StartContext:
    """What every start of a run has in common; the group gives it."""

    placement: SlotPlacement
    runtime_env: dict[str, Any] | None
    worker_cls: type
    init_worker: Callable[[Worker], None]
    """Ray Train's context on a worker, its callbacks, and the membership actor's handle."""

    run_worker: Callable[[Worker], None]
    ranks: LocalRanks
    world_size: int


class LocalRanks:
    """Local ranks by node. A slot keeps its own while its node stays the same."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._of: dict[int, tuple[str, int]] = {}
        self._nodes: list[str] = []

    def assign(self, slot: int, node_id: str) -> tuple[int, int, int]:
        """Returns local rank, local world size as known now, and node rank."""
        with self._lock:
            if node_id not in self._nodes:
                self._nodes.append(node_id)
            if self._of.get(slot, ("", 0))[0] != node_id:
                taken = {rank for node, rank in self._of.values() if node == node_id}
                self._of[slot] = (node_id, next(r for r in range(len(taken) + 1) if r not in taken))
            size = sum(node == node_id for node, _ in self._of.values())
            return self._of[slot][1], size, self._nodes.index(node_id)


class Start:
    """One attempt to bring a worker into a slot."""

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
        """Give up; returns at once."""
        self._cancelled.set()
        if self._actor is not None:
            ray.kill(self._actor)

    def join(self, timeout_s: float) -> None:
        self._thread.join(timeout_s)

    def _run(self) -> None:
        try:
            self._cancelled.wait(self._delay_s)
            self.worker = self._bring_up()
        except BaseException as error:
            self.error = error
            if self._actor is not None:
                ray.kill(self._actor)

    def _bring_up(self) -> Worker:
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
            if node_id is not None and node_alive(node_id):
                self.placed = True
                return node_id
            if node_id is not None:
                self._plan.placement.give_up_node(self._slot)

    def _await(self, ref: Any, node_id: str) -> Any:
        """The answer, or None when the node went away, so that the slot needs another place."""
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
