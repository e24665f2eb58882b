"""Workers as plain processes, with a hub and without Ray: where faults are cheap.

Processes come from a fork server that has imported torch, so that a refill takes tens of milliseconds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import itertools
import multiprocessing
import os
import pickle
import select
import signal
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import cloudpickle
import torch
import torch._dynamo  # Imported by every optimizer's first step: once in the fork server, not in each worker.

from raytrain_het.config import HetConfig
from raytrain_het.errors import EvictedError, HetError
from raytrain_het.files import write_whole
from raytrain_het.membership.server import Hub
from raytrain_het.membership.settings import HubSettings
from raytrain_het.testing import faults as fault_kit
from raytrain_het.testing.cgroups import CpuQuota
from raytrain_het.testing.ledger import LedgerEntry, LedgerWriter
from raytrain_het.testing.networks import PREFIX, Network, enter, remove_leftovers
from raytrain_het.worker import session as sessions
from raytrain_het.worker.state.checkpoint import LocalStorage, Storage
from raytrain_het.worker.step.step_record import StepRecord

MAX_STILLBORN = 3
"""So many processes of a slot may end before they have run a line of their own."""

_letters = itertools.cycle("zyxwvutsrqponmlkjihgfedcba")
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["raytrain_het.testing.processes"])


class WorkersFailedError(HetError, AssertionError):
    """A worker of a lab run failed; the message has its traceback."""


class ProcessLab:
    """A run of ``num_slots`` workers in processes of this machine; dead ones are refilled.

    Args:
        train_fn: takes the lab's directory; runs in every worker.
        directory: for ledgers, marks of faults and checkpoints.
        config: the run's settings.
        faults: the script.
        refill: whether dead slots get new processes.
        threads: torch threads per worker.
        settings: settings of the hub that differ from what follows from the config (a checkpoint to resume from).
        storage: makes a worker's storage; by default a folder in the lab's directory.
        cores: by slot, how much of a core its workers get (Linux, as root); by default all there is.
        rates_mbit: by slot, the rate of its workers' link, each way; then every slot has a network namespace of its own
            (Linux, as root). None in it is as fast as memory is.
        machines: by slot, the number of the machine that it is on, from 0: those of one have an address in common, and
            a link; rates are by machine then.

    Raises:
        ValueError: ``cores``, ``rates_mbit`` or ``machines`` has another number of entries than there are slots, or
            machines.
        LabError: links are wanted, and cannot be made here.

    Attributes:
        events: membership events of the whole run, of hubs that were restarted too; there once it is over.
        reports: all whole reports.
        failure: why the run failed, as the hub knows it.
    """

    def __init__(
        self,
        train_fn: Callable[[str], Any],
        directory: str | os.PathLike[str],
        *,
        num_slots: int,
        config: HetConfig | None = None,
        faults: list[fault_kit.Fault] | None = None,
        refill: bool = True,
        threads: int = 1,
        ledger: bool = True,
        settings: dict[str, Any] | None = None,
        storage: Callable[[], Storage] | None = None,
        cores: Sequence[float] | None = None,
        rates_mbit: Sequence[float | None] | None = None,
        machines: Sequence[int] | None = None,
    ) -> None:
        links = max(machines) + 1 if machines else num_slots
        _check_sizes(
            ("cores", cores, "slot", num_slots),
            ("machines", machines, "slot", num_slots),
            ("rates_mbit", rates_mbit, "machine" if machines else "slot", links),
        )
        self.directory, self.num_slots, self.refill = str(directory), num_slots, refill
        self.config = config or HetConfig()
        Path(self.directory).mkdir(parents=True, exist_ok=True)
        settings_of_config = hub_settings(self.config, num_slots)
        self.settings = dataclasses.replace(settings_of_config, **(settings or {}))
        self._network: Network | None = None
        if rates_mbit is not None:
            remove_leftovers()
            self._network = Network(f"{PREFIX}{os.getpid()}{next(_letters)}", rates_mbit)
            self.settings = dataclasses.replace(self.settings, host=self._network.host)
        places: list[tuple[str | None, str]] = [(None, f"127.0.0.{1 + k * bool(machines)}") for k in range(links)]
        if self._network is not None:
            places = list(zip(self._network.namespaces, self._network.ips, strict=True))
        places = [places[k] for k in machines or range(num_slots)]
        where = storage or partial(LocalStorage, Path(self.directory) / "storage")
        payload = (
            train_fn,
            self.directory,
            self.config,
            faults or [],
            threads,
            ledger,
            num_slots,
            where,
            os.getpid(),
            places,
        )
        self._payload = cloudpickle.dumps(payload)
        self._cores = tuple(cores or ())
        self._begin()

    def _begin(self) -> None:
        self.quotas: list[CpuQuota] = []
        self.processes: dict[int, BaseProcess] = {}
        self.restarts = 0
        self._stillborn: Counter[int] = Counter()
        self.results: dict[int, Any] = {}
        self.errors: dict[int, str] = {}
        self.events: list[dict[str, Any]] = []
        self.reports: list[dict[str, Any]] = []
        self.failure: str | None = None
        self.hub = Hub(self.settings)
        self._address_file = Path(self.directory) / "hub.pickle"
        self.publish()

    def publish(self) -> None:
        """Write down where the hub is."""
        write_whole(self._address_file, pickle.dumps(self.hub.address()))

    def restart_hub(self) -> None:
        """Kill the hub as a crash of its actor would, and start a new one."""
        self._shut_down_hub()
        self.hub = Hub(self.settings)
        self.publish()

    def start(self, slot: int) -> BaseProcess:
        """Start or refill a slot."""
        process = _context.Process(target=_work, args=(slot, self._payload), daemon=True)
        process.start()
        self.processes[slot] = process
        if self.quotas:
            assert process.pid is not None
            self.quotas[slot].add(process.pid)
        return process

    def kill(self, *slots: int) -> None:
        """SIGKILL for the workers in some slots, all at the same moment; by default for all."""
        for slot in slots or list(self.processes):
            os.kill(self.processes[slot].pid, signal.SIGKILL)  # type: ignore[arg-type]

    def run(self, timeout_s: float = 120.0, on_poll: Callable[[], None] | None = None) -> dict[int, Any]:
        """Run all slots to the end; returns each slot's result.

        Raises:
            WorkersFailedError: a training function raised, or time ran out.
        LabError: there are cores given, and quotas cannot be set here.
        """
        deadline = time.monotonic() + timeout_s
        try:
            for share in self._cores:
                self.quotas.append(CpuQuota(share))
            for slot in range(self.num_slots):
                self.start(slot)
            while self.processes:
                self.hub.acknowledge([r["key"] for r in self.hub.take_reports()])
                sentinels = [p.sentinel for p in self.processes.values()]
                multiprocessing.connection.wait(sentinels, timeout=0.05)
                for slot, process in list(self.processes.items()):
                    if not process.is_alive():
                        self._reap(slot, process)
                if on_poll is not None:
                    on_poll()
                if time.monotonic() > deadline:
                    stacks = self._stacks()
                    raise WorkersFailedError(f"not done after {timeout_s} s: {self.hub.status()}\n{stacks}")
        finally:
            self.kill_all()
        if self.errors:
            raise WorkersFailedError("\n".join(f"worker {slot}: {text}" for slot, text in sorted(self.errors.items())))
        return self.results

    def kill_all(self) -> None:
        """End every process that is left, and the hub."""
        for process in self.processes.values():
            with contextlib.suppress(ProcessLookupError, TypeError):
                os.kill(process.pid, signal.SIGKILL)  # type: ignore[arg-type]
            process.join(timeout=5)
        self.processes.clear()
        for quota in self.quotas:
            quota.close()
        self.quotas.clear()
        self._shut_down_hub()
        if self._network is not None:
            self._network.close()
            self._network = None

    def _stacks(self) -> str:
        """What every worker's threads are doing."""
        for process in self.processes.values():
            os.kill(process.pid, signal.SIGUSR1)  # type: ignore[arg-type]
        time.sleep(0.5)
        texts = [
            f"{p.name}:\n{p.read_text()}" for p in sorted(Path(self.directory).glob("stacks_*")) if p.stat().st_size
        ]
        return "\n".join(texts)

    def _shut_down_hub(self) -> None:
        self.events += self.hub.events(0)
        self.reports += self.hub.reports(0)
        self.failure = self.hub.status()["failure"]
        self.hub.shutdown()

    def _reap(self, slot: int, process: BaseProcess) -> None:
        process.join()
        del self.processes[slot]
        outcome = Path(self.directory) / f"outcome_{slot}_{process.pid}"
        if outcome.exists():
            kind, value = pickle.loads(outcome.read_bytes())
            if kind == "result":
                self.results[slot] = value
                return
            if kind == "error":
                self.errors[slot] = value
                return
        status = self.hub.status()
        if status["state"] in ("ended", "failed") or slot in status["dead_slots"]:
            return
        if not (Path(self.directory) / f"stacks_{slot}_{process.pid}").exists():
            self._stillborn[slot] += 1
        if self._stillborn[slot] >= MAX_STILLBORN:
            raise WorkersFailedError(
                f"the process of worker {slot} ended {MAX_STILLBORN} times before it began, at last with exit code "
                f"{process.exitcode}. A script that uses ProcessLab calls it below if __name__ == '__main__'."
            )
        if self.refill:
            self.restarts += 1
            self.start(slot)
        else:
            self.hub.slot_vacant(slot, "the lab does not refill")


