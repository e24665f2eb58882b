"""What this worker takes for its steps, told to the scoreboard."""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Sequence

import torch

from raytrain_het.balance.batch_shares import StepCost
from raytrain_het.balance.step_time import StepTimeModel
from raytrain_het.membership.agent import MemberAgent
from raytrain_het.membership.message_parts import Codecs, Known, Paths
from raytrain_het.membership.pace import pace_s
from raytrain_het.membership.protocol import Timing
from raytrain_het.probing.probes import hardware_key, known_or_probed
from raytrain_het.probing.profile_store import ProfileStore

INTERVAL_S = 0.05
"""Steps that are shorter are told of together."""
NUM_LATEST = 200
NUM_WORTH_KEEPING = 20
NUM_FIRST = 2
"""So many first steps of a process are left out: they load and compile what later ones have."""


class CpuSplit:
    """How much of what looks like waiting for peers is this worker's own work: its part of the messages.

    Begins with a step. On a CPU the messages take time of the same cores as the model, and a slow core needs longer
    for them too: ``c / u`` seconds with ``c`` the CPU time spent while waiting, and ``u <= 1`` the cores that this
    process got while it was busy.
    """

    def __init__(self) -> None:
        self._began = time.process_time()
        self._waiting = 0.0
        self._since = 0.0
        self._paused = 0.0

    def waiting_begins(self) -> None:
        """From here on the training thread waits."""
        self._since = time.process_time()

    def waiting_ends(self) -> None:
        """Until here."""
        self._waiting += time.process_time() - self._since

    def pauses(self) -> None:
        """What follows belongs to no step."""
        self._paused = time.process_time()

    def goes_on(self) -> None:
        """From here on it does again."""
        self._began += time.process_time() - self._paused

    def own_part_s(self, waited_s: float, cycle_s: float) -> float:
        """At the end of the step: so much of ``waited_s`` was spent on this worker's own work."""
        busy_s = cycle_s - waited_s
        busy_cpu_s = time.process_time() - self._began - self._waiting
        if busy_s <= 0 or busy_cpu_s <= 0:
            return 0.0
        return min(self._waiting / min(busy_cpu_s / busy_s, 1.0), waited_s)


class Timings:
    """Collects (samples, own seconds, seconds of the whole step) and sends them now and again."""

    def __init__(
        self,
        agent: MemberAgent,
        full_batch: int,
    ) -> None:
        self._agent, self._full_batch = agent, full_batch
        self._paths: Paths | None = None
        self._errors: list[tuple[str, float]] = []
        self._latest: deque[tuple[int, float]] = deque(maxlen=NUM_LATEST)
        self._steps: list[tuple[int, float, float]] = []
        self._num_seen = 0
        self._last_sent = 0.0

    def step_done(self, samples: int, waited_s: float, cycle_s: float, *, stand_in: bool = False) -> None:
        """From one opening to the next a step took ``cycle_s``, of which this worker waited ``waited_s`` for peers.

        What lies between two epochs' loops is in neither. With a share of 0 these are its stand-in's samples, so that
        a spare that is fast again is seen. They say little of a whole share, and are not kept for another run.
        """
        self._num_seen += 1
        if self._num_seen <= NUM_FIRST:
            return
        own_s = max(cycle_s - waited_s, 1e-9)
        if samples and not stand_in:
            self._latest.append((samples, own_s))
        self._steps.append((samples, own_s, cycle_s))
        now = time.monotonic()
        record = self._agent.record
        if now - self._last_sent >= pace_s(INTERVAL_S, len(record.members) if record is not None else 1):
            self._agent.tell(
                Timing(
                    global_batch_size=self._full_batch,
                    steps=self._steps,
                    paths=self._paths,
                    errors=self._errors,
                )
            )
            self._steps, self._paths, self._errors, self._last_sent = [], None, [], now

    def saw(self, paths: Paths | None, errors: Sequence[tuple[str, float]]) -> None:
        """What the communication thread has seen: how long messages were on the way, and what codecs lose of them.
        It is told with the next steps."""
        self._paths = paths or self._paths
        self._errors += errors

    def learnt(self, start: StepCost | None) -> StepCost | None:
        """This worker's step time, as its last steps say; None after too few of them."""
        if len(self._latest) < NUM_WORTH_KEEPING:
            return None
        model = StepTimeModel(start)
        for samples, own_s in self._latest:
            model.observe(samples, own_s)
        return model.cost


class KnownSpeed:
    """What is known of this worker before its first step, and what is kept after its last.

    Args:
        device: this worker's; its hardware is measured, in about a second, if nobody has done so on this machine.
        model: what tells models apart whose steps take different times.
    """

    def __init__(self, device: torch.device, model: str) -> None:
        self._store, self._key, self._model = ProfileStore(), hardware_key(device), model
        self._profile = known_or_probed(device, store=self._store)
        self._step = self._store.step(self._key, model)

    def told(self, global_batch_size: int, codecs: Codecs | None = None) -> Known:
        """For the scoreboard."""
        profile = dataclasses.replace(self._profile, step=self._step)
        return Known(profile=profile, global_batch_size=global_batch_size, codecs=codecs)

    def keep(self, timings: Timings) -> None:
        """For the next run of this model on such hardware."""
        learnt = timings.learnt(self._step)
        if learnt is not None:
            self._store.keep_step(self._key, self._model, learnt)
