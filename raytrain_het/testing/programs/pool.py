"""A pool of processes, and a program's run on it: the hub is in this process, the workers and the reference in
others."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from raytrain_het.files import write_whole
from raytrain_het.membership.cursor import Cursor
from raytrain_het.membership.server import Hub
from raytrain_het.testing import processes
from raytrain_het.testing.ledger import LedgerEntry, read_ledgers
from raytrain_het.testing.programs import worker
from raytrain_het.testing.programs.plain import Used
from raytrain_het.testing.programs.program import Program
from raytrain_het.testing.programs.settings import config_of, faults_of, used_in
from raytrain_het.testing.programs.text import text_of
from raytrain_het.testing.programs.traces import Outcome, StepNote, read_notes
from raytrain_het.worker.state.checkpoint import read_meta

DEADLINE_S = 60.0
"""A program that takes longer hangs: an ordinary one takes half a second. A program with data processes, each of which
imports torch first, may take three times as long."""
MAX_JOBS = 200
"""After so many programs a process is replaced by a new one."""
MAX_REFILLS = 8

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["raytrain_het.testing.programs.worker"])


@dataclass
class Kept:
    """One process of the pool."""

    process: BaseProcess
    connection: multiprocessing.connection.Connection
    stacks: Path
    jobs: int = 0

    def give(self, job: worker.ProgramRun) -> None:
        """Let the process run a program."""
        self.jobs += 1
        self.connection.send_bytes(pickle.dumps(job))

    def end(self) -> None:
        """Kill the process."""
        with contextlib.suppress(ProcessLookupError, TypeError):
            os.kill(self.process.pid, signal.SIGKILL)  # type: ignore[arg-type]
        self.process.join(timeout=10)
        self.connection.close()


@dataclass
class Ran:
    """The results of a program's run."""

    program: Program
    outcomes: dict[int, Outcome] = field(default_factory=dict)
    """By slot: how the last process in it ended."""
    plain: Outcome = field(default_factory=lambda: Outcome(kind="gone"))
    notes: list[StepNote] = field(default_factory=list)
    ledger: list[LedgerEntry] = field(default_factory=list)
    reports: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    failure: str | None = None
    hang: str = ""
    """The stacks of all threads, if time ran out."""
    used: dict[int, Used] = field(default_factory=dict)
    fault_happened: bool = False
    seconds: float = 0.0


class Pool:
    """Runs programs, one after the other. Use it as a context manager."""

    def __init__(self, *, deadline_s: float = DEADLINE_S) -> None:
        self._deadline_s = deadline_s
        self._folder = tempfile.TemporaryDirectory(prefix="het_programs_")
        self._free: list[Kept] = []
        self._count = 0

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        for kept in self._free:
            kept.end()
        self._free.clear()
        self._folder.cleanup()

    def _free_process(self) -> Kept:
        return self._free.pop() if self._free else self._new()

    def _new(self) -> Kept:
        self._count += 1
        stacks = Path(self._folder.name) / f"stacks_{self._count}"
        mine, theirs = _context.Pipe()
        process = _context.Process(target=worker.serve, args=(theirs, os.getpid(), str(stacks)))
        process.start()
        theirs.close()
        mine.recv_bytes()  # It has started. On a busy machine that takes long, and does not count as a program's time.
        return Kept(process, mine, stacks)

    def _give_back(self, kept: Kept, outcome: Outcome | None) -> None:
        # A program that raised may have left the process in any state.
        if outcome is None or outcome.kind == "error" or kept.jobs >= MAX_JOBS:
            kept.end()
        else:
            self._free.append(kept)

    def run(self, program: Program) -> Ran:
        """Run a program on its workers, then with torch alone."""
        started = time.monotonic()
        ran = Ran(program)
        while len(self._free) < program.workers:
            self._free.append(self._new())
        deadline = time.monotonic() + self._deadline_s * (3 if program.processes else 1)
        text, config = text_of(program), config_of(program)
        with tempfile.TemporaryDirectory(dir=self._folder.name) as name:
            directory = Path(name)
            jobs = [
                worker.ProgramRun(
                    program=program,
                    text=text,
                    config=config,
                    directory=directory,
                    slot=slot,
                    faults=tuple(f for f in faults_of(program) if f.slot == slot),
                )
                for slot in range(program.workers)
            ]
            _Run(self, ran, jobs, deadline).go()
            ran.notes, ran.ledger = read_notes(directory), read_ledgers(directory)
            ran.fault_happened = any(directory.glob("fault_*")) or program.fault == "hub"
            ran.used = used_in(ran.notes)
            reference = worker.ProgramRun(program=program, text=text, config=config, directory=directory, used=ran.used)
            ran.plain = self._plain(reference)
        ran.seconds = time.monotonic() - started
        return ran

    def _plain(self, job: worker.ProgramRun) -> Outcome:
        kept = self._free_process()
        kept.give(job)
        outcome: Outcome | None = None
        if kept.connection.poll(self._deadline_s):
            with contextlib.suppress(EOFError):
                outcome = pickle.loads(kept.connection.recv_bytes())
        self._give_back(kept, outcome)
        return outcome or Outcome(kind="error", error="the reference did not end")


