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
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from raytrain_het.errors import ConfigError
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

    They are not forked from this process: it has threads (torch's, Ray's) whose locks a fork would copy in whatever
    state they are. They end when this process dies, however it dies.

    Raises:
        ConfigError: the dataset cannot be pickled.
    """

    def __init__(self, dataset: Any, seed: int, num_workers: int) -> None:
        # Ray's, since a dataset defined in the user's script came into this process by value and must go on likewise.
        from ray import cloudpickle

        try:
            pickled = cloudpickle.dumps(dataset)
        except Exception as error:
            raise ConfigError(
                f"num_workers={num_workers} needs a copy of the dataset in every data process, but this "
                f"{type(dataset).__name__} cannot be pickled: {error}. Open files and connections in __getitem__ "
                "instead of __init__, or write num_workers=0."
            ) from error
        # Forked from a server process that was started afresh, has imported torch and runs nothing: each further
        # process starts in milliseconds and shares its memory. (Only the first call in a process has an effect.)
        context = torch.multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", __name__])
        self._executor = ProcessPoolExecutor(
            num_workers,
            mp_context=context,
            initializer=_start_process,
            initargs=(pickled, seed),
        )

    def submit(self, epoch: int, indices: Sequence[int]) -> Future[PackedSamples]:
        """Have one process fetch these samples.

        Raises:
            concurrent.futures.process.BrokenProcessPool: a process of the pool died.
        """
        return self._executor.submit(_fetch, epoch, list(indices))

    def close(self) -> None:
        """Let the processes go after the chunk they are at; does not wait for them."""
        self._executor.shutdown(wait=False, cancel_futures=True)


_source: SampleSource | Exception | None = None


def _start_process(pickled: bytes, seed: int) -> None:
    global _source
    # The process that owns the pool handles Ctrl-C.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    try:
        _source = SampleSource(pickle.loads(pickled), seed)
    except Exception as error:
        # Kept for the first fetch: raised here, the pool would only say that a process died.
        error.add_note("while loading the dataset in a data process: what it needs must be importable there.")
        _source = error


def _end_with_parent() -> None:
    # A pool process would outlive a killed parent for ever: it holds both ends of the pipe that it reads tasks from.
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _fetch(epoch: int, indices: list[int]) -> PackedSamples:
    if isinstance(_source, Exception):
        raise _source
    assert _source is not None
    return pack(_source.fetch(epoch, indices))
