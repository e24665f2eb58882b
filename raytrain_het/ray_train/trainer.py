"""HetTrainer: Ray's TorchTrainer on unequal workers that come and go."""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray._private.ray_constants import env_bool
from ray.exceptions import RayError
from ray.train import Result, RunConfig
from ray.train.constants import RAY_CHDIR_TO_TRIAL_DIR
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.callbacks import DatasetsCallback, WorkingDirectorySetupCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.constants import get_env_vars_to_propagate
from ray.train.v2._internal.execution.context import TrainRunContext
from ray.train.v2._internal.execution.failure_handling import create_failure_policy
from ray.train.v2._internal.util import ObjectRefWrapper
from ray.train.v2.api.config import LoggingConfig

from raytrain_het.config import HetConfig, refuse_unknown
from raytrain_het.errors import ConfigError
from raytrain_het.membership import encryption
from raytrain_het.ray_train.autoscaling import HetScalingPolicy
from raytrain_het.ray_train.backend import HetBackendConfig, WorkerSetup
from raytrain_het.ray_train.cluster_view import autoscaler_types, settle
from raytrain_het.ray_train.controller import HetController, RunSettings
from raytrain_het.ray_train.failures import to_raise
from raytrain_het.ray_train.hub import Parts
from raytrain_het.ray_train.monitor import Monitor, OnUpdate
from raytrain_het.ray_train.narration import logger, number, show_log
from raytrain_het.ray_train.resources import SlotSpec
from raytrain_het.ray_train.run_folder import LastCheckpoint, RunFolder, last_checkpoint
from raytrain_het.ray_train.scaling import HetScalingConfig
from raytrain_het.ray_train.storage import check_writable
from raytrain_het.ray_train.worker_entry import WorkerEntry

_ABORT_S = 15.0
_RAYS = ["datasets", "dataset_config", "validation_config", "metadata", "resume_from_checkpoint"]
"""Arguments of Ray's ``TorchTrainer`` that ``HetTrainer`` passes on."""


