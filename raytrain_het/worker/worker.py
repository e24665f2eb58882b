"""A worker that has joined its run: what its training function can ask of it, and its orderly end."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from raytrain_het.allreduce.communicator import Communicator
from raytrain_het.allreduce.step_summary import StepSummary
from raytrain_het.membership.agent import MemberAgent, RunOver
from raytrain_het.membership.protocol import Finish, Leave, Raised
from raytrain_het.membership.record import Record
from raytrain_het.worker.checks.unsupported import refuse
from raytrain_het.worker.connections import Connections
from raytrain_het.worker.draft import Prepared
from raytrain_het.worker.reports import Reports
from raytrain_het.worker.state.evaluations import Evaluations
from raytrain_het.worker.state.handing_on import HandingOn
from raytrain_het.worker.state.last_words import text_of, traceback_of
from raytrain_het.worker.state.replica import Replica
from raytrain_het.worker.stats import StatsReporter
from raytrain_het.worker.step.engine import Engine
from raytrain_het.worker.step.open_step import OpenStep
from raytrain_het.worker.step.step_record import StepRecord
from raytrain_het.worker.step.timings import KnownSpeed

logger = logging.getLogger("raytrain_het")

StepListener = Callable[[StepRecord], None]


@dataclass(frozen=True)
class Tellers:
    """What tells the hub of this worker."""

    stats: StatsReporter
    reports: Reports
    speed: KnownSpeed | None
    """None where speeds do not matter."""


class Worker:
    """Used by the training thread.

    Args:
        prepared: what it has joined with.
        connections: to the hub and to peers.
        engine: drives its steps.
        tellers: what tells the hub of it.
        num_epochs: that its loop goes over.
    """

    def __init__(
        self,
        prepared: Prepared,
        connections: Connections,
        engine: Engine,
        tellers: Tellers,
        num_epochs: int,
    ) -> None:
        self.prepared, self.connections, self.engine = prepared, connections, engine
        self.stats, self.reports = tellers.stats, tellers.reports
        self.epoch = 0
        """The epoch under way in the training function."""
        self.listeners: list[StepListener] = []
        """Told of each committed step."""
        self._speed, self._num_epochs = tellers.speed, num_epochs
        self._evaluations = Evaluations()
        self._leaving = False
        communicator, reporter = connections.communicator, tellers.reports.reporter
        self._handing_on = HandingOn(self.agent, connections.server, communicator.codec_states)
        self._watched_steps = register_optimizer_step_pre_hook(self._check_optimizer)
        engine.committing.on_commit.append(self._committed)
        engine.generations.on_confirm.append(reporter.send_up_to)
        engine.generations.on_enter.append(self._entered)
        self.agent.on_reconnect.append(self._tell_a_new_hub)
        self.agent.doing.otherwise, self.agent.loop_progress = engine.doing, reporter.told

    @property
    def agent(self) -> MemberAgent:
        """Its side of membership."""
        return self.connections.agent

    @property
    def communicator(self) -> Communicator:
        """Its side of the all-reduce."""
        return self.connections.communicator

    @property
    def replica(self) -> Replica:
        """Its copy of what all workers share."""
        return self.engine.replica

    def join(self, warnings: list[str]) -> None:
        """Say hello to the hub, and wait for the first generation."""
        self.agent.join()
        self.engine.start()
        record = self.connections.record()
        self.reports.reporter.begins(record.life, self.engine.cursor.step + (not record.reset))
        for text in warnings:
            self.connections.tell_warning(text)

    # ---------------------------------------------------------------- what the training function asks

    def report(self, metrics: dict[str, Any], *, reduce: dict[str, str] | None, checkpoint: bool) -> None:
        """See :func:`raytrain_het.report`."""
        self.reports.make(metrics, self.epoch, reduce=reduce, checkpoint=checkpoint)

    def evaluate(self, num_chunks: int, run_chunk: Callable[[int], dict[str, float]], name: str) -> dict[str, float]:
        """Sums over all chunks, computed by whoever is free; the same on every worker that asks for them there."""
        engine, body = self.engine, self.engine.open_body
        under = "" if body is None else str(body.job.generation)
        # Who was away at the epoch's end asks for what the others have found there.
        step = engine.end_of(self.epoch) if engine.has_missed_an_epochs_end else engine.cursor.step
        return self._evaluations.sums(self.agent, step, name, num_chunks, run_chunk, under)

    def num_participants(self) -> int:
        """Members that take part in the steps now."""
        record = self.connections.record()
        return len(record.members) - len(record.unhealed)

    def leave(self) -> None:
        """Leave the run in good order after the step under way: the others go on without this worker."""
        self._leaving = True
        self.agent.tell(Leave())

    # ---------------------------------------------------------------- what it listens to

    def _entered(self, record: Record) -> None:
        """Reports of the time in which it was away are not its business."""
        if self.agent.uid in record.fresh:
            self.reports.reporter.begins(record.life, record.base + 1)

    def _committed(self, step: OpenStep, summary: StepSummary) -> None:
        self.reports.reporter.went_on(step.record.life, step.number)
        if self.listeners:
            note = StepRecord.of(step, summary, self.engine.passes.plan, self.agent.uid, self._digest)
            for listener in self.listeners:
                listener(note)
        self.stats.committed(step.started)

    def _digest(self) -> int:
        return self.replica.digest(optimizer=True)

    def _tell_a_new_hub(self) -> None:
        self.reports.reporter.resend()
        self.stats.send()
        if self._leaving:
            self.agent.tell(Leave())

    def _check_optimizer(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Called before each step of any optimizer in this process.

        Raises:
            NotSupportedError: it is not the prepared one, and it trains the same parameters, or steps while a step is
                open.
        """
        if optimizer is self.prepared.optimizer or self.prepared.update.under_way:
            return
        ours = {id(p) for p in self.prepared.model.parameters()}
        trains_ours = any(id(p) in ours for group in optimizer.param_groups for p in group["params"])
        if trains_ours or self.engine.open_body is not None:
            raise refuse("other optimizer", f"a {type(optimizer).__name__}")

    # ---------------------------------------------------------------- the end

    def finish(self) -> None:
        """The training function has returned: nothing of this worker's may be lost when its process goes.

        Raises:
            LoopOrderError: it has not trained with the others at all.
        """
        engine, agent, reporter = self.engine, self.agent, self.reports.reporter
        if engine.opened is None and engine.cursor.step == 0 and not self._evaluations.any:
            slot = agent.member.slot
            raise refuse("own loop", f"worker {slot} returned in epoch 0 without a turn of `for batch in loader`")
        if self._speed is not None:
            self._speed.keep(engine.timings)
        engine.abandon()
        reporter.flush()
        self.stats.send()
        complete = engine.cursor.epoch >= self._num_epochs

        def say() -> None:
            cursor = agent.cursor
            confirmed = engine.generations.confirmed >= cursor.step
            agent.tell(Finish(cursor=cursor, confirmed=confirmed, told=reporter.told(complete=complete)))

        agent.on_reconnect.append(say)
        say()
        step = agent.cursor.step
        with agent.doing.call("returned", f"returned after step {step}"), contextlib.suppress(RunOver):
            agent.wait_for_peers(lambda: agent.finished)

    def hand_on(self) -> None:
        """The others go on without this worker: what it has left to give goes to one of them."""
        asked_to = self._leaving or self.agent.heir is not None  # By the program, or since its machine is taken away.
        if asked_to and not self._handing_on.hand_on():
            logger.warning(
                "worker %d leaves, and what its codec has left out of its gradients is lost: nobody stands where it "
                "does, or nobody came for it.",
                self.agent.member.slot,
            )

    def raised(self, error: BaseException) -> None:
        """Tell the hub before unwinding: no generation follows, nobody waits for this worker."""
        if self.agent.gone is None:
            self.agent.tell(Raised(error=traceback_of(error), last=text_of(error).splitlines()[0][:500]))

    def close(self) -> None:
        """Let go of threads and sockets, and take everything off torch that was put there."""
        self.engine.close_down()
        self._watched_steps.remove()
        self.connections.close()
