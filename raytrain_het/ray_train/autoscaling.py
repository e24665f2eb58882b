"""The scaling policy: the number of slots is fixed, and the autoscaler is asked for the real bundles."""

from __future__ import annotations

import time
from typing import Any

import ray
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2._internal.execution.scaling_policy import autoscaling_coordinator_client as rays

from raytrain_het.ray_train.scaling import HetScalingConfig


class HetScalingPolicy(FixedScalingPolicy):
    """Asks the autoscaler for every slot's own bundle.

    Without an autoscaler it asks nobody: Ray's coordinator is an actor, which takes seconds to start on a small
    machine.
    """

    def __init__(self, scaling_config: HetScalingConfig, *, autoscaler: bool) -> None:
        super().__init__(scaling_config)
        self._autoscaler = autoscaler

    def resource_request(self) -> tuple[list[dict[str, float]], list[dict[str, str]] | None]:
        """The bundles and label selectors that the autoscaler is asked for.

        The node of an ``"auto"`` slot is left out: that node exists already, and once it is gone the slot may be on any
        node.
        """
        slots = self.scaling_config.slots or ()
        selectors = [slot.selector(pinned=False) for slot in slots]
        return [dict(slot.resources) for slot in slots], (selectors if any(selectors) else None)

    def after_controller_start(self, train_run_context: Any) -> None:
        if not self._autoscaler:
            return
        self._requester_id = f"train-{train_run_context.run_id}"
        self._coordinator_client = _Client(self._requester_id, self)
        self._send_resource_request()

    def _maybe_send_resource_request(self) -> None:
        if self._coordinator_client is not None:
            super()._maybe_send_resource_request()


class _Client(rays.TrainAutoscalingCoordinatorClient):
    def __init__(self, requester_id: str, policy: HetScalingPolicy) -> None:
        super().__init__(requester_id)
        self._policy = policy

    def send_resource_request(self, scaling_config: Any, num_workers: int) -> None:
        """Ray's request, with the real bundles."""
        resources, selectors = self._policy.resource_request()
        try:
            ray.get(
                self._autoscaling_coordinator.request_resources.remote(
                    requester_id=self._requester_id,
                    resources=resources,
                    label_selectors=selectors,
                    expire_after_s=rays.AUTOSCALING_REQUESTS_EXPIRE_TIME_S,
                    priority=rays.ResourceRequestPriority.HIGH,
                ),
                timeout=rays.AUTOSCALING_REQUESTS_GET_TIMEOUT_S,
            )
            self._latest_autoscaling_request_time = time.monotonic()
        except Exception:
            rays.logger.warning("The autoscaler could not be asked for the workers' resources; asked again in 20 s.")
