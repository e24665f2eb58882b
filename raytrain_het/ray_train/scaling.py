"""HetScalingConfig: the workers of a run, which may differ from each other."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from raytrain_het.config import names_unknown_fields, refuse_unknown
from raytrain_het.errors import ConfigError
from raytrain_het.plain import plain
from raytrain_het.ray_train import versions  # noqa: F401  (checks Ray before its private modules are used)
from raytrain_het.ray_train.resources import SlotSpec

from ray.train import ScalingConfig  # isort: skip

_INSTEAD = {
    "num_workers": "workers=[WorkerSpec(count={value}, resources={{'CPU': 1}})]",
    "use_gpu": "workers=[WorkerSpec(count=1, resources={{'GPU': 1, 'CPU': 2}})], or workers='auto'",
    "resources_per_worker": "workers=[WorkerSpec(count=1, resources={value})]",
    "label_selector": "workers=[WorkerSpec(count=1, resources={{'CPU': 1}}, labels={value})]",
    "accelerator_type": "workers=[WorkerSpec(count=1, resources={{'GPU': 1, 'accelerator_type:{text}': 0.001}})]",
    "trainer_resources": "nothing: the controller and the membership actor reserve no CPU",
    "placement_strategy": "nothing: every worker has a placement group of its own; place it by WorkerSpec(labels=...)",
}


@names_unknown_fields
@dataclass(frozen=True, kw_only=True)
class WorkerSpec:
    """So many workers of one kind.

    Raises:
        ConfigError: A value is out of range.

    Example:
        >>> WorkerSpec(count=2, resources={"GPU": 1, "CPU": 4}).count
        2
    """

    count: int = 1
    """How many of them."""

    resources: Mapping[str, float] = field(default_factory=lambda: {"CPU": 1})
    """What each reserves, by Ray's names: CPU, GPU, memory (bytes), or a custom resource."""

    labels: Mapping[str, str] = field(default_factory=dict)
    """A label selector for its node, as Ray's: ``{"ray.io/market-type": "spot"}``."""

    def __post_init__(self) -> None:
        for name in ("count", "resources", "labels"):
            object.__setattr__(self, name, plain(getattr(self, name)))
        if not isinstance(self.count, int) or isinstance(self.count, bool) or self.count < 1:
            raise ConfigError(
                f"WorkerSpec.count={self.count!r} is not valid: allowed is a whole number from 1. Write count=1."
            )
        ok = isinstance(self.resources, Mapping) and all(
            isinstance(k, str)
            and isinstance(v, (int, float))
            and not isinstance(v, bool)
            and math.isfinite(v)
            and v >= 0
            for k, v in self.resources.items()
        )
        if not ok or not any(self.resources.values()):
            raise ConfigError(
                f"WorkerSpec.resources={self.resources!r} is not valid: allowed are names with numbers from 0, at "
                "least one above 0. Write resources={'CPU': 1}."
            )
        for near, right in (("cpu", "CPU"), ("gpu", "GPU"), ("num_cpus", "CPU"), ("num_gpus", "GPU")):
            if near in self.resources:
                raise ConfigError(f"WorkerSpec.resources has the key {near!r}. Ray's name is {right!r}: write that.")
        if not isinstance(self.labels, Mapping) or not all(
            isinstance(k, str) and isinstance(v, str) for k, v in self.labels.items()
        ):
            raise ConfigError(
                f"WorkerSpec.labels={self.labels!r} is not valid: allowed is a mapping of strings to strings. "
                "Write labels={'ray.io/market-type': 'spot'}."
            )


