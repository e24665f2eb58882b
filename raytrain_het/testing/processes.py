"""A lab: a run without Ray, whose workers are processes of this machine and whose hub is in this process.

Processes come from a fork server that has imported what workers need, so a refill takes tens of milliseconds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import cloudpickle

from raytrain_het.config import HetConfig
from raytrain_het.errors import HetError
from raytrain_het.files import write_whole
from raytrain_het.membership.run_context import RunContext
from raytrain_het.membership.server import Hub
from raytrain_het.testing import faults as fault_kit
from raytrain_het.testing.cgroups import CpuQuota
from raytrain_het.testing.lab_worker import (
    HUB_ADDRESS,
    NetworkPlace,
    WorkerFiles,
    WorkerTask,
    outcome_file,
    run_worker,
    stacks_file,
)
from raytrain_het.testing.networks import PREFIX, Network, remove_leftovers

MAX_STILLBORN = 3
"""If so many processes of a slot have ended before they began their work, the lab fails."""

_letters = itertools.cycle("zyxwvutsrqponmlkjihgfedcba")
PRELOADED = (
    "raytrain_het.testing.lab_worker",
    "raytrain_het.testing.regression",
    "raytrain_het.worker.user",
    "raytrain_het.worker.data.data_loader",
    "raytrain_het.worker.step.optimizer",
    "torch.profiler._cupti_monitor",
    "torch.utils.serialization.config",
    "encodings.idna",
)
"""What a worker without codecs imports until its first checkpoint is written: the fork server does it once, for all."""

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(list(PRELOADED))
_DEFAULT_FILES = WorkerFiles()


class WorkersFailedError(HetError, AssertionError):
    """A worker of a lab run failed; the message has its traceback."""


@dataclass(frozen=True, kw_only=True)
class LabSlots:
    """The slots of a lab: how many workers it has, and on which machines they seem to be.

    Raises:
        ValueError: ``cores``, ``rates_mbit`` or ``machines`` has another number of entries than there are slots, or
            machines.
    """

    num_slots: int
    refill: bool = True
    """Whether the slot of a dead worker gets a new one."""
    cores: Sequence[float] | None = None
    """By slot, how much of a core its workers get (Linux, as root); None is all there is."""
    rates_mbit: Sequence[float | None] | None = None
    """By slot, the rate of its workers' link, each way; a rate of None is as fast as memory is. With rates
    every slot has a network namespace of its own (Linux, as root); without, all share this machine's network."""
    machines: Sequence[int] | None = None
    """By slot, the number of the machine that it is on, from 0. The slots of one machine have an address in common,
    and a link; rates are by machine then. None is a machine for each slot."""

    def __post_init__(self) -> None:
        self._check_size("cores", self.cores, "slot", self.num_slots)
        self._check_size("machines", self.machines, "slot", self.num_slots)
        self._check_size("rates_mbit", self.rates_mbit, "machine" if self.machines else "slot", self.num_machines)

    @staticmethod
    def _check_size(name: str, values: Sequence[Any] | None, each: str, size: int) -> None:
        if values is not None and len(values) != size:
            raise ValueError(f"{name} has {len(values)} entries: allowed is one per {each}, {size}.")

    @property
    def num_machines(self) -> int:
        """How many machines there are."""
        return max(self.machines) + 1 if self.machines else self.num_slots

    def make_network(self) -> Network | None:
        """The links between machines; None without rates.

        Raises:
            LabError: Links cannot be made here.
        """
        if self.rates_mbit is None:
            return None
        remove_leftovers()
        return Network(f"{PREFIX}{os.getpid()}{next(_letters)}", self.rates_mbit)

    def places(self, network: Network | None) -> list[NetworkPlace]:
        """By slot, where its workers are."""
        if network is not None:
            by_machine = [NetworkPlace(*names) for names in zip(network.ips, network.namespaces, strict=True)]
        else:
            # Workers of one machine find each other by their common address.
            by_machine = [NetworkPlace(f"127.0.0.{1 + k if self.machines else 1}") for k in range(self.num_machines)]
        return [by_machine[k] for k in self.machines or range(self.num_slots)]


