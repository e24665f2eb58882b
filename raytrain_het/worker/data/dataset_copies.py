"""A dataset on its way to the data processes: as bytes, and as a digest that shows whether it has changed."""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from raytrain_het.errors import ConfigError


@dataclass(frozen=True)
class Copy:
    """A dataset and its ``worker_init_fn``."""

    pickled: bytes
    shared: list[torch.Tensor]
    """Tensors in shared memory: they are no copies, what is written to them is seen in all processes."""

    def load(self) -> Any:
        """Both."""
        return _Unpickler(self.pickled, self.shared).load()


def copy_of(dataset: Any, init_fn: Callable[[int], None] | None, num_workers: int) -> Copy:
    """What a data process gets.

    Raises:
        ConfigError: it cannot be pickled.
    """
    # Ray's, since a dataset defined in the user's script came into this process by value and must go on likewise.
    from ray import cloudpickle

    shared: list[torch.Tensor] = []
    file = io.BytesIO()

    class Pickler(cloudpickle.Pickler):
        def persistent_id(self, obj: Any) -> int | None:
            if not _is_shared(obj):
                return None
            shared.append(obj)
            return len(shared) - 1

    try:
        Pickler(file).dump((dataset, init_fn))
    except Exception as error:
        raise _cannot_be_pickled(dataset, num_workers, error) from error
    return Copy(file.getvalue(), shared)


def digest_of(dataset: Any, init_fn: Callable[[int], None] | None, num_workers: int) -> bytes:
    """A digest of what :func:`copy_of` would give, in one pass over tensors and arrays where they lie.

    Raises:
        ConfigError: see :func:`copy_of`.
    """
    from ray import cloudpickle

    state = hashlib.blake2b(digest_size=16)

    class File:
        def write(self, part: Any) -> int:
            state.update(part)
            return len(part)

    def hash_buffer(buffer: pickle.PickleBuffer) -> bool:
        with buffer.raw() as raw:
            state.update(raw)
        return False

    class Pickler(cloudpickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            if _is_shared(obj):
                return "shared", obj.data_ptr(), obj.dtype, tuple(obj.shape)
            if type(obj) is not torch.Tensor or obj.device.type != "cpu" or obj.layout is not torch.strided:
                return None
            if obj.requires_grad or obj.is_quantized or obj.is_conj() or obj.is_neg() or obj.__dict__:
                return None
            contents: Any = obj.contiguous().view(-1).view(torch.uint8).numpy()
            state.update(contents)
            return obj.dtype, tuple(obj.shape)

    try:
        Pickler(File(), protocol=5, buffer_callback=hash_buffer).dump((dataset, init_fn))
    except Exception as error:
        raise _cannot_be_pickled(dataset, num_workers, error) from error
    return state.digest()


def _is_shared(obj: Any) -> bool:
    return type(obj) is torch.Tensor and obj.device.type == "cpu" and obj.layout is torch.strided and obj.is_shared()


class _Unpickler(pickle.Unpickler):
    def __init__(self, pickled: bytes, shared: list[torch.Tensor]) -> None:
        super().__init__(io.BytesIO(pickled))
        self._shared = shared

    def persistent_load(self, pid: int) -> torch.Tensor:
        return self._shared[pid]


def _cannot_be_pickled(dataset: Any, num_workers: int, error: Exception) -> ConfigError:
    return ConfigError(
        f"num_workers={num_workers} needs a copy of the dataset in every data process, but this "
        f"{type(dataset).__name__} (or worker_init_fn) cannot be pickled: {error}. Open files and connections in "
        "__getitem__ instead of __init__, or write num_workers=0."
    )
