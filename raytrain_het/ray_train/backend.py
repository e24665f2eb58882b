"""The torch backend inside each worker, and the callback that answers for Ray Data.

Every worker is a replica group of its own: that is how Ray Train lets one worker be replaced while the others go on. So
torch's default process group has one member. ``raytrain_het.worker`` makes the group of all workers, once for each
generation.

The controller loads this module and needs no torch: only functions that run in a worker import it.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Any

from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.execution.callback import ReplicaGroupCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.context import get_train_context
from ray.train.v2._internal.execution.worker_group import ReplicaGroup
from ray.train.v2._internal.util import TrainingFramework

from raytrain_het.errors import ConfigError


def _set_up_torch(backend: str) -> None:
    import torch.distributed as dist
    from ray.train.torch.config import _set_torch_distributed_env_vars

    _set_torch_distributed_env_vars()
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if not dist.is_initialized():
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


class HetBackend(Backend):
    """Makes a default process group with one member, without a port or a peer. It ends with its process."""

    share_cuda_visible_devices: bool = True
    has_replica_groups: bool = True

    def on_start(self, worker_group: Any, backend_config: HetBackendConfig) -> None:
        if isinstance(worker_group, ReplicaGroup):
            worker_group.execute(_set_up_torch, backend_config.backend)


@dataclass
class HetBackendConfig(BackendConfig):
    """The settings of Ray's ``TorchConfig``, for :class:`HetBackend`."""

    backend: str = "gloo"
    timeout_s: int = 1800

    @property
    def backend_cls(self) -> type[HetBackend]:
        return HetBackend

    @property
    def train_func_context(self) -> Any:
        from ray.train.torch.config import TorchConfigContextManager

        return TorchConfigContextManager

    @property
    def framework(self) -> TrainingFramework:
        return TrainingFramework.TORCH

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class _NoDatasets:
    def get_dataset_shard(self, dataset_info: Any) -> Any:
        raise ConfigError(
            f"ray.train.get_dataset_shard({dataset_info.dataset_name!r}): HetTrainer hands out samples itself. "
            "Write raytrain_het.prepare_data_loader(DataLoader(dataset, shuffle=True), global_batch_size=512)."
        )


class WorkerSetup(WorkerGroupCallback, ReplicaGroupCallback):
    """Gives each worker an error for Ray Data's datasets, and its working directory."""

    def __init__(self, change_directory: bool) -> None:
        self._change_directory = change_directory

    def before_init_train_context(self, workers: list[Any]) -> dict[str, list[Any]]:
        return {"dataset_shard_provider": [_NoDatasets()] * len(workers)}

    def after_execution_group_start(self, execution_group: Any) -> None:
        if self._change_directory and isinstance(execution_group, ReplicaGroup):
            execution_group.execute(_enter_working_directory)


def _enter_working_directory() -> None:
    path = get_train_context().get_storage().local_working_directory
    os.makedirs(path, exist_ok=True)
    os.chdir(path)
