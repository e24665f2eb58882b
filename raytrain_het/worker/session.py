"""A worker's session: what its training function prepares, then the worker that has joined."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from raytrain_het.errors import EvictedError, HetError, LoopOrderError, RunFailedError
from raytrain_het.membership.agent import RunOver
from raytrain_het.worker import stock
from raytrain_het.worker.checks.unsupported import refuse
from raytrain_het.worker.context import WorkerContext
from raytrain_het.worker.data.data_plan import slice_of
from raytrain_het.worker.device_failures import device_has_failed
from raytrain_het.worker.draft import Draft
from raytrain_het.worker.making import make_worker
from raytrain_het.worker.state.extras import Extras
from raytrain_het.worker.worker import StepListener, Worker


class Session:
    """One worker's part in one run.

    Args:
        context: where it runs, and for which run.
    """

    def __init__(self, context: WorkerContext) -> None:
        self.context = context
        self.config, self.slot, self.num_slots = context.config, context.slot, context.num_slots
        self.device, self.points = context.device, context.points
        self.extras = Extras()
        """What checkpoints hold besides: add to it before ``loader.epochs()``."""
        self.listeners: list[StepListener] = []
        """Told of each committed step."""
        self.draft = Draft(context.config, self.extras)
        self.worker: Worker | None = None
        """None before ``loader.epochs()``."""

    def begin(self, num_epochs: int) -> Worker:
        """Join the run: called by ``loader.epochs`` when everything has been prepared."""
        if self.worker is not None:
            raise LoopOrderError("loader.epochs() was called twice: one loop over epochs per run.")
        worker = self.worker = make_worker(self.context, self.draft, num_epochs)
        worker.listeners = self.listeners
        worker.join(self.draft.warnings)
        return worker

    def joined(self, what: str = "this", fix: str = "join the run first.") -> Worker:
        """The worker.

        Args:
            what: the call that needs it.
            fix: what to do first.

        Raises:
            LoopOrderError: it has not joined yet.
        """
        if self.worker is None:
            raise LoopOrderError(f"{what} was called before loader.epochs(): {fix}")
        return self.worker

    def register_state(self, name: str, obj: Any) -> None:
        """See :func:`raytrain_het.register_state`."""
        if self.worker is not None and not self.draft.has_registered(name, obj):
            raise LoopOrderError(
                f"register_state({name!r}, ...) was called after loader.epochs(): the state that this worker began "
                "from has been taken over already, without it. Call it before loader.epochs()."
            )
        self.draft.register_state(name, obj)

    def num_participants(self) -> int:
        """Members that take part in the steps now; before the run has begun, the slots."""
        if self.worker is None or self.worker.agent.record is None:
            return self.num_slots
        return self.worker.num_participants()

    def leave(self) -> None:
        """Leave the run in good order after the step under way: the others go on without this worker."""
        self.joined("leave()", "there is no run yet to leave.").leave()

    def await_reports(self) -> None:
        """Return when every report made so far is registered, with its checkpoint."""
        if self.worker is not None:
            self.worker.reports.reporter.wait()

    def finish(self) -> None:
        """The training function has returned: nothing of this worker's may be lost when its process goes.

        Raises:
            LoopOrderError: it has not trained with the others at all.
        """
        if self.worker is None:
            left_out = " and ".join([*self.draft.missing(), "a turn of `for epoch in loader.epochs(n)`"])
            raise refuse("own loop", f"worker {self.slot} returned without {left_out}")
        self.worker.finish()

    def close(self) -> None:
        """Let go of threads and sockets, and take everything off torch that was put there."""
        self.draft.close()
        if self.worker is not None:
            self.worker.close()


_current: Session | None = None
_lock = threading.Lock()


def current() -> Session:
    """The session of this worker.

    Raises:
        LoopOrderError: called outside of a training function.
    """
    if _current is None:
        raise LoopOrderError(
            "this works only inside a training function that HetTrainer(train_fn, ...).fit() runs on its workers."
        )
    return _current


def run_worker(train_fn: Callable[[], Any], **kwargs: Any) -> Any:
    """Run a training function in a session of its own, to its orderly end.

    Args:
        train_fn: the user's function, its config already bound.
        kwargs: those of :class:`~raytrain_het.worker.context.WorkerContext`.

    Returns:
        What the function returned; None if this worker was let go before its end.

    Raises:
        Exception: what the function raised; the other workers know of it by then.
    """
    global _current
    session = Session(WorkerContext(**kwargs))
    with _lock:
        _current = session
    try:
        with stock.refused(session.num_slots):
            result = _run_to_its_end(train_fn)
        session.finish()
        return result
    except RunOver:
        if session.worker is not None:
            session.worker.hand_on()
        return None
    except EvictedError:
        raise
    except RunFailedError as error:
        raise _with_samples(session, error) from None
    except BaseException as error:
        if device_has_failed(error):
            raise EvictedError(f"the device of worker {session.slot} has failed: {error}") from error
        if session.worker is not None:
            session.worker.raised(error)
        raise
    finally:
        session.close()
        with _lock:
            _current = None


def _run_to_its_end(train_fn: Callable[[], Any]) -> Any:
    """``sys.exit(0)`` ends a script in good order, and so a function."""
    try:
        return train_fn()
    except SystemExit as end:
        if end.code not in (None, 0):
            raise
        return None


def _with_samples(session: Session, error: RunFailedError) -> HetError:
    """Name the samples that the dead workers had, if this worker stands before their step."""
    poison, worker = error.poison, session.worker
    if not poison or worker is None or worker.engine.cursor.step + 1 != poison["step"]:
        return error
    cursor, plan = worker.engine.cursor, worker.engine.passes.plan
    order, batch = plan.permutation(cursor.epoch), plan.batch_at(cursor)
    slices = [slice_of(batch, poison["shares"], rank) for rank in poison["ranks"]]
    samples = [int(order[k]) for positions in slices for k in positions]
    return RunFailedError(f"{error} Samples of the last dead workers: {samples[:64]}", poison)
