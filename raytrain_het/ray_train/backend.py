"""The torch backend inside each worker, and the callback that answers for Ray Data.

Every worker is a replica group of its own (that is how Ray Train lets one be replaced while the
others go on), so that torch's default process group has one member. The group of all workers is
made by ``training``, once per generation.

The controller loads this module, and has no use for torch: only what runs in a worker imports it.
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
    """A default process group of one, without a port or a peer. It ends with its process."""

    share_cuda_visible_devices: bool = True
    has_replica_groups: bool = True

    def on_start(self, worker_group: Any, backend_config: HetBackendConfig) -> None:
        if isinstance(worker_group, ReplicaGroup):
            worker_group.execute(_set_up_torch, backend_config.backend)


@dataclass
class HetBackendConfig(BackendConfig):
    """What Ray's ``TorchConfig`` says, with the backend above."""

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
    """What each worker gets besides Ray's own: the answer for datasets, and the working directory."""

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
