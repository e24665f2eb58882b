"""How long the communication thread waits, and what ends a wait before its time."""

from __future__ import annotations

import time
from collections.abc import Callable

from raytrain_het.allreduce.jobs import StepJob
from raytrain_het.allreduce.transport.group import Operation
from raytrain_het.allreduce.transport.poller import Poller
from raytrain_het.membership.agent import MemberAgent

FIRST_DEADLINE_S = 2.0
DEADLINE_MARGIN_S = 0.15


class GenerationIsVoid(Exception):
    """The generation is void: what is under way is abandoned."""


class Waiter:
    """All waits of one communication thread.

    Args:
        agent: says when a generation is void, and passes a suspicion on to the hub.
        poller: where the thread waits.
        hang_limit_s: after so long the hub gives up a member; deadlines grow to a quarter of it at most.
    """

    def __init__(self, agent: MemberAgent, poller: Poller, *, hang_limit_s: float) -> None:
        self.step_s = 0.0
        """How long a step usually takes, as the last job said; deadlines follow from it. 0 while none has been done."""
        self.position = 0
        """Grows as this member comes along in its collectives: by it the hub sees who is behind."""
        self.poll_s: float | None = None
        """How often to look, where operations end without a word."""
        self.closed = False
        self._agent, self._poller, self._hang_limit_s = agent, poller, hang_limit_s

    def until(self, condition: Callable[[], bool], generation: int, step: int, *, peers: bool) -> None:
        """Wait for a condition. While peers are waited for, the hub hears of each deadline that passes; the next one is
        twice as long.

        Raises:
            GenerationIsVoid: the generation is void.
        """
        deadline = FIRST_DEADLINE_S if self.step_s == 0 else DEADLINE_MARGIN_S + self.step_s
        suspect_at = time.monotonic() + deadline
        while not condition():
            if self.interrupted(generation):
                raise GenerationIsVoid
            now = time.monotonic()
            if peers and now >= suspect_at:
                self._agent.suspect(generation, step)
                deadline = max(deadline, min(2 * deadline, self._hang_limit_s / 4))
                suspect_at = now + deadline
            self._poller.wait(self.poll_s or (min(max(suspect_at - now, 0.001), 1.0) if peers else 1.0))

    def finish(self, operation: Operation, generation: int, step: int) -> None:
        """Wait for an operation with the peers; its error is raised."""
        self.until(lambda: operation.done, generation, step, peers=True)
        operation.result()

    def finish_of_step(self, operation: Operation, job: StepJob) -> float:
        """Wait for an operation of a step's. Returns the seconds in which only peers were waited for: those after the
        training thread had filled the last bucket."""
        began = time.monotonic()
        self.finish(operation, job.generation, job.step)
        return max(0.0, time.monotonic() - max(began, job.all_full_at)) if job.all_full_at else 0.0

    def interrupted(self, generation: int) -> bool:
        """Whether nothing more is to be done in this generation."""
        agent, record = self._agent, self._agent.record
        return (
            self.closed
            or agent.gone is not None
            or agent.void > generation
            or agent.answered > generation
            or (record is not None and record.number > generation)
        )