def hub_settings(config: HetConfig, num_slots: int) -> HubSettings:
    """What the hub of a lab's run has to know of the run's settings."""
    return HubSettings(
        run_id="lab",
        num_slots=num_slots,
        shares=config.given_shares,
        codecs=config.codecs_for(num_slots),
        compression_error=config.compression_error,
        balance=config.shares == "auto",
        warm_spares=config.warm_spares,
        score_policy=config.score_policy,
        alpha=config.alpha,
        lr_scale_normalisation=config.lr_scale_normalisation,
        silence_s=config.silence_s,
        hang_limit_s=config.hang_limit_s,
        start_timeout_s=config.start_timeout_s,
        hierarchy=config.given_hierarchy,
    )


def _work(slot: int, payload: bytes) -> None:
    """A worker process."""
    train_fn, directory, config, faults, threads, ledger, num_slots, storage, lab, places = cloudpickle.loads(payload)
    namespace, ip = places[slot]
    if namespace is not None:
        enter(namespace)
    threading.Thread(target=_end_with, args=(lab,), name="het-lab", daemon=True).start()
    torch.set_num_threads(threads)
    stacks = (Path(directory) / f"stacks_{slot}_{os.getpid()}").open("w")
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
    where = Path(directory) / "hub.pickle"
    kind, value = "gone", None
    try:
        done = sessions.run_worker(
            lambda: _train(train_fn, directory, faults, slot, ledger),
            config=config,
            slot=slot,
            num_slots=num_slots,
            locate=lambda: pickle.loads(where.read_bytes()),
            storage=storage(),
            device=torch.device("cpu"),
            node_ip=ip,
        )
        if done is not None:  # Else it was let go before its end.
            kind, value = "result", done[0]
    except EvictedError:
        pass
    except BaseException:
        kind, value = "error", traceback.format_exc()
    write_whole(Path(directory) / f"outcome_{slot}_{os.getpid()}", pickle.dumps((kind, value)))
    # Whatever threads the function has left behind are not waited for.
    os._exit(0)


