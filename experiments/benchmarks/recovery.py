"""How long the others stand still when one of four workers is killed (``kill -9``) or stopped (SIGSTOP).

Four processes, no Ray, the model with 1.3 million parameters. For each protocol point one run, in which workers
in turn meet a scripted fault there, many steps apart; each is refilled and heals before the next fault. Every worker
writes down (wall clock) when it opened a step, under which generation, and when it arrived at the end of its backward
pass.

Of one fault and one survivor the recovery is the time from the fault, or from the survivor's last arrival before it
opened a step of a new generation if that came later, until that opening. Of a fault it is that of the slowest survivor.
All faults count: for a kill the largest must be below 0.2 s, for a stop below two step times and 1 s.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

import raytrain_het as het
from experiments.benchmarks import common
from raytrain_het.membership.points import MARKS, POINTS
from raytrain_het.testing.faults import Fault
from raytrain_het.testing.lab_worker import WorkerFiles
from raytrain_het.testing.processes import LabSlots, ProcessLab
from raytrain_het.worker.session import current

WORKERS = 4
STOPPED_FOR_S = 2.5
"""So long a stopped worker is left as it is, before it is killed so that its slot is refilled."""


def train(directory: str, *, epochs: int, steps_per_epoch: int, batch: int) -> None:
    """Runs in every worker."""
    session = current()
    log = open(Path(directory) / f"times_{session.slot}_{os.getpid()}.jsonl", "w", buffering=1)  # noqa: SIM115

    def note(point: str, step: int) -> None:
        if point in MARKS:
            log.write(json.dumps([point, step, session.joined().connections.record().number, time.time()]) + "\n")

    session.points.listeners.append(note)
    data = common.make_data(steps_per_epoch * batch)
    model = het.prepare_model(common.make_model())
    optimizer = het.prepare_optimizer(torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9))
    loader = het.prepare_data_loader(DataLoader(data, shuffle=True), global_batch_size=batch)
    for _ in loader.epochs(epochs):
        for x, y in loader:
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        het.report({"loss": loss.item()}, checkpoint=False)


def script(point: str, kind: str, faults: int, apart: int) -> list[Fault]:
    """Faults of all workers in turn; a report is made after every ``apart`` steps."""
    first = apart + (0 if point == "report" else 5)
    return [
        Fault(slot=k % WORKERS, step=first + k * apart, point=point, kind=kind)  # type: ignore[arg-type]
        for k in range(faults)
    ]


def run_faults(directory: Path, point: str, args: Any) -> list[dict[str, Any]]:
    """One run; what came of each of its faults."""
    faults = script(point, args.kind, args.faults, args.apart)
    epochs, batch, apart = args.faults + 2, args.batch * WORKERS, args.apart

    def run(where: str) -> None:
        train(where, epochs=epochs, steps_per_epoch=apart, batch=batch)

    lab = ProcessLab(run, directory, LabSlots(num_slots=WORKERS), faults=faults, files=WorkerFiles(ledger=False))
    stopped: dict[Path, tuple[int, int, float]] = {}

    def end_the_stopped() -> None:
        for mark in directory.glob("fault_*_stop"):
            slot = int(mark.name.split("_")[1])
            if mark not in stopped and slot in lab.processes:
                stopped[mark] = (slot, lab.processes[slot].pid or 0, time.time())
        for slot, pid, since in stopped.values():
            alive = lab.processes.get(slot)
            if alive is not None and alive.pid == pid and time.time() - since > STOPPED_FOR_S:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    lab.run(timeout_s=900, on_poll=end_the_stopped if args.kind == "stop" else None)
    return list(evaluate(directory, point, args.kind))


def evaluate(directory: Path, point: str, kind: str) -> Iterator[dict[str, Any]]:
    """The recovery of each fault that happened, by the slowest survivor."""
    processes = {
        path.stem: [json.loads(line) for line in path.read_text().splitlines()]
        for path in directory.glob("times_*.jsonl")
    }
    for mark in sorted(directory.glob(f"fault_*_{kind}")):
        slot, step = (int(text) for text in mark.stem.split("_")[1:3])
        at = float(mark.read_text())
        step_s: list[float] = []
        slowest: dict[str, Any] = {"recovery_s": -1.0}
        for name, events in processes.items():
            before = [e for e in events if e[3] < at]
            after = [e for e in events if e[3] >= at]
            if not before or not after or int(name.split("_")[1]) == slot:
                continue
            openings = [e[3] for e in before if e[0] == "opened"][-8:]
            step_s += [b - a for a, b in zip(openings, openings[1:], strict=False)]
            again = next((e for e in after if e[0] == "opened" and e[2] > before[-1][2]), None)
            if again is None:
                continue
            arrivals = [e[3] for e in events if e[0] == "arrived" and e[3] < again[3]]
            recovery = again[3] - max([at, *arrivals[-1:]])
            if recovery > slowest["recovery_s"]:
                slowest = {
                    "recovery_s": recovery,
                    "since_fault_s": again[3] - at,
                    "survivor": name,
                    "generation": again[2],
                    "reopened": again[1],
                }
        yield {"point": point, "slot": slot, "step": step, "step_s": statistics.median(step_s), **slowest}


def main() -> None:
    def add(parser: Any) -> None:
        parser.add_argument("--kind", choices=("kill", "stop"), default="kill")
        parser.add_argument("--points", nargs="+", choices=POINTS, default=POINTS)
        parser.add_argument("--faults", type=int, default=12, help="faults at each point")
        parser.add_argument("--apart", type=int, default=60, help="steps between two faults")
        parser.add_argument("--batch", type=int, default=64, help="samples of each worker in a step")

    args = common.arguments(__doc__, add)
    faults: list[dict[str, Any]] = []
    rows = []
    for point in args.points:
        with common.scratch() as directory:
            happened = run_faults(directory, point, args)
        faults += happened
        times = [f["recovery_s"] for f in happened]
        limits = [0.2 if args.kind == "kill" else 2 * f["step_s"] + 1 for f in happened]
        rows.append(
            {
                "point": point,
                "faults": len(happened),
                "median_s": statistics.median(times),
                "max_s": max(times),
                "step_s": statistics.median(f["step_s"] for f in happened),
                "over the limit": sum(t >= limit for t, limit in zip(times, limits, strict=True)),
            }
        )
    common.show(f"Recovery after a {args.kind}, slowest survivor", rows)
    common.keep(args.json, {"benchmark": "recovery", "kind": args.kind, "points": rows, "faults": faults})


if __name__ == "__main__":
    main()
