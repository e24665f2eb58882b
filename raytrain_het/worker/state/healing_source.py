"""What a worker serves to those that heal from it: snapshots, and the settings of the steps that they replay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from raytrain_het.membership.agent import MemberAgent
from raytrain_het.membership.cursor import Cursor
from raytrain_het.membership.record import Record
from raytrain_het.worker.state.replica import Hyperparameters, Replica
from raytrain_het.worker.state.state_server import StateServer


class HealingSource:
    """Serves while this worker is the record's source. Offers are made by the training thread.

    Args:
        agent: who this worker is, and how far.
        replica: what is served.
        server: through which.
    """

    def __init__(self, agent: MemberAgent, replica: Replica, server: StateServer) -> None:
        self.server = server
        self._agent, self._replica = agent, replica
        self._offered = 0
        """The generation for which this worker offers something."""
        self._log: list[tuple[int, Hyperparameters | None]] = []
        self._logging = False

    def offer(self, record: Record, cursor: Cursor, light: dict[str, Any], random: dict[str, Any]) -> None:
        """At the opening of a step: serve those that heal, if this worker is the record's source."""
        waiting = bool(record.unhealed or record.fresh)
        self._logging = waiting and record.source == self._agent.uid
        if not waiting:
            self._log.clear()
        if record.reset and cursor.step == record.base:
            return  # What _reset offers stays until all have taken it, and so have taken part in a step.
        if record.source != self._agent.uid or self._offered == record.number:
            return
        self._offered = record.number
        for prefix in ("snapshot.", "light.", "full.", "log"):
            self.server.withdraw(prefix)
        if not waiting:
            return
        if record.unhealed:
            self.offer_snapshot(record)
        if record.fresh:
            replica = self._replica
            value = replica.offered(light) | {"digest": replica.digest(optimizer=True), "random": random}
            self.server.offer(f"light.{record.number}", lambda _: value)
            # Made when asked for: the step that would change it needs the one that asks.
            self.server.offer(f"full.{record.number}", lambda _: replica.snapshot(copy_tensors=False))
        self.server.offer("log", self._serve_log)

    def offer_snapshot(self, record: Record) -> None:
        """What this worker holds now is what the generation begins with."""
        snapshot = self._replica.snapshot()
        self.server.offer(f"snapshot.{record.number}", lambda _: snapshot)

    def log(self, step: int, hyperparameters: Callable[[], Hyperparameters | None]) -> None:
        """Keep the optimizer's settings of a step for those that will replay it; None if it was skipped."""
        if self._logging:
            self._log.append((step, hyperparameters()))

    def _serve_log(self, request: dict[str, Any]) -> list[tuple[int, Hyperparameters | None]]:
        agent = self._agent
        agent.wait_for(lambda: agent.cursor.step >= request["at_least"] or not self._logging, timeout=10.0)
        return [(step, values) for step, values in list(self._log) if step > request["after"]]