class ProcessLab:
    """A run whose workers are processes of this machine.

    Args:
        train_fn: Takes the lab's directory; runs in every worker.
        directory: For ledgers, marks of faults and checkpoints.
        slots: How many workers there are, and where.
        config: The run's settings.
        faults: The script of faults.
        context: Fields of the run's :class:`RunContext` that differ from their defaults, such as a checkpoint to resume
            from.
        files: What workers write.

    Raises:
        LabError: Links are wanted, and cannot be made here.

    Attributes:
        events: Membership events of the whole run, of hubs that were restarted too; there once it is over.
        reports: All whole reports.
        failure: Why the run failed, as the hub knows it.
        network: The links between its machines, to be cut; None without ``rates_mbit``.
    """

    def __init__(
        self,
        train_fn: Callable[[str], Any],
        directory: str | os.PathLike[str],
        slots: LabSlots,
        *,
        config: HetConfig | None = None,
        faults: Sequence[fault_kit.Fault] = (),
        context: Mapping[str, Any] | None = None,
        files: WorkerFiles = _DEFAULT_FILES,
    ) -> None:
        self.directory, self.slots, self.config = str(directory), slots, config or HetConfig()
        Path(self.directory).mkdir(parents=True, exist_ok=True)
        self.context = RunContext(run_id="lab", num_slots=slots.num_slots, **(context or {}))
        self.network = slots.make_network()
        if self.network is not None:
            self.context = dataclasses.replace(self.context, host=self.network.host)
        self._pickled_task = cloudpickle.dumps(
            WorkerTask(
                train_fn=train_fn,
                directory=self.directory,
                config=self.config,
                faults=list(faults),
                files=files,
                places=slots.places(self.network),
                lab_pid=os.getpid(),
            )
        )
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
        self.hub = Hub(self.config, self.context)
        self._address_file = Path(self.directory) / HUB_ADDRESS
        self.publish()

    def publish(self) -> None:
        """Write the hub's address into the lab's directory, where workers look for it."""
        write_whole(self._address_file, pickle.dumps(self.hub.address()))

    def restart_hub(self) -> None:
        """Kill the hub as a crash of its actor would, and start a new one."""
        self._shut_down_hub()
        self.hub = Hub(self.config, self.context)
        self.publish()

    def start(self, slot: int) -> BaseProcess:
        """Start a worker in a slot."""
        process = _context.Process(target=run_worker, args=(slot, self._pickled_task), daemon=True)
        process.start()
        self.processes[slot] = process
        if self.quotas:
            assert process.pid is not None
            self.quotas[slot].add(process.pid)
        return process

    def kill(self, *slots: int) -> None:
        """Kill the workers of some slots at the same moment; by default of all slots."""
        for slot in slots or list(self.processes):
            os.kill(self.processes[slot].pid, signal.SIGKILL)  # type: ignore[arg-type]

    def run(self, timeout_s: float = 120.0, on_poll: Callable[[], None] | None = None) -> dict[int, Any]:
        """Run all workers to the end; returns their results by slot.

        Raises:
            WorkersFailedError: A training function raised, or time ran out.
            LabError: Slots have a part of a core, and quotas cannot be set here.
        """
        deadline = time.monotonic() + timeout_s
        try:
            for share in self.slots.cores or ():
                self.quotas.append(CpuQuota(share))
            for slot in range(self.slots.num_slots):
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
        if self.network is not None:
            self.network.close()
            self.network = None

    def _stacks(self) -> str:
        """The stacks of all threads of every worker."""
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
        pid = process.pid or 0
        outcome = outcome_file(Path(self.directory), slot, pid)
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
        if not stacks_file(Path(self.directory), slot, pid).exists():
            self._stillborn[slot] += 1
        if self._stillborn[slot] >= MAX_STILLBORN:
            raise WorkersFailedError(
                f"the process of worker {slot} ended {MAX_STILLBORN} times before it began, at last with exit code "
                f"{process.exitcode}. A script that uses ProcessLab calls it below if __name__ == '__main__'."
            )
        if self.slots.refill:
            self.restarts += 1
            self.start(slot)
        else:
            self.hub.slot_vacant(slot, "the lab does not refill")


@contextlib.contextmanager
def deadline(seconds: float, what: str) -> Iterator[None]:
    """Kill this process loudly if a block takes too long (for tests that would hang)."""
    timer = threading.Timer(seconds, lambda: (print(f"{what} took more than {seconds} s"), os._exit(3)))
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
