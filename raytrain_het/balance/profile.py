"""What has been measured of one worker."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from raytrain_het.balance.batch_shares import StepCost


@dataclass(frozen=True)
class Measurement:
    """Several measurements of one quantity."""

    median: float
    spread: float
    """Relative: 1.48 times the median absolute deviation, over the median. As a standard deviation, but deaf to odd
    ones."""
    repeats: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Measurement:
        """From at least one value, the median not 0."""
        median = statistics.median(values)
        return cls(median, 1.48 * statistics.median(abs(v - median) for v in values) / median, len(values))


@dataclass(frozen=True, kw_only=True)
class Profile:
    """The measurements of one worker's hardware, and perhaps of its model's step."""

    hardware: str
    """Its name, such as ``AMD EPYC (2 cores)`` or ``NVIDIA H200``."""
    device: str
    """``cpu``, or ``cuda:0``."""
    cores: float
    """Cores of the host that the process may use, by affinity and quota: less than 1 under a small quota."""
    num_threads: int
    """Threads that torch computes with."""
    flops: dict[str, Measurement] = field(default_factory=dict)
    """Floating-point operations per second in a matrix product, by dtype (``fp32``, ``bf16``, ``fp16``)."""
    memory_bandwidth: Measurement | None = None
    """Bytes read and written per second by a copy within the device's memory."""
    host_to_device: Measurement | None = None
    """Bytes per second from the host's pinned memory to the device; None on a CPU."""
    step: StepCost | None = None
    """The model's own training step, if it was measured."""

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary that survives JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Profile:
        """The inverse of :meth:`to_json`.

        Raises:
            KeyError, TypeError: it is not one's output.
        """
        measured = {name: Measurement(**data[name]) for name in _MEASUREMENTS if data[name] is not None}
        return cls(
            hardware=data["hardware"],
            device=data["device"],
            cores=data["cores"],
            num_threads=data["num_threads"],
            flops={dtype: Measurement(**m) for dtype, m in data["flops"].items()},
            step=StepCost(**data["step"]) if data["step"] is not None else None,
            **measured,
        )


_MEASUREMENTS = ("memory_bandwidth", "host_to_device")