class HetScalingConfig(ScalingConfig):
    """The workers of a run.

    Args:
        workers: ``"auto"`` (resolved at ``fit`` from the cluster's free resources: one worker per
            GPU with a fair part of its node's CPUs, one with all CPUs per CPU-only node), or a
            list of :class:`WorkerSpec`. World ranks follow the list.

    Raises:
        ConfigError: ``workers`` is malformed, or a setting of Ray's ``ScalingConfig`` is given
            that equal workers would need; the message says what to write instead.
    """

    def __init__(self, workers: Literal["auto"] | WorkerSpec | Sequence[WorkerSpec] = "auto", **rays: Any) -> None:
        for name, value in rays.items():
            if name in _INSTEAD:
                raise ConfigError(
                    f"HetScalingConfig({name}={value!r}): workers are described by `workers` alone. "
                    f"Write instead {_INSTEAD[name].format(value=repr(value), text=value)}."
                )
        refuse_unknown("HetScalingConfig", rays, ["workers"])
        if isinstance(workers, WorkerSpec):
            workers = [workers]
        if not (isinstance(workers, str) and workers == "auto"):
            ok = isinstance(workers, Sequence) and not isinstance(workers, str) and len(workers) > 0
            if not ok or not all(isinstance(w, WorkerSpec) for w in workers):
                raise ConfigError(
                    f"HetScalingConfig(workers={workers!r}): allowed is 'auto' or a list of WorkerSpec. "
                    "Write workers=[WorkerSpec(count=2, resources={'CPU': 1})]."
                )
        self.workers: Literal["auto"] | tuple[WorkerSpec, ...] = "auto" if isinstance(workers, str) else tuple(workers)
        self.slots: tuple[SlotSpec, ...] | None = None if self.workers == "auto" else _slots_of(self.workers)
        # "auto" counts as 1 worker until it is resolved: 0 would mean Ray's local mode.
        super().__init__(num_workers=len(self.slots) if self.slots else 1)

    @property
    def resolved_slots(self) -> tuple[SlotSpec, ...]:
        """``slots``, once they are known: ``workers="auto"`` has none before :meth:`resolved`.

        Raises:
            ValueError: They are not known yet.
        """
        if self.slots is None:
            raise ValueError("workers='auto' has not been resolved yet")
        return self.slots

    def resolved(self, slots: Sequence[SlotSpec]) -> HetScalingConfig:
        """A copy with these slots."""
        other = copy.copy(self)
        other.slots = tuple(slots)
        other.num_workers = len(slots)
        return other

    # What Ray asks of a ScalingConfig, answered for unequal workers.

    @property
    def _resources_per_worker_not_none(self) -> dict[str, float]:
        """The resources that every worker has at least. Ray multiplies them by the number of workers."""
        slots = self.slots or ()
        names = set.intersection(*(set(s.resources) for s in slots)) if slots else set()
        return {name: min(s.resources[name] for s in slots) for name in sorted(names)}

    @property
    def total_resources(self) -> dict[str, float]:
        """The sum over all workers."""
        total: dict[str, float] = {}
        for slot in self.slots or ():
            for name, amount in slot.resources.items():
                total[name] = total.get(name, 0) + amount
        return total

    def _label_selector_per_worker(self, num_workers: int) -> list[dict[str, str]] | None:
        selectors = [slot.selector() for slot in (self.slots or ())[:num_workers]]
        return selectors if any(selectors) else None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HetScalingConfig) and (self.workers, self.slots) == (other.workers, other.slots)

    def __hash__(self) -> int:
        return hash((repr(self.workers), len(self.slots or ())))

    def __repr__(self) -> str:
        shown = "'auto'" if self.workers == "auto" else repr(list(self.workers))
        return f"HetScalingConfig(workers={shown})"

    def _repr_html_(self) -> str:
        return f"<code>{self!r}</code>"


def _slots_of(workers: Sequence[WorkerSpec]) -> tuple[SlotSpec, ...]:
    return tuple(
        SlotSpec(
            resources={k: float(v) for k, v in spec.resources.items() if v},
            labels=dict(spec.labels),
            origin=f"workers[{i}]",
        )
        for i, spec in enumerate(workers)
        for _ in range(spec.count)
    )
