"""How samples travel from a data process: all tensors of a chunk in one piece of shared memory.

One shared tensor per sample would cost a file descriptor and a handshake each: a prefetched batch of 512 samples would
run into the usual limit of 1024 open files.
"""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass
from typing import Any

import torch

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
