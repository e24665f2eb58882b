"""Where a worker runs, and for which run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from raytrain_het.config import HetConfig
from raytrain_het.membership.points import StepPoints
from raytrain_het.worker.state.storage import Storage


@dataclass(frozen=True, kw_only=True)
class WorkerContext:
    """What a worker is told when it starts."""

    config: HetConfig
    """The run's settings."""
    slot: int
    """World rank."""
    num_slots: int
    """World size."""
    locate: Callable[[], dict[str, Any]]
    """Where the hub is; asked again whenever the connection is lost."""
    storage: Storage
    """Where checkpoints go."""
    device: torch.device
    """This worker's."""
    node_ip: str
    """Address at which peers reach it."""
    points: StepPoints = field(default_factory=StepPoints)
    """Told when this worker reaches the points of a step."""


class HubAddress:
    """Where the hub is, as far as is known, and what proves that one belongs to the run.

    Args:
        locate: asks where it is.
    """

    def __init__(self, locate: Callable[[], dict[str, Any]]) -> None:
        self._locate = locate
        self._token = self.run_id = ""

    def find(self) -> dict[str, Any]:
        """Ask where it is."""
        where = self._locate()
        self._token, self.run_id = where["token"], where.get("run", "")
        return where

    def token(self) -> str:
        """What peers show each other; empty before the hub was found."""
        return self._token
