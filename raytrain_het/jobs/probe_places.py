"""Where `raytrain-het probe` measures: local processes on this machine, or actors on a cluster."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import math
import multiprocessing
import signal
import socket
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch

from raytrain_het.errors import ConfigError, HetError, ResourceError
from raytrain_het.jobs.config import JobConfig
from raytrain_het.jobs.probe_worker import ProbeWorker
from raytrain_het.probing.cores import cpu_limit
from raytrain_het.probing.links import Address, Link

PLACING_S = 60.0
"""A worker that the cluster has no room for within this time is given up."""

Say = Callable[[str], None]


class Handle(abc.ABC):
    """A :class:`ProbeWorker` in another process.

    Attributes:
        node: The machine that it is on. Several nodes of one machine have different names.
        device: The device, for people.
    """

    node: str
    device: str

    @abc.abstractmethod
    def start(self, method: str, *args: Any) -> None:
        """Begin a call. One at a time."""

    @abc.abstractmethod
    def result(self) -> Any:
        """Wait for the call's value. Raises the call's error."""

    def listen(self) -> Address:
        """See :class:`raytrain_het.probing.links.LinkEnd`."""
        self.start("listen")
        address: Address = self.result()
        return address

    def link_to(self, address: Address) -> Link | None:
        """See :class:`raytrain_het.probing.links.LinkEnd`."""
        self.start("link_to", address)
        link: Link | None = self.result()
        return link


def call_all(workers: Iterable[Handle], method: str, *args: Any) -> list[Any]:
    """Make the same call on all workers at the same time."""
    workers = list(workers)
    for worker in workers:
        worker.start(method, *args)
    return [worker.result() for worker in workers]


class LocalProcess(Handle):
    """A local process. It ends with :meth:`close`, and with this process."""

    def __init__(self, *, node: str, device: str, num_threads: int) -> None:
        self.node, self.device = node, device
        # Not forked: a fork would copy the state of this process's threads, and perhaps of a GPU, in mid-use.
        context = multiprocessing.get_context("spawn")
        self._pipe, far = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(far, {"device": device, "num_threads": num_threads}), daemon=True
        )
        # Ctrl-C reaches the whole process group, but only the parent answers it. A child inherits the parent's mask.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        far.close()

    def start(self, method: str, *args: Any) -> None:
        with contextlib.suppress(BrokenPipeError):  # `result` reports that the process has died.
            self._pipe.send((method, args))

    def result(self) -> Any:
        try:
            value = self._pipe.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            raise HetError(
                f"a process that measured on {self.device} died (exit status {self._process.exitcode}): it may have "
                "run out of memory. Take fewer workers, or a smaller global_batch_size."
            ) from None
        if isinstance(value, Exception):
            raise value
        return value

    def close(self) -> None:
        """Kill the process."""
        self._process.kill()
        self._process.join()
        self._pipe.close()


def _serve(pipe: Connection, arguments: dict[str, Any]) -> None:
    worker = ProbeWorker(**arguments)
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            method, args = pipe.recv()
            try:
                value = getattr(worker, method)(*args)
            except Exception as error:
                if not isinstance(error, HetError):
                    traceback.print_exc()  # A pickled error has no traceback.
                value = error
            pipe.send(value)


@contextlib.contextmanager
def local_workers(job: JobConfig | None, say: Say) -> Iterator[list[LocalProcess]]:
    """A local process for each worker of the job; none without a job.

    Raises:
        ConfigError: A worker wants a GPU that is not there.
    """
    places = _local_places(job) if job is not None else []
    workers: list[LocalProcess] = []
    if places:
        each = ", ".join(f"{device} with {counted(num_threads, 'thread')}" for device, num_threads in places)
        say(
            f"starting {counted(len(places), 'worker')} on this machine, which share its {cpu_limit().cores:.3g} "
            f"cores: {each}"
        )
    try:
        for device, num_threads in places:
            workers.append(LocalProcess(node=this_node(), device=device, num_threads=num_threads))
        yield workers
    finally:
        for worker in workers:
            worker.close()


def _local_places(job: JobConfig) -> list[tuple[str, int]]:
    """Device and threads of each worker, as Ray would have them on a machine like this."""
    gpus, cores = torch.cuda.device_count(), cpu_limit().cores
    if isinstance(job.workers, str):
        each = max(1, int(cores / max(gpus, 1)))
        return [(f"cuda:{i}", each) for i in range(gpus)] or [("cpu", each)]
    places, taken = [], 0.0
    for i, spec in enumerate(job.workers):
        for _ in range(spec.count):
            device, share = "cpu", spec.resources.get("GPU", 0.0)
            if share > 0:
                device, taken = f"cuda:{math.floor(taken + 1e-9)}", taken + share
            if taken > gpus + 1e-9:
                raise ConfigError(
                    f"workers[{i}].resources asks for GPU, {taken:g} up to here: allowed on this machine is {gpus}. "
                    "Write --address of a cluster that has them, or --set workers=auto"
                )
            places.append((device, max(1, int(spec.resources.get("CPU", 1)))))
    return places


def this_node() -> str:
    """This machine's name."""
    return socket.gethostname()


