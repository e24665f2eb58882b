"""Starts the cleaner with the controller and tells it of every placement group."""

from __future__ import annotations

import logging
from typing import Any

import ray
from ray import cloudpickle
from ray._common.constants import HEAD_NODE_RESOURCE_NAME
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.util.placement_group import PlacementGroup

from raytrain_het.ray_train import cleaner

logger = logging.getLogger(__name__)


class PlacementCleanerCallback(ControllerCallback):
    """Takes the place of Ray's ``PlacementGroupCleanerCallback``."""

    def __init__(self) -> None:
        self._cleaner: Any = None

    def after_controller_start(self, train_run_context: Any) -> None:
        # The class is pickled by value: the cleaner's process loads Ray, but not this package with torch.
        cloudpickle.register_pickle_by_value(cleaner)
        # The cleaner is detached and on the head node, since it has to outlive the controller and the driver.
        self._cleaner = (
            ray.remote(num_cpus=0, max_concurrency=4)(cleaner.PlacementCleaner)
            .options(lifetime="detached", resources={HEAD_NODE_RESOURCE_NAME: 0.001}, scheduling_strategy="DEFAULT")
            .remote(ray.get_runtime_context().get_actor_id())
        )

    def register(self, group: PlacementGroup) -> None:
        """Add a group; does not wait."""
        if self._cleaner is not None:
            self._cleaner.register.remote([group])

    async def before_controller_shutdown(self) -> None:
        self._stop()

    def before_controller_abort(self) -> None:
        # The groups are removed after this callback, and a kill in between must not leak them. So the cleaner stays: it
        # sees the controller end, and then ends by itself.
        self._cleaner = None

    def _stop(self) -> None:
        cleaner, self._cleaner = self._cleaner, None
        if cleaner is not None:
            ray.kill(cleaner)
