"""Scripted faults: at a protocol point of a chosen step, on a chosen worker, exactly once."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from raytrain_het.membership.points import POINTS, StepPoints

Kind = Literal["kill", "stop", "leave", "raise", "slow", "hold", "cut", "unplug", "mute", "drain", "restart_hub"]

OUTSIDE: Sequence[Kind] = ("cut", "unplug", "mute", "drain", "restart_hub")
"""Faults that do not happen in the worker itself: it only says when, and goes on."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A fault: what happens, at which point of which step, to the worker of which slot.

    ``kill``: SIGKILL. ``stop``: SIGSTOP; the test must continue or kill the worker. ``leave``: the worker leaves in
    good order. ``raise``: an exception in the training function. ``slow``: the worker sleeps ``seconds`` at the point,
    in each of ``steps`` steps. ``hold``: it holds the interpreter for ``seconds``, and no thread of it runs.

    What happens outside of the worker is done by :class:`~raytrain_het.testing.outside.Outside`: ``cut`` resets its
    connection to the hub, ``unplug`` takes its machine off the network for ``seconds``, ``mute`` lets it hear and not
    be heard, ``drain`` gives notice of its machine, ``restart_hub`` kills the hub.

    With ``when_stored`` the fault waits until every report of this worker is registered with its checkpoint: it is not
    meant to cost a checkpoint.
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
            mark = Path(directory) / f"fault_{fault.slot}_{step}_{fault.point}-{fault.kind}"
            if mark.exists():
                continue
            if fault.when_stored:
                await_reports()
            with mark.open("w") as file:
                file.write(f"{time.time()!r} {fault.seconds}")
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
    elif fault.kind == "hold":
        ctypes.PyDLL(None).usleep(int(fault.seconds * 1e6))  # A call by PyDLL keeps the interpreter's lock.
    elif fault.kind == "leave":
        leave()
    elif fault.kind in OUTSIDE:
        pass
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
    seconds: float = 0.0


def happened(directory: str | os.PathLike[str]) -> list[Happened]:
    """The faults that have happened so far, oldest first."""
    faults = []
    for path in Path(directory).glob("fault_*"):
        _, slot, step, rest = path.name.split("_", 3)
        point, kind = rest.split("-")
        at, seconds = (path.read_text() or "nan 0").split()
        faults.append(Happened(float(at), int(slot), int(step), point, kind, float(seconds)))
    return sorted(faults)
