"""Scripted faults: at a protocol point of a chosen step, on a chosen worker, exactly once."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from raytrain_het.membership.points import POINTS, StepPoints

Kind = Literal["kill", "stop", "leave", "raise", "slow"]


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A fault: what happens, at which point of which step, to the worker of which slot.

    ``kill``: SIGKILL. ``stop``: SIGSTOP; the test must continue or kill the worker. ``leave``: the worker leaves in
    good order. ``raise``: an exception in the training function. ``slow``: the worker sleeps ``seconds`` at the point,
    in each of ``steps`` steps. With ``when_stored`` the fault waits until every report of this worker is registered
    with its checkpoint: it is not meant to cost a checkpoint.
    """

    slot: int
    step: int
    point: str
    kind: Kind = "kill"
    steps: int = 1
    seconds: float = 0.0
    when_stored: bool = False

    def __post_init__(self) -> None:
        if self.point not in POINTS:
            raise ValueError(f"point={self.point!r} is not valid: allowed are {POINTS}")


def install(
    faults: Sequence[Fault],
    slot: int,
    directory: str,
    points: StepPoints,
    leave: Callable[[], None],
    await_reports: Callable[[], None],
) -> None:
    """Let the faults of this slot happen in this process.

    Args:
        faults: The script of faults.
        slot: This worker's slot.
        directory: Holds a mark for each fault that has happened, with the wall-clock time at which it did. So a
            refilled worker does not meet the same fault again.
        points: This worker's.
        leave: Makes this worker leave in good order.
        await_reports: Returns when all reports of this worker are registered.
    """
    mine = [f for f in faults if f.slot == slot]

    def reached(point: str, step: int) -> None:
        for fault in mine:
            if fault.point != point or not fault.step <= step < fault.step + fault.steps:
                continue
            mark = Path(directory) / f"fault_{fault.slot}_{step}_{fault.point}_{fault.kind}"
            if mark.exists():
                continue
            if fault.when_stored:
                await_reports()
            with mark.open("w") as file:
                file.write(repr(time.time()))
                file.flush()
            _happen(fault, leave)

    if mine:
        points.listeners.append(reached)


def _happen(fault: Fault, leave: Callable[[], None]) -> None:
    if fault.kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault.kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fault.kind == "slow":
        time.sleep(fault.seconds)
    elif fault.kind == "leave":
        leave()
    else:
        raise RuntimeError(f"scripted fault at {fault.point} of step {fault.step}")


@dataclass(frozen=True, order=True)
class Happened:
    """A fault that has happened."""

    time: float
    """Seconds of the wall clock."""
    slot: int
    step: int
    point: str
    kind: str


def happened(directory: str | os.PathLike[str]) -> list[Happened]:
    """The faults that have happened so far, oldest first."""
    faults = []
    for path in Path(directory).glob("fault_*"):
        _, slot, step, rest = path.name.split("_", 3)
        point, kind = rest.rsplit("_", 1)
        faults.append(Happened(float(path.read_text() or "nan"), int(slot), int(step), point, kind))
    return sorted(faults)