class HetTrainer(TorchTrainer):
    """Trains one model on workers that differ, through failures and joins.

    Args:
        train_loop_per_worker: The training function; takes nothing, or one ``config`` dict.
        train_loop_config: The argument of the training function.
        het_config: How steps and membership work.
        scaling_config: The workers; ``HetScalingConfig()`` takes what the cluster has.
        run_config: Ray's; ``name`` and ``storage_path`` name the run's folder. If there is a checkpoint in that
            folder, the run resumes from it.
        torch_config: Ray's, for torch's default process group, which has one member here.
        on_update: Called about twice a second during ``fit``, from a thread of the driver, with
            (status, new membership events, new reports). Without it the run is told in INFO lines of the logger
            ``raytrain_het``, on stderr where the program has not set up logging.

    Attributes:
        summary: After ``fit``: metrics, steps, samples, throughput_samples_per_s, checkpoint (the last one's path) and
            workers.

    Raises:
        ConfigError: An argument is wrong; the message says what to write.
    """

    parts: Parts | None = None
    """The parts below this layer. None takes the real ones; tests replace them."""

    def __init__(
        self,
        train_loop_per_worker: Callable[[], Any] | Callable[[dict[str, Any]], Any],
        *,
        train_loop_config: dict[str, Any] | None = None,
        het_config: HetConfig | None = None,
        scaling_config: HetScalingConfig | None = None,
        run_config: RunConfig | None = None,
        torch_config: TorchConfig | None = None,
        on_update: OnUpdate | None = None,
        **rays: Any,
    ) -> None:
        if rays.get("datasets") or rays.get("dataset_config"):
            raise ConfigError(
                "HetTrainer(datasets=...): samples are handed out by step and share, not by Ray Data. Write in the "
                "training function: loader = het.prepare_data_loader(DataLoader(dataset, shuffle=True), "
                "global_batch_size=512)."
            )
        refuse_unknown("HetTrainer", rays, [*inspect.signature(HetTrainer).parameters][:-1] + _RAYS)
        het_config = HetConfig() if het_config is None else het_config
        if not isinstance(het_config, HetConfig):
            raise ConfigError(f"het_config={het_config!r}: allowed is a HetConfig. Write het_config=HetConfig().")
        scaling_config = HetScalingConfig() if scaling_config is None else scaling_config
        if not isinstance(scaling_config, HetScalingConfig):
            raise ConfigError(
                f"scaling_config={scaling_config!r}: allowed is a HetScalingConfig. Write scaling_config="
                "HetScalingConfig(workers=[WorkerSpec(count=2, resources={'CPU': 1})]), or leave it out for all "
                "that the cluster has."
            )
        _check_signature(train_loop_per_worker)
        if scaling_config.slots is not None:
            _check_per_worker(het_config, len(scaling_config.slots))
        self.het_config = het_config
        self.on_update = on_update
        self.summary: dict[str, Any] = {}
        self._controller: Any = None
        super().__init__(
            train_loop_per_worker,
            train_loop_config=train_loop_config,
            torch_config=HetBackendConfig(
                backend=(torch_config.backend if torch_config else None) or "gloo",
                timeout_s=torch_config.timeout_s if torch_config else 1800,
            ),
            scaling_config=scaling_config,
            run_config=_quiet(run_config or RunConfig()),
            **rays,
        )

    def fit(self) -> Result:
        """Run the training function on all workers, to its end.

        Returns:
            Ray's ``Result``; ``metrics`` are those last reported. ``result.het_summary`` is ``summary``.

        Raises:
            TrainFunctionError: The training function raised; the text begins with its traceback. It
                is a ``ray.train.TrainingFailedError``.
            ResourceError: The cluster cannot hold the workers.
            ConfigError: A setting does not fit the cluster.
            CheckpointError: The storage cannot be written or read.
            RunFailedError: The run could not go on.
        """
        storage = check_writable(self.run_config)
        if not ray.is_initialized():
            ray.init(logging_level=logging.WARNING)
        parts = self.parts or Parts.default()
        scaling = settle(self.scaling_config)
        slots = scaling.resolved_slots
        _check_per_worker(self.het_config, len(slots))
        _check_backend(self.het_config, slots)
        context = TrainRunContext(
            run_config=self.run_config,
            train_loop_config=self.train_loop_config,
            scaling_config=scaling,
            backend_config=self.backend_config,
            dataset_config=self.data_config,
        )
        self.train_run_context = context
        resumed = last_checkpoint(storage)
        if self.on_update is None:
            show_log()
        logger.info("run folder: %s", storage.experiment_fs_path)
        if resumed is not None:
            logger.info("resumed from %s", resumed)
        folder = RunFolder(storage)
        folder.write_config(self.het_config, scaling, self.train_loop_config)
        monitor = Monitor(context.run_id, folder, self.on_update, resumed)
        entry = WorkerEntry(train_fn=self._get_train_func(), config=self.het_config, parts=parts, num_slots=len(slots))
        controller = self._controller = self._start_controller(
            plan=RunSettings(config=self.het_config, parts=parts),
            train_fn_ref=ObjectRefWrapper(entry),
            scaling_policy=HetScalingPolicy(scaling, autoscaler=autoscaler_types() is not None),
            failure_policy=create_failure_policy(self.run_config.failure_config),
            train_run_context=context,
            callbacks=self._create_default_callbacks(),
            validation_config=self.validation_config,
        )
        result, last_word = self._run(controller, monitor)
        if result.error is not None:
            raise to_raise(result.error, last_word.get("errors", {})) from None
        self.summary = monitor.summary(result.metrics)
        result.het_summary = self.summary
        if self.on_update is None:
            self._tell_end(resumed)
        return result

    def _run(self, controller: Any, monitor: Monitor) -> tuple[Any, dict[str, Any]]:
        """Run to the end; returns Ray's result, and the membership actor's last word."""
        last_word: dict[str, Any] = {}
        monitor.start()
        try:
            ray.get(controller.run.remote())
            result, last_word = ray.get([controller.get_result.remote(), controller.last_word.remote()])
        except KeyboardInterrupt:
            _abort(controller)
            raise
        finally:
            self._controller = None
            monitor.finish(last_word)
            ray.kill(controller)
            self.summary = monitor.summary(None)
        return result, last_word

    def abort(self) -> None:
        """End a ``fit`` in another thread, which then raises. Returns when the run's processes are gone."""
        controller = self._controller
        if controller is not None:
            _abort(controller)

    def _tell_end(self, resumed: LastCheckpoint | None) -> None:
        summary = self.summary
        if resumed is not None and summary["steps_now"] == 0:
            logger.warning(
                "the run %r was complete before, with %s: nothing was left to do. For more epochs, write a larger "
                "number in loader.epochs(); to start afresh, another RunConfig(name=...).",
                self.run_config.name,
                resumed,
            )
            return
        if summary["num_checkpoints_failed"]:
            logger.warning(
                "%d of %d checkpoints could not be written",
                summary["num_checkpoints_failed"],
                summary["num_checkpoints"],
            )
        logger.info(
            "the run is complete: %d steps, %s samples/s, last checkpoint: %s",
            summary["steps"],
            number(summary["throughput_samples_per_s"]),
            summary["checkpoint"] or "none",
        )

    def _start_controller(self, **arguments: Any) -> Any:
        node_id = ray.get_runtime_context().get_node_id()
        return (
            ray.remote(HetController)
            .options(
                num_cpus=0,
                label_selector={ray._raylet.RAY_NODE_ID_KEY: node_id},
                # Without a runtime environment Ray takes a process that it keeps ready, a second sooner.
                runtime_env={"env_vars": env_vars} if (env_vars := get_env_vars_to_propagate()) else None,
            )
            .remote(**arguments)
        )

    def _create_default_callbacks(self) -> list[Any]:
        """Ray's callbacks without those that assume equal workers, Ray Data, or one placement group; and our own."""
        ours = (DatasetsCallback, PlacementGroupCleanerCallback, WorkingDirectorySetupCallback)
        callbacks = [c for c in super()._create_default_callbacks() if not isinstance(c, ours)]
        return [*callbacks, WorkerSetup(change_directory=env_bool(RAY_CHDIR_TO_TRIAL_DIR, True))]


