"""Processes that fetch samples, each with a copy of the dataset."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import tempfile
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from raytrain_het.errors import DataProcessError
from raytrain_het.worker.data.dataset_copies import Copy, copy_of
from raytrain_het.worker.data.forked_generators import seed_everything, seed_of
from raytrain_het.worker.data.packed_samples import PackedSamples, pack
from raytrain_het.worker.data.sample_source import SampleSource


class SamplePool:
    """``num_workers`` processes that hold a copy of the dataset each.

    Unless the user asks for it, they are not forked from this process: it has threads (torch's, Ray's) whose locks a
    fork would copy in whatever state they are. They end when this process dies, however it dies.

    Args:
        dataset: map-style.
        seed: the run's.
        num_workers: processes.
        init_fn: called in each process with its number, from 0, as a ``DataLoader`` does.
        context: how processes are started; by default from a server of their own.

    Raises:
        ConfigError: the dataset cannot be pickled.
    """

    def __init__(
        self,
        dataset: Any,
        seed: int,
        num_workers: int,
        *,
        init_fn: Callable[[int], None] | None = None,
        context: Any = None,
    ) -> None:
        if context is None:
            # Forked from a server process that was started afresh, has imported torch and runs nothing: each further
            # process starts in milliseconds and shares its memory. (Only the first call in a process has an effect.)
            context = torch.multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["torch", __name__])
        # What is forked needs no copy, and may not be picklable.
        held = (dataset, init_fn) if forks(context) else copy_of(dataset, init_fn, num_workers)
        self._num_workers, self._renewed = num_workers, Renewed()
        self._files: list[str] = []
        """Copies that are there for the processes to read; gone with the pool, however it goes."""
        weakref.finalize(self, _remove, self._files)
        self._executor = ProcessPoolExecutor(
            num_workers,
            mp_context=context,
            initializer=_start_process,
            initargs=(held, seed, context.Value("i", 0), num_workers),
        )

    def submit(self, epoch: int, indices: Sequence[int], repeats: Sequence[int]) -> Future[PackedSamples]:
        """Have one process fetch these samples.

        Raises:
            concurrent.futures.process.BrokenProcessPool: a process of the pool died.
        """
        return self._executor.submit(_fetch, self._renewed, epoch, list(indices), list(repeats))

    def renew(self, dataset: Any, init_fn: Callable[[int], None] | None) -> None:
        """Let all processes take a new copy of the dataset, each before the next samples that it fetches.

        Raises:
            ConfigError: the dataset cannot be pickled.
            DataProcessError: there is no room for the copy.
        """
        copy = copy_of(dataset, init_fn, self._num_workers)
        _remove(self._files)
        try:
            with tempfile.NamedTemporaryFile(prefix="raytrain_het_dataset_", delete=False) as file:
                self._renewed = Renewed(self._renewed.number + 1, file.name, copy.shared)
                self._files.append(file.name)
                file.write(copy.pickled)
        except OSError as error:
            raise DataProcessError(
                f"The dataset has changed, and its copy for the data processes ({len(copy.pickled)} bytes) can't be "
                f"written to {tempfile.gettempdir()}: {error}. Set TMPDIR to a folder with more room, or write "
                "num_workers=0."
            ) from error

    def close(self) -> None:
        """Let the processes go after the chunk they are at; does not wait for them."""
        self._executor.shutdown(wait=False, cancel_futures=True)
        _remove(self._files)


def _remove(files: list[str]) -> None:
    while files:
        with contextlib.suppress(OSError):
            os.unlink(files.pop())


def forks(context: Any) -> bool:
    """Whether processes of this context begin as copies of their parent."""
    return context is not None and context.get_start_method() == "fork"


@dataclass(frozen=True)
class Renewed:
    """A copy of the dataset that came after the first."""

    number: int = 0
    """0 is the first."""
    path: str = ""
    shared: list[torch.Tensor] = field(default_factory=list)

    def load(self) -> Any:
        """Dataset and ``worker_init_fn``."""
        return Copy(Path(self.path).read_bytes(), self.shared).load()


@dataclass
class _Process:
    """What a data process knows."""

    seed: int
    number: int
    num_workers: int
    renewed: Renewed
    """The copy that it has."""
    source: SampleSource | Exception | None = None

    def load(self, read: Callable[[], Any]) -> None:
        """Take a copy of the dataset, and do with it what the user wants done in each process."""
        try:
            dataset, init_fn = read()
            own_seed = seed_of("process", self.seed, self.number) >> 1
            seed_everything(own_seed)
            _tell_torch(self.number, self.num_workers, own_seed, dataset)
            if init_fn is not None:
                init_fn(self.number)
            self.source = SampleSource(dataset, self.seed)
        except Exception as error:
            # Kept for the next fetch: raised in the initializer, the pool would only say that a process died.
            if hasattr(error, "add_note"):  # From Python 3.11 on.
                error.add_note(
                    "while loading the dataset, or in worker_init_fn, in a data process: what they need must be "
                    "importable there."
                )
            self.source = error


_process: _Process | None = None


def _start_process(held: Any, seed: int, started: Any, num_workers: int) -> None:
    global _process
    # The process that owns the pool handles Ctrl-C.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    with started.get_lock():
        number = started.value
        started.value += 1
    _process = _Process(seed, number, num_workers, Renewed())
    _process.load(lambda: held.load() if isinstance(held, Copy) else held)


def _tell_torch(number: int, num_workers: int, seed: int, dataset: Any) -> None:
    """Let ``torch.utils.data.get_worker_info()`` tell what it tells in a ``DataLoader``'s processes."""
    worker: Any = torch.utils.data._utils.worker
    worker._worker_info = worker.WorkerInfo(id=number, num_workers=num_workers, seed=seed, dataset=dataset)


def _end_with_parent() -> None:
    # A pool process would outlive a killed parent for ever: it holds both ends of the pipe that it reads tasks from.
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    if _process is not None and _process.renewed.path:
        _remove([_process.renewed.path])  # The parent may have been killed.
    os._exit(1)


def _fetch(renewed: Renewed, epoch: int, indices: list[int], repeats: list[int]) -> PackedSamples:
    assert _process is not None
    if _process.renewed.number != renewed.number:
        _process.load(renewed.load)
        _process.renewed = renewed
    source = _process.source
    if isinstance(source, Exception):
        raise source
    assert source is not None
    return pack(source.fetch(epoch, indices, repeats))
