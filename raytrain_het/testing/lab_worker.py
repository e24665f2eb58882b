"""One worker process of a :class:`~raytrain_het.testing.processes.ProcessLab`: what it is given, and what it does."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import pickle
import select
import signal
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cloudpickle
import torch
import torch._dynamo  # Imported by every optimizer's first step: once in the fork server, not in each worker.

from raytrain_het.config import HetConfig
from raytrain_het.errors import EvictedError
from raytrain_het.files import write_whole
from raytrain_het.testing import faults as fault_kit
from raytrain_het.testing.ledger import LedgerEntry, LedgerWriter
from raytrain_het.testing.networks import enter
from raytrain_het.worker import session as sessions
from raytrain_het.worker.state.checkpoint import LocalStorage, Storage
from raytrain_het.worker.step.step_record import StepRecord

HUB_ADDRESS = "hub.pickle"
"""The file in a lab's directory that says where the hub is."""


@dataclass(frozen=True, kw_only=True)
class WorkerFiles:
    """The files that each worker of a lab writes."""

    ledger: bool = True
    """Whether the worker writes a ledger into the lab's directory."""
    storage: Callable[[], Storage] | None = None
    """Makes the storage of reports and checkpoints; None is a folder in the lab's directory."""


@dataclass(frozen=True)
class NetworkPlace:
    """Where a slot's workers are in the network."""

    ip: str
    namespace: str | None = None
    """The network namespace that a worker enters first; None is this machine's own."""


@dataclass(frozen=True, kw_only=True)
class WorkerTask:
    """What every worker of a lab is given; it is pickled once, and sent to each process."""

    train_fn: Callable[[str], Any]
    directory: str
    config: HetConfig
    faults: list[fault_kit.Fault]
    files: WorkerFiles
    places: list[NetworkPlace]
    """By slot."""
    lab_pid: int
    """The process of the lab: a worker ends when it does."""


def run_worker(slot: int, pickled_task: bytes) -> None:
    """What a worker process does, from its first line to its end."""
    task: WorkerTask = cloudpickle.loads(pickled_task)
    place, directory = task.places[slot], Path(task.directory)
    if place.namespace is not None:
        enter(place.namespace)
    threading.Thread(target=end_with, args=(task.lab_pid,), name="het-lab", daemon=True).start()
    torch.set_num_threads(1)
    stacks = stacks_file(directory, slot, os.getpid()).open("w")
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
    make_storage = task.files.storage or partial(LocalStorage, directory / "storage")
    kind, value = "gone", None
    try:
        done = sessions.run_worker(
            lambda: _train(task, slot),
            config=task.config,
            slot=slot,
            num_slots=len(task.places),
            locate=lambda: pickle.loads((directory / HUB_ADDRESS).read_bytes()),
            storage=make_storage(),
            device=torch.device("cpu"),
            node_ip=place.ip,
        )
        if done is not None:  # None: it was let go before its end.
            kind, value = "result", done[0]
    except EvictedError:
        pass
    except BaseException:
        kind, value = "error", traceback.format_exc()
    write_whole(outcome_file(directory, slot, os.getpid()), pickle.dumps((kind, value)))
    # Nobody waits for threads that the training function has left behind.
    os._exit(0)


def _train(task: WorkerTask, slot: int) -> tuple[Any]:
    session = sessions.current()
    fault_kit.install(task.faults, slot, task.directory, session.points, session.leave, session.await_reports)
    if task.files.ledger:
        writer = LedgerWriter(Path(task.directory) / f"ledger_{slot}_{os.getpid()}.jsonl")
        session.listeners.append(lambda record: writer.append(ledger_entry(record)))
    return (task.train_fn(task.directory),)


def ledger_entry(record: StepRecord) -> LedgerEntry:
    """A worker's record of a committed step, as its ledger has it."""
    return LedgerEntry(
        step=record.step,
        generation=record.generation,
        epoch=record.epoch,
        offset=record.offset,
        batch_size=record.batch_size,
        slices=record.slices,
        writer=record.uid,
        own_samples=record.own_samples,
    )


def outcome_file(directory: Path, slot: int, pid: int) -> Path:
    """Where a worker writes its result, or the traceback of its error."""
    return directory / f"outcome_{slot}_{pid}"


def stacks_file(directory: Path, slot: int, pid: int) -> Path:
    """Where a worker writes what its threads do, on SIGUSR1. The worker makes it before anything of its own runs."""
    return directory / f"stacks_{slot}_{pid}"


def end_with(pid: int) -> None:
    """End this process when another one has ended, in whatever way. A fork server does not end its children."""
    with contextlib.suppress(ProcessLookupError):
        select.select([os.pidfd_open(pid)], [], [])
    os._exit(1)