class RayWorker(Handle):
    """A Ray actor."""

    def __init__(self, actor: Any, device: str) -> None:
        self.actor, self.device, self.node = actor, device, ""
        self._call: Any = None

    def start(self, method: str, *args: Any) -> None:
        self._call = getattr(self.actor, method).remote(*args)

    def result(self) -> Any:
        import ray

        try:
            return ray.get(self._call)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except ray.exceptions.RayActorError as error:
            raise HetError(f"the process that measured on {self.device} of {self.node} died: {error}") from None


class _RayProbeWorker(ProbeWorker):
    """A probe worker that asks Ray where it is."""

    def __init__(self, *, gpu: bool, num_threads: int) -> None:
        import ray

        # Ray shows an actor its own GPUs alone. A GPU that torch cannot use is none.
        device = "cuda:0" if gpu and torch.cuda.is_available() else "cpu"
        super().__init__(device=device, num_threads=num_threads, host=ray.util.get_node_ip_address())

    def where(self) -> tuple[str, str, str]:
        """The node's id, its address, and the device."""
        import ray

        return ray.get_runtime_context().get_node_id(), self.host, str(self.device)


@contextlib.contextmanager
def ray_workers(job: JobConfig | None, say: Say) -> Iterator[list[RayWorker]]:
    """An actor for each worker of the job; without a job, for each worker of ``workers: auto``.

    Raises:
        ResourceError: The cluster cannot hold them, or has no room for them now.
    """
    import ray

    from raytrain_het.ray_train.cluster_view import describe_free, settle
    from raytrain_het.ray_train.scaling import HetScalingConfig, WorkerSpec

    specs: Any = "auto" if job is None else job.workers
    if not isinstance(specs, str):
        specs = [WorkerSpec(**dataclasses.asdict(spec)) for spec in specs]
    slots = settle(HetScalingConfig(specs)).resolved_slots
    say(f"starting {counted(len(slots), 'worker')} on the cluster")
    remote = ray.remote(_RayProbeWorker)
    workers: list[RayWorker] = []
    try:
        for slot in slots:
            cpus, gpus = slot.resources.get("CPU", 0.0), slot.resources.get("GPU", 0.0)
            others = {name: amount for name, amount in slot.resources.items() if name not in ("CPU", "GPU", "memory")}
            options = {
                "num_cpus": cpus,
                "num_gpus": gpus,
                "resources": others,
                "label_selector": slot.selector(),
                "memory": slot.resources.get("memory"),
            }
            actor = remote.options(**options).remote(gpu=gpus > 0, num_threads=max(1, int(cpus)))
            workers.append(RayWorker(actor, "cuda" if gpus else "cpu"))
        places = [worker.actor.where.remote() for worker in workers]
        _, waiting = ray.wait(places, num_returns=len(places), timeout=PLACING_S)
        if waiting:
            raise ResourceError(
                f"{len(waiting)} of {len(places)} workers found no room on the cluster within {PLACING_S:g} s (free: "
                f"{describe_free(slots)}): stop what holds it (`ray status` lists it), or write fewer workers."
            )
        _name_nodes(workers, ray.get(places))
        yield workers
    finally:
        for worker in workers:
            ray.kill(worker.actor)


def _name_nodes(workers: Sequence[RayWorker], places: Sequence[tuple[str, str, str]]) -> None:
    """Name each worker's node by its address, and by a part of its id if several nodes of one machine share that."""
    by_address = Counter(address for _, address in {(node, address) for node, address, _ in places})
    for worker, (node, address, device) in zip(workers, places, strict=True):
        worker.node = address if by_address[address] == 1 else f"{address}/{node[:6]}"
        worker.device = device


def counted(number: int, noun: str) -> str:
    """``1 worker``, ``2 workers``."""
    return f"{number} {noun}{'s' * (number != 1)}"
