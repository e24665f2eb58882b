"""The generation that a worker's steps are done in: entered when its group stands and this worker holds its base."""

from __future__ import annotations

from collections.abc import Callable

from raytrain_het.allreduce.communicator import Communicator
from raytrain_het.allreduce.jobs import ConfirmJob, ConfirmResult, Entered, SendBuffers
from raytrain_het.membership.agent import MemberAgent
from raytrain_het.membership.record import Record
from raytrain_het.worker.state.healing import Healing


class Generations:
    """Used by the training thread.

    Args:
        agent: which record is in force.
        communicator: whose group stands.
        healing: makes this worker hold the record's base.
    """

    def __init__(self, agent: MemberAgent, communicator: Communicator, healing: Healing) -> None:
        self.agent, self.healing = agent, healing
        self._comm = communicator
        self.record: Record | None = None
        """The generation that was entered last."""
        self.send_buffers: SendBuffers | None = None
        """Where the next step's gradients can be gathered."""
        self.confirmed = 0
        """Steps up to this one are committed on every member."""
        self.on_enter: list[Callable[[Record], None]] = []
        self.on_confirm: list[Callable[[int], None]] = []
        self._confirm: ConfirmJob | None = None

    def enter(self) -> Record:
        """The record in force, once its group stands and this worker holds its base."""
        while True:
            # While a member heals its training thread waits for no collective: the member that it heals from may have
            # stopped, and no deadline of a collective would tell the hub.
            entered = self._entered(after=-1, for_peers=True)
            record = entered.record
            if record is self.record:
                return record
            if not self.healing.take_over(record):
                continue  # The generation was superseded while this worker was healing.
            self.record, self.send_buffers = record, entered.send_buffers
            for listener in self.on_enter:
                listener(record)
            self.confirm_up_to(record.base)
            return record

    def entered_after(self, number: int) -> Entered:
        """The first generation after this one that is in force and whose group stands."""
        return self._entered(after=number, for_peers=False)

    def _entered(self, *, after: int, for_peers: bool) -> Entered:
        agent, comm = self.agent, self._comm

        def stands() -> Entered | None:
            entered = comm.entered
            current = entered is not None and entered.record.number > after and agent.is_current(entered.record.number)
            return entered if current else None

        wait = agent.wait_for_peers if for_peers else agent.wait_for
        while True:
            wait(stands)
            if (entered := stands()) is not None:
                return entered

    # ---------------------------------------------------------------- the end of an epoch

    def begin_confirmation(self, generation: int, step: int) -> None:
        """The epoch's last step is committed here: ask the others whether it is there."""
        self._confirm = ConfirmJob(generation, step)
        self._comm.submit(self._confirm)

    @property
    def awaits_confirmation(self) -> bool:
        """Whether that is not known yet."""
        return self._confirm is not None

    def await_confirmation(self) -> None:
        """Until all have committed the epoch's last step: by the round, or by the next generation's base."""
        confirm = self._confirm
        if confirm is None:
            return
        self.agent.wait_for(lambda: confirm.over)
        if confirm.result is not None and confirm.result.error is not None:
            raise confirm.result.error
        if isinstance(confirm.result, ConfirmResult):
            self.confirm_up_to(confirm.step)
            if confirm.result.want > confirm.generation:
                self.agent.answer_want(confirm.result.want)
        self._confirm = None

    def confirm_up_to(self, step: int) -> None:
        """All members have committed this step."""
        if step > self.confirmed:
            self.confirmed = step
            for listener in self.on_confirm:
                listener(step)
