"""What this worker takes for its steps, told to the scoreboard."""

from __future__ import annotations

import time
from collections import deque

from raytrain_het.allocation.batch_shares import StepCost
from raytrain_het.fleet.step_time import StepTimeModel
from raytrain_het.membership.agent import MemberAgent

INTERVAL_S = 0.05
"""Steps that are shorter are told of together."""
NUM_LATEST = 200
NUM_WORTH_KEEPING = 20
NUM_FIRST = 2
"""So many first steps of a process are left out: they load and compile what later ones have."""


class Timings:
    """Collects (samples, own seconds, seconds of the whole step) and sends them now and again."""

    def __init__(self, agent: MemberAgent, global_batch_size: int) -> None:
        self._agent, self._global_batch_size = agent, global_batch_size
        self._latest: deque[tuple[int, float]] = deque(maxlen=NUM_LATEST)
        self._steps: list[tuple[int, float, float]] = []
        self._num_seen = 0
        self._last_sent = 0.0

    def step_done(self, samples: int, waited_s: float, cycle_s: float) -> None:
        """From one opening to the next a step took ``cycle_s``, of which this worker waited ``waited_s`` for peers."""
        self._num_seen += 1
        if self._num_seen <= NUM_FIRST:
            return
        own_s = max(cycle_s - waited_s, 1e-9)
        if samples:
            self._latest.append((samples, own_s))
        self._steps.append((samples, own_s, cycle_s))
        now = time.monotonic()
        if now - self._last_sent >= INTERVAL_S:
            self._agent.tell("timing", global_batch_size=self._global_batch_size, steps=self._steps)
            self._steps, self._last_sent = [], now

    def learnt(self, start: StepCost | None) -> StepCost | None:
        """This worker's step time, as its last steps say; None after too few of them."""
        if len(self._latest) < NUM_WORTH_KEEPING:
            return None
        model = StepTimeModel(start)
        for samples, own_s in self._latest:
            model.observe(samples, own_s)
        return model.cost
