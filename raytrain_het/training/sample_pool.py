"""Processes that fetch samples, and how samples travel from them: all tensors of a chunk in one piece of shared memory.

One shared tensor per sample would cost a file descriptor and a handshake each: a prefetched batch of 512 samples would
run into the usual limit of 1024 open files.
"""

from __future__ import annotations

import io
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from raytrain_het.training.dataset_copies import copy_of
from raytrain_het.training.forked_generators import seed_everything, seed_of
from raytrain_het.training.sample_source import SampleSource

_ALIGNMENT = 64


@dataclass(frozen=True)
class PackedSamples:
    """Pickled samples whose tensors and arrays lie in ``flat`` (uint8, in shared memory), if they have any."""

    pickled: bytes
    flat: torch.Tensor | None
    buffer_slots: list[tuple[int, int]]

    def unpack(self) -> list[Any]:
        """The samples; their tensors are views of the shared memory, which lives as long as one of them does."""
        flat = torch.empty(0, dtype=torch.uint8) if self.flat is None else self.flat
        memory = memoryview(flat.numpy())  # type: ignore[arg-type]
        return _Unpickler(self.pickled, flat, [memory[start:stop] for start, stop in self.buffer_slots]).load()


def pack(samples: list[Any]) -> PackedSamples:
    """Pickle ``samples`` with the contents of plain CPU tensors and contiguous arrays put aside in shared memory."""
    try:
        layout, pickled = _pickled(samples, pickle.Pickler)
    except Exception:
        # Classes that exist in no importable module: those of the user's script. The other end knows them by value.
        from ray import cloudpickle

        layout, pickled = _pickled(samples, cloudpickle.Pickler)
    flat = None
    if layout.size:
        flat = torch.empty(layout.size, dtype=torch.uint8).share_memory_()
        for start, contents in layout.contents:
            flat[start : start + contents.numel()].copy_(contents)
    return PackedSamples(pickled, flat, layout.buffer_slots)


class _Layout:
    def __init__(self) -> None:
        self.size = 0
        self.contents: list[tuple[int, torch.Tensor]] = []
        self.buffer_slots: list[tuple[int, int]] = []

    def add(self, contents: torch.Tensor) -> int:
        start = self.size
        self.contents.append((start, contents))
        self.size += -(-contents.numel() // _ALIGNMENT) * _ALIGNMENT
        return start

    def tensor_slot(self, obj: Any) -> tuple[int, torch.dtype, tuple[int, ...]] | None:
        """Where a tensor's contents lie (a pickler's persistent id), or None for what is pickled as usual."""
        if type(obj) is not torch.Tensor or obj.device.type != "cpu" or obj.layout is not torch.strided:
            return None
        if obj.requires_grad or obj.is_quantized or obj.is_conj() or obj.is_neg() or obj.__dict__:
            return None
        return self.add(obj.contiguous().view(-1).view(torch.uint8)), obj.dtype, tuple(obj.shape)

    def put_buffer(self, buffer: pickle.PickleBuffer) -> bool:
        """A pickler's buffer_callback: whether the buffer stays inside the pickle."""
        with buffer.raw() as raw:
            if raw.readonly or raw.nbytes == 0:
                return True
            start = self.add(torch.frombuffer(raw, dtype=torch.uint8).clone())
            self.buffer_slots.append((start, start + raw.nbytes))
        return False


def _pickled(samples: list[Any], pickler_class: Any) -> tuple[_Layout, bytes]:
    layout, file = _Layout(), io.BytesIO()

    class Pickler(pickler_class):
        def persistent_id(self, obj: Any) -> Any:
            return layout.tensor_slot(obj)

    Pickler(file, protocol=5, buffer_callback=layout.put_buffer).dump(samples)
    return layout, file.getvalue()


class _Unpickler(pickle.Unpickler):
    def __init__(self, pickled: bytes, flat: torch.Tensor, buffers: list[memoryview]) -> None:
        super().__init__(io.BytesIO(pickled), buffers=buffers)
        self._flat = flat

    def persistent_load(self, pid: tuple[int, torch.dtype, tuple[int, ...]]) -> torch.Tensor:
        start, dtype, shape = pid
        num_bytes = torch.Size(shape).numel() * dtype.itemsize
        return self._flat[start : start + num_bytes].view(dtype).view(shape)


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
        self, dataset: Any, seed: int, num_workers: int, *, init_fn: Callable[[int], None] | None = None,
        context: Any = None,
    ) -> None:  # fmt: skip
        if context is None:
            # Forked from a server process that was started afresh, has imported torch and runs nothing: each further
            # process starts in milliseconds and shares its memory. (Only the first call in a process has an effect.)
            context = torch.multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["torch", __name__])
        # What is forked needs no copy, and may not be picklable.
        held = (dataset, init_fn) if forks(context) else copy_of(dataset, init_fn, num_workers)
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
        return self._executor.submit(_fetch, epoch, list(indices), list(repeats))

    def close(self) -> None:
        """Let the processes go after the chunk they are at; does not wait for them."""
        self._executor.shutdown(wait=False, cancel_futures=True)


def forks(context: Any) -> bool:
    """Whether processes of this context begin as copies of their parent."""
    return context is not None and context.get_start_method() == "fork"


_source: SampleSource | Exception | None = None


def _start_process(held: Any, seed: int, started: Any, num_workers: int) -> None:
    global _source
    # The process that owns the pool handles Ctrl-C.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    with started.get_lock():
        number = started.value
        started.value += 1
    try:
        dataset, init_fn = pickle.loads(held) if isinstance(held, bytes) else held
        own_seed = seed_of("process", seed, number) >> 1
        seed_everything(own_seed)
        _tell_torch(number, num_workers, own_seed, dataset)
        if init_fn is not None:
            init_fn(number)
        _source = SampleSource(dataset, seed)
    except Exception as error:
        # Kept for the first fetch: raised here, the pool would only say that a process died.
        if hasattr(error, "add_note"):  # From Python 3.11 on.
            error.add_note(
                "while loading the dataset, or in worker_init_fn, in a data process: what they need must be "
                "importable there."
            )
        _source = error


def _tell_torch(number: int, num_workers: int, seed: int, dataset: Any) -> None:
    """Let ``torch.utils.data.get_worker_info()`` tell what it tells in a ``DataLoader``'s processes."""
    worker: Any = torch.utils.data._utils.worker
    worker._worker_info = worker.WorkerInfo(id=number, num_workers=num_workers, seed=seed, dataset=dataset)


def _end_with_parent() -> None:
    # A pool process would outlive a killed parent for ever: it holds both ends of the pipe that it reads tasks from.
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _fetch(epoch: int, indices: list[int], repeats: list[int]) -> PackedSamples:
    if isinstance(_source, Exception):
        raise _source
    assert _source is not None
    return pack(_source.fetch(epoch, indices, repeats))
