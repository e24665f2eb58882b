"""The first function of a worker: it collects what Ray knows of it, and starts the training session."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import ray
from ray.train.v2._internal.util import construct_train_func

from raytrain_het.config import HetConfig
from raytrain_het.errors import ConfigError
from raytrain_het.ray_train.hub import Parts
from raytrain_het.worker.checks.unsupported import refuse
from raytrain_het.worker.state.last_words import portable

logger = logging.getLogger("raytrain_het")

_hub: Any = None


def set_hub(handle: Any) -> None:
    """The controller calls this on the worker, before the training function starts."""
    global _hub
    _hub = handle


@dataclass(frozen=True, kw_only=True)
class WorkerEntry:
    """The function that Ray Train runs on every worker."""

    train_fn: Any
    """The user's, without arguments."""
    config: HetConfig
    parts: Parts
    num_slots: int

    def __call__(self) -> Any:
        try:
            return self._run()
        except BaseException as error:
            # Ray leaves out the first three frames of a traceback. This frame is the third.
            of_user = error.with_traceback(_users_part(error.__traceback__))
            sent = portable(of_user)
            if sent is of_user:
                raise of_user from of_user.__cause__
            raise sent.with_traceback(of_user.__traceback__) from None

    def _run(self) -> Any:
        from ray.train.torch import get_device
        from ray.train.v2._internal.execution.context import get_train_context
        from ray.train.v2._internal.execution.train_fn_utils import set_train_fn_utils

        from raytrain_het.ray_train.storage import RayStorage

        _quieten()
        set_train_fn_utils(_utils())
        _refuse_rays_preparing()
        context = get_train_context()
        hub = _hub
        storage = RayStorage(context.get_storage())
        try:
            storage.check_seen(ray.util.get_node_ip_address())
        except ConfigError as error:
            if not ray.get(hub.status.remote())["generation"]:
                raise
            # The others are already training. This worker can take part, as long as it does not have to write.
            logger.warning("%s", error)
        result = self.parts.run_worker(
            self.train_fn,
            config=self.config,
            slot=context.get_world_rank(),
            num_slots=self.num_slots,
            locate=lambda: ray.get(hub.address.remote()),
            storage=storage,
            device=get_device(),
            node_ip=ray.util.get_node_ip_address(),
        )
        _check_can_be_sent(result)
        return result


def _check_can_be_sent(result: Any) -> None:
    try:
        ray.cloudpickle.dumps(result)
    except Exception as error:
        raise ConfigError(
            f"the training function has come to its end, and returned a {type(result).__name__} that cannot be sent to "
            f"the driver ({type(error).__name__}: {error}). Return numbers, texts, tensors, or nothing; the run's "
            "reports and checkpoints are stored."
        ) from None


def _users_part(traceback: TracebackType | None) -> TracebackType | None:
    """The part of a traceback below the call of the user's function; all of it, if that was not reached."""
    at = traceback
    while at is not None:
        code = at.tb_frame.f_code
        if code.co_name == "train_fn" and code.co_filename == construct_train_func.__code__.co_filename:
            return at.tb_next or traceback
        at = at.tb_next
    return traceback


def _quieten() -> None:
    """Silence Ray's log of the training function's error: ``fit`` raises that error with its traceback."""
    for handler in logging.getLogger("ray.train").handlers:
        if not hasattr(handler, "get_log_file_path"):
            handler.addFilter(lambda record: not record.getMessage().startswith("Error in training function"))


def _utils() -> Any:
    """Ray's functions for the training function. Those that wait for every rank, or do not know this run, raise."""
    from ray.train.v2._internal.execution.train_fn_utils import DistributedTrainFnUtils

    def refused(row: str) -> Any:
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            raise refuse(row)

        return method

    rows = {
        "report": "ray.train.report",
        "get_checkpoint": "ray.train.get_checkpoint",
        "barrier": "ray.train.collective.barrier",
        "broadcast_from_rank_zero": "ray.train.collective.broadcast_from_rank_zero",
        "get_preemption_info": "ray.train.get_preemption_info",
    }
    methods = {name: refused(row) for name, row in rows.items()}
    return type("HetTrainFnUtils", (DistributedTrainFnUtils,), methods)()


def _refuse_rays_preparing() -> None:
    """Make ``ray.train.torch.prepare_model`` and ``prepare_data_loader`` raise, however they were imported. Both first
    record their use through a name of their module, which is replaced."""
    from ray._common.usage.usage_lib import TagKey
    from ray.train.v2.torch import train_loop_utils

    rows = {
        TagKey.TRAIN_TORCH_PREPARE_MODEL: "ray.train.torch.prepare_model",
        TagKey.TRAIN_TORCH_PREPARE_DATALOADER: "ray.train.torch.prepare_data_loader",
    }

    def note(key: Any, value: str) -> None:
        if key in rows:
            raise refuse(rows[key])

    train_loop_utils.record_extra_usage_tag = note
