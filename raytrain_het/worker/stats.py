"""What a worker tells the hub of itself: for people, never for decisions of a step."""

from __future__ import annotations

import math
import os
import time
from typing import Any

from raytrain_het.membership import protocol
from raytrain_het.membership.pace import pace_s
from raytrain_het.worker.connections import Connections
from raytrain_het.worker.context import WorkerContext
from raytrain_het.worker.data.data_plan import slice_of
from raytrain_het.worker.draft import Prepared
from raytrain_het.worker.step.engine import Engine

INTERVAL_S = 0.5
LEFT_OUT_INTERVAL_S = 5.0
"""What a codec has left out takes a pass over as many numbers as there are parameters."""


class StatsReporter:
    """Of one worker.

    Args:
        context: where it is.
        prepared: says how large a full batch is, and how often gradients were clipped.
        connections: to the hub.
        engine: counts.
    """

    def __init__(self, context: WorkerContext, prepared: Prepared, connections: Connections, engine: Engine) -> None:
        self._agent, self._communicator, self._engine = connections.agent, connections.communicator, engine
        self._plan, self._update = prepared.data.plan, prepared.update
        self._where: dict[str, Any] = {"device": str(context.device), "node_ip": context.node_ip, "pid": os.getpid()}
        self._sent_at = -math.inf
        self._left_out: tuple[float, float | None] = (-math.inf, None)
        """When it was looked at, and its norm."""
        self._reported: dict[str, float] = {}
        """What had been counted at the last report."""

    def send_if_due(self) -> None:
        """Now and again."""
        record = self._agent.record
        if time.monotonic() - self._sent_at >= pace_s(INTERVAL_S, len(record.members) if record is not None else 1):
            self.send()

    def send(self) -> None:
        """How far this worker is, and what it has done."""
        self._sent_at = time.monotonic()
        engine, communicator, counters = self._engine, self._communicator, self._engine.counters
        stats = protocol.Stats(
            step=engine.cursor.step,
            epoch=engine.cursor.epoch,
            samples=counters.samples,
            global_samples=self._plan.samples_before(engine.cursor),
            steps=counters.steps,
            skipped=counters.skipped,
            redone=counters.redone,
            clipped=self._update.num_clipped,
            compute_s=counters.compute_s,
            wait_s=counters.wait_s,
            bytes_sent=communicator.moved.sent,
            bytes_received=communicator.moved.received,
            batch_share=self.batch_share(),
            step_s=engine.committing.step_s,
            left_out=self._norm_left_out(),
            told=self._agent.loop_progress(),
            **self._where,
        )
        self._agent.tell(stats)

    def committed(self, started: float) -> None:
        """A step that began then is done: the first one is the beginning of training."""
        self._reported.setdefault("seconds", started)
        self.send_if_due()

    def since_report(self) -> dict[str, Any]:
        """What this worker has done since its last report, or its first step: seconds, steps, steps in which gradients
        were clipped, samples and bytes sent."""
        counters = self._engine.counters
        now: dict[str, float] = {
            "seconds": time.monotonic(),
            "steps": counters.steps,
            "clipped_steps": self._update.num_clipped,
            "samples": counters.samples,
            "bytes_sent": self._communicator.moved.sent,
        }
        before, self._reported = {"seconds": now["seconds"]} | self._reported, now
        return {name: value - before.get(name, 0) for name, value in now.items()}

    def batch_share(self) -> int:
        """Samples of a full global batch that are this worker's, under the record in force."""
        record = self._agent.record
        rank = record.rank_of(self._agent.uid) if record else None
        return len(slice_of(range(self._plan.full_batch), record.shares, rank)) if record and rank is not None else 0

    def _norm_left_out(self) -> float | None:
        looked_at, norm = self._left_out
        now = time.monotonic()
        if not norm or now - looked_at >= LEFT_OUT_INTERVAL_S:
            norm = self._communicator.codec_states.norm()
            self._left_out = now, norm
        return norm