class _Run:
    """One program's run on processes of the pool."""

    def __init__(self, pool: Pool, ran: Ran, jobs: Sequence[worker.ProgramRun], deadline: float) -> None:
        self._pool, self._ran, self._jobs, self._deadline = pool, ran, jobs, deadline
        self._directory = jobs[0].directory
        self._at_work: dict[int, Kept] = {}
        self._resumes = ran.program.fault == "resume"
        self._refills = 0
        self._hub_restarts = 1 if ran.program.fault == "hub" else 0
        self._settings = processes.hub_settings(jobs[0].config, len(jobs))
        self._hub = self._new_hub()

    def go(self) -> None:
        """Run until all workers have ended, or time runs out."""
        try:
            for job in self._jobs:
                self._start(job)
            while self._at_work:
                self._hub.acknowledge([r["key"] for r in self._hub.take_reports()])
                ready = multiprocessing.connection.wait([k.connection for k in self._at_work.values()], timeout=0.02)
                for slot, kept in list(self._at_work.items()):
                    if kept.connection in ready:
                        self._take_answer(slot, kept)
                if not self._at_work and self._resumes:
                    self._resume()
                if self._hub_restarts and self._steps() >= 2:
                    self._hub_restarts = 0
                    self._shut_down_hub()
                    self._hub = self._new_hub()
                if time.monotonic() > self._deadline:
                    self._ran.hang = f"{self._hub.status()}\n{self._stacks()}"
                    return
        finally:
            for kept in self._at_work.values():
                kept.end()
            self._shut_down_hub()

    def _steps(self) -> int:
        paths = list(self._directory.glob("ledger_0_*.jsonl"))
        return max((path.read_bytes().count(b"\n") for path in paths), default=0)

    def _start(self, job: worker.ProgramRun) -> None:
        kept = self._at_work[job.slot] = self._pool._free_process()
        kept.give(job)

    def _take_answer(self, slot: int, kept: Kept) -> None:
        outcome: Outcome | None = None
        with contextlib.suppress(EOFError, ConnectionResetError):
            outcome = pickle.loads(kept.connection.recv_bytes())
        del self._at_work[slot]
        self._pool._give_back(kept, outcome)
        self._ran.outcomes[slot] = outcome or Outcome(kind="gone", error="the process died")
        if outcome is not None and outcome.kind in ("result", "error"):
            self._resumes = False
            return
        if self._resumes:  # All workers are killed at the same point, and then the whole run is resumed.
            return
        status = self._hub.status()
        if status["state"] in ("ended", "failed") or slot in status["dead_slots"]:
            return
        if self._refills >= MAX_REFILLS:
            self._hub.slot_vacant(slot, "refilled too often")
            return
        self._refills += 1
        self._start(self._jobs[slot])

    def _resume(self) -> None:
        """Resume the run from its newest checkpoint, as a new run of that name would, once all workers are gone."""
        self._resumes = False
        self._shut_down_hub()
        stored = sorted((self._directory / "storage").glob("checkpoint_*"))
        if stored:
            cursor = Cursor.from_dict(read_meta(str(stored[-1]))["cursor"])
            self._settings = dataclasses.replace(self._settings, checkpoint=str(stored[-1]), checkpoint_cursor=cursor)
        self._hub = self._new_hub()
        for job in self._jobs:
            self._start(dataclasses.replace(job, life=1))

    def _new_hub(self) -> Hub:
        hub = Hub(self._settings)
        write_whole(self._directory / "hub.pickle", pickle.dumps(hub.address()))
        return hub

    def _shut_down_hub(self) -> None:
        self._ran.events += self._hub.events(0)
        self._ran.reports += self._hub.reports(0)
        self._ran.failure = self._hub.status()["failure"]
        self._hub.shutdown()

    def _stacks(self) -> str:
        texts = []
        for slot, kept in sorted(self._at_work.items()):
            before = kept.stacks.stat().st_size
            with contextlib.suppress(ProcessLookupError):
                os.kill(kept.process.pid, signal.SIGUSR1)  # type: ignore[arg-type]
            until = time.monotonic() + 5.0
            while kept.stacks.stat().st_size == before and time.monotonic() < until:
                time.sleep(0.02)
            texts.append(f"worker {slot}:\n{kept.stacks.read_text()[before:]}")
        return "\n".join(texts)