def _abort(controller: Any) -> None:
    """End the run on Ctrl-C and wait until its processes are gone."""

    def end() -> None:
        with contextlib.suppress(RayError, TimeoutError):
            ray.get(controller.abort.remote(), timeout=_ABORT_S)

    # A thread does it: a second Ctrl-C ends the waiting, but not the clean-up.
    thread = threading.Thread(target=end, daemon=True)
    thread.start()
    thread.join(_ABORT_S + 1)


def _quiet(run_config: RunConfig) -> RunConfig:
    """The run config with Ray Train's log at WARNING, unless it sets another level than the default."""
    if run_config.logging_config.log_level != "INFO":
        return run_config
    run_config = copy.copy(run_config)
    run_config.logging_config = LoggingConfig(log_level="WARNING")
    return run_config


def _check_signature(train_fn: Any) -> None:
    if not callable(train_fn):
        raise ConfigError(
            f"train_loop_per_worker={train_fn!r} is not callable. Write HetTrainer(train_fn), without brackets after "
            "the function's name."
        )
    try:
        parameters = inspect.signature(train_fn).parameters.values()
    except (TypeError, ValueError):
        return
    required = [
        p.name
        for p in parameters
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    keyword_only = [p.name for p in parameters if p.default is p.empty and p.kind is p.KEYWORD_ONLY]
    if len(required) > 1 or keyword_only:
        raise ConfigError(
            f"The training function {getattr(train_fn, '__name__', train_fn)} takes {len(required)} required arguments "
            f"({', '.join(required)}); allowed are none, or one `config` dict. Write def train_fn(config): and pass "
            "train_loop_config={...}."
        )


def _check_per_worker(config: HetConfig, num_slots: int) -> None:
    shares = config.given_shares
    if shares is not None and len(shares) != num_slots:
        raise ConfigError(
            f"HetConfig.shares={list(shares)} has {len(shares)} number{'s' * (len(shares) != 1)}, the run has "
            f"{num_slots} worker{'s' * (num_slots != 1)}: one per worker is needed. Write "
            f"shares={[1] * num_slots}, or leave it out: shares then follow speeds."
        )
    config.codecs_for(num_slots)


def _check_backend(config: HetConfig, slots: Sequence[SlotSpec]) -> None:
    without = [i for i, slot in enumerate(slots) if slot.resources.get("GPU", 0) < 1]
    if config.backend == "nccl" and without:
        raise ConfigError(
            f"HetConfig.backend='nccl' needs a whole GPU for every worker; workers {without} have none. Write "
            "backend='tcp', which carries GPU and CPU workers in one run."
        )
    if config.backend == "nccl" and encryption.is_on():
        raise ConfigError(
            "HetConfig.backend='nccl' sends gradients unencrypted, and RAY_USE_TLS is set. Write backend='tcp', or "
            "unset RAY_USE_TLS."
        )