def _end_with(pid: int) -> None:
    """End this process when the lab's has ended, however: a fork server does not."""
    with contextlib.suppress(ProcessLookupError):
        select.select([os.pidfd_open(pid)], [], [])
    os._exit(1)


def _train(train_fn: Callable[[str], Any], directory: str, faults: list, slot: int, ledger: bool) -> tuple[Any]:
    session = sessions.current()
    fault_kit.install(faults, slot, directory, session.leave, session.await_reports)
    if ledger:
        writer = LedgerWriter(Path(directory) / f"ledger_{slot}_{os.getpid()}.jsonl")
        session.listeners.append(lambda note: writer.append(_entry(note)))
    return (train_fn(directory),)


def _entry(note: StepRecord) -> LedgerEntry:
    return LedgerEntry(
        step=note.step,
        generation=note.generation,
        epoch=note.epoch,
        offset=note.offset,
        batch_size=note.batch_size,
        slices=note.slices,
        writer=note.uid,
        own_samples=note.own_samples,
    )


@contextlib.contextmanager
def deadline(seconds: float, what: str) -> Iterator[None]:
    """Kill this process loudly if a block takes too long (for tests that would hang)."""
    timer = threading.Timer(seconds, lambda: (print(f"{what} took more than {seconds} s"), os._exit(3)))
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _check_sizes(*given: tuple[str, Sequence[Any] | None, str, int]) -> None:
    """Each: an argument's name, its value, what it has one entry for, and how many of those there are."""
    for name, values, each, size in given:
        if values is not None and len(values) != size:
            raise ValueError(f"{name} has {len(values)} entries: allowed is one per {each}, {size}.")
