"""Torch's own tools for equal workers, refused where they are used while a training function runs.

Their process group has one member here, so they would do nothing, and say nothing. Classes are refused by their
constructors, so that it does not matter how a program has imported them.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DistributedSampler

from raytrain_het.worker.checks.unsupported import refuse

_LIBRARIES = ("site-packages", "dist-packages")
_COLLECTIVES = (
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_reduce",
    "all_reduce_coalesced",
    "all_to_all",
    "all_to_all_single",
    "barrier",
    "broadcast",
    "broadcast_object_list",
    "gather",
    "gather_object",
    "monitored_barrier",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "scatter",
    "scatter_object_list",
)


@contextlib.contextmanager
def refused(num_workers: int) -> Iterator[None]:
    """While this lasts, they raise.

    Args:
        num_workers: of the run; alone, a group of one is the right one for a collective.
    """
    with contextlib.ExitStack() as stack:
        for name, cls in _classes().items():
            stack.enter_context(_put(cls, "__init__", _refusing(name, cls.__init__)))
        within = getattr(distributed_c10d, "_rank_not_in_group", None)
        if within is not None and num_workers > 1:
            stack.enter_context(_put(distributed_c10d, "_rank_not_in_group", _looking_at_callers(within)))
        yield


def _classes() -> dict[str, Any]:
    found = {
        "DistributedDataParallel": DistributedDataParallel,
        "DeviceMesh": DeviceMesh,
        "DistributedSampler": DistributedSampler,
        "SyncBatchNorm": torch.nn.SyncBatchNorm,
    }
    fsdp = sys.modules.get("torch.distributed.fsdp")  # It takes long to load; a program that uses it has loaded it.
    if fsdp is not None:
        found["FullyShardedDataParallel"] = fsdp.FullyShardedDataParallel
    return found


def _refusing(row: str, real: Any) -> Any:
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        if dist.is_initialized() and dist.get_world_size() > 1:
            real(self, *args, **kwargs)  # On a group that the program has made itself: it knows what it does.
            return
        raise refuse(row)

    return __init__


def _looking_at_callers(within: Any) -> Any:
    """Every collective of torch asks first whether this process is in the group.

    What a library calls is left alone: it knows groups of one, and means no other workers by them.
    """

    def _rank_not_in_group(group: Any) -> Any:
        asking = sys._getframe(1)
        name = asking.f_code.co_name
        if name in _COLLECTIVES and group in (None, dist.group.WORLD) and dist.is_initialized():
            caller = asking.f_back
            while caller is not None and caller.f_code.co_filename.endswith(("c10d_logger.py", "distributed_c10d.py")):
                caller = caller.f_back
            of = caller.f_code.co_filename if caller is not None else ""
            if dist.get_world_size() == 1 and not any(part in of for part in _LIBRARIES):
                raise refuse("torch collective", f"torch.distributed.{name}()")
        return within(group)

    return _rank_not_in_group


@contextlib.contextmanager
def _put(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
