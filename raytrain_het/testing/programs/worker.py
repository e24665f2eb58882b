"""A process of the pool: it runs one program after the other, as a worker or as the reference."""

from __future__ import annotations

import dataclasses
import faulthandler
import multiprocessing.connection
import os
import pickle
import signal
import threading
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # Imported by every optimizer's first step: once in the fork server.

import raytrain_het
from raytrain_het.config import HetConfig
from raytrain_het.errors import EvictedError, HetError, ProtocolError
from raytrain_het.testing import faults as fault_kit
from raytrain_het.testing.lab_worker import end_with, ledger_entry
from raytrain_het.testing.ledger import LedgerWriter
from raytrain_het.testing.programs.plain import Used, run_plain
from raytrain_het.testing.programs.program import Program
from raytrain_het.testing.programs.traces import NoteWriter, Outcome, StepNote, bits_of, state_of
from raytrain_het.worker import session as sessions
from raytrain_het.worker.state.checkpoint import LocalStorage
from raytrain_het.worker.step.step_record import StepRecord


@dataclass(frozen=True, kw_only=True)
class ProgramRun:
    """One run of a program in one process of the pool."""

    program: Program
    text: str
    config: HetConfig
    directory: Path
    slot: int = 0
    life: int = 0
    """How often the whole run has been resumed from a checkpoint, with a new hub."""
    faults: tuple[fault_kit.Fault, ...] = ()
    used: dict[int, Used] | None = None
    """By step, the samples that the run has used. If given, this process is the reference."""


def serve(connection: multiprocessing.connection.Connection, parent: int, stacks: str) -> None:
    """Run programs until the other end of the connection is gone."""
    threading.Thread(target=end_with, args=(parent,), name="het-programs", daemon=True).start()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    warnings.filterwarnings("ignore")
    file = open(stacks, "w")  # noqa: SIM115 - it stays open as long as the process lives
    faulthandler.register(signal.SIGUSR1, file=file, all_threads=True)
    connection.send_bytes(b"ready")
    while True:
        try:
            job: ProgramRun = pickle.loads(connection.recv_bytes())
        except EOFError:
            os._exit(0)
        if job.used is not None:
            outcome = run_plain(job.program, job.text, job.config, job.used)
        else:
            outcome = _run(job)
        try:
            answer = pickle.dumps(outcome)
        except Exception as error:  # What the function returned may be of the program's own class.
            outcome.value = f"not picklable: {error}"
            answer = pickle.dumps(outcome)
        connection.send_bytes(answer)


class Watched:
    """The ``het`` of a program: raytrain_het, with notes of the model, the optimizer and every committed step."""

    def __init__(self, job: ProgramRun) -> None:
        self._job = job
        self.model: torch.nn.Module | None = None
        self.optimizer: torch.optim.Optimizer | None = None
        self._ledger = LedgerWriter(job.directory / f"ledger_{job.slot}_{os.getpid()}.jsonl")
        self._notes = NoteWriter(job.directory / f"{job.slot}_{os.getpid()}.notes")

    def __getattr__(self, name: str) -> Any:
        return getattr(raytrain_het, name)

    def prepare_model(self, model: Any) -> Any:
        prepared = raytrain_het.prepare_model(model)
        self.model = prepared
        return prepared

    def prepare_optimizer(self, optimizer: Any) -> Any:
        prepared = raytrain_het.prepare_optimizer(optimizer)
        self.optimizer = prepared
        return prepared

    def committed(self, note: StepRecord) -> None:
        """Write the ledger and the notes of a step that was committed here."""
        state = state_of(self.model, self.optimizer)
        plan = sessions.current().joined().engine.passes.plan
        batch = plan.permutation(note.epoch)[note.offset : note.offset + note.batch_size].tolist()
        generation = self._job.life * 100_000 + note.generation  # A new hub counts from 1 again.
        slices = {uid: (int(s[0]), int(s[1])) for uid, s in note.slices.items()}
        self._ledger.append(dataclasses.replace(ledger_entry(note), generation=generation))
        self._notes.append(
            StepNote(
                step=note.step,
                epoch=note.epoch,
                state=state,
                bits=bits_of(state),
                generation=generation,
                slot=self._job.slot,
                slices=slices,
                uid=note.uid,
                offset=note.offset,
                batch=batch,
                own=[int(k) for k in note.own_samples],
            )
        )


def _run(job: ProgramRun) -> Outcome:
    where = job.directory / "hub.pickle"
    watched = Watched(job)
    space: dict[str, Any] = {
        "__name__": "__main__",
        "het": watched,
        "RANK": job.slot,
        "WORLD": job.program.workers,
    }

    def train() -> tuple[Any]:
        session = sessions.current()
        directory = str(job.directory)
        fault_kit.install(job.faults, job.slot, directory, session.points, session.leave, session.await_reports)
        session.listeners.append(watched.committed)
        exec(compile(job.text, "<program>", "exec"), space)
        return (space["train_fn"](),)

    outcome = Outcome(kind="gone")
    try:
        done = sessions.run_worker(
            train,
            config=job.config,
            slot=job.slot,
            num_slots=job.program.workers,
            locate=lambda: pickle.loads(where.read_bytes()),
            storage=LocalStorage(job.directory / "storage"),
            device=torch.device("cpu"),
            node_ip="127.0.0.1",
        )
        if done is not None:
            outcome.kind, outcome.value = "result", done[0]
    except EvictedError as error:
        outcome.kind, outcome.error = "gone", f"EvictedError: {error}"
    except BaseException as error:
        outcome.kind, outcome.error = "error", f"{type(error).__name__}: {error}"
        outcome.error_class = type(error).__name__
        outcome.refused = isinstance(error, HetError) and not isinstance(error, ProtocolError)
        outcome.traceback = traceback.format_exc()
    outcome.final = state_of(watched.model, watched.optimizer)
    return outcome
