"""What hubs are made from, for tests."""

from __future__ import annotations

import dataclasses
from typing import Any

from raytrain_het.config import HetConfig
from raytrain_het.membership.run_context import RunContext

_OF_CONTEXT = {f.name for f in dataclasses.fields(RunContext)}


def run_of(num_slots: int, **values: Any) -> tuple[HetConfig, RunContext]:
    """The settings and the context of a run; ``values`` are fields of either. Shares are equal unless given."""
    context = {name: values.pop(name) for name in _OF_CONTEXT & values.keys()}
    return HetConfig(**{"shares": None, **values}), RunContext(**{"run_id": "test", **context}, num_slots=num_slots)
