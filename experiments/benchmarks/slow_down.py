"""A worker slowed down in mid-run: steps until all shares are where they will stay.

Plain processes under CPU quotas of the kernel (Linux, as root), one torch thread each, no Ray; the conv net of
``mixed_fleet``. After ``--settle`` steps one worker's quota is set to a part of what it was, and the run goes on for
``--after`` steps. The new steady state is the median of the shares of the last third of those. What counts is the first
step after the change from which on, up to the end, every share is within 10 % of it. A run whose slowed worker has not
lost at least half of what its quota demands has not settled at all, and counts as one that never does. Beside it stands
the first of three steps in a row that are near, after which noise may still carry a share away.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import optim
from torch.utils.data import DataLoader

import raytrain_het as het
from experiments.benchmarks import common
from experiments.benchmarks.mixed_fleet import make_data, make_net
from raytrain_het.testing.lab_worker import WorkerFiles
from raytrain_het.testing.processes import LabSlots, ProcessLab
from raytrain_het.worker.session import current
from raytrain_het.worker.step.step_record import StepRecord

WITHIN = 0.1
IN_A_ROW = 3
HALF = 0.5
"""Of the change that the quotas demand of the slowed worker's share: less, and nothing has followed."""


def train(directory: str, *, total: int, steps: int) -> list[tuple[float, list[int]]]:
    """Runs in every worker; returns when each step was committed, and all workers' shares in it."""
    seen: list[tuple[float, list[int]]] = []

    def note(step: StepRecord) -> None:
        by_slot = {int(uid.split("-")[0]): stop - start for uid, (start, stop) in step.slices.items()}
        seen.append((time.time(), [by_slot[slot] for slot in sorted(by_slot)]))

    current().listeners.append(note)
    model = het.prepare_model(make_net())
    optimizer = het.prepare_optimizer(optim.SGD(model.parameters(), lr=0.01, momentum=0.9))
    loader = het.prepare_data_loader(DataLoader(make_data(), shuffle=True, drop_last=True), global_batch_size=total)
    for _ in loader.epochs(-(-steps // len(loader))):
        for x, y in loader:
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return seen


def steady(shares: Sequence[Sequence[int]]) -> list[float]:
    """Medians of the last third, by worker."""
    last = shares[-max(1, len(shares) // 3) :]
    return [statistics.median(worker) for worker in zip(*last, strict=True)]


def near(shares: Sequence[Sequence[int]], within: float = WITHIN) -> list[bool]:
    """By step: whether all shares are near those of the last third."""
    target = steady(shares)
    return [all(abs(b - t) <= within * t for b, t in zip(s, target, strict=True)) for s in shares]


def steps_to_settle(shares: Sequence[Sequence[int]], within: float = WITHIN) -> int | None:
    """Index of the first step from which on, up to the end, all shares are near those of the last third."""
    first = max((i + 1 for i, is_near in enumerate(near(shares, within)) if not is_near), default=0)
    return first if first < len(shares) else None


def steps_to_reach(shares: Sequence[Sequence[int]], within: float = WITHIN) -> int | None:
    """Index of the first of ``IN_A_ROW`` steps that have all shares near those of the last third, whatever follows."""
    flags = near(shares, within)
    return next((i for i in range(len(flags) - IN_A_ROW + 1) if all(flags[i : i + IN_A_ROW])), None)


def has_followed(
    before: Sequence[float], after: Sequence[float], cores: Sequence[float], worker: int, part: float
) -> bool:
    """Whether a worker's share has changed by half or more of what its quota demands.

    In proportion to cores it would go from ``c / sum c`` of the batch to ``part c / (sum c - (1 - part) c)``.
    """
    c, whole = cores[worker], sum(cores)
    demanded = part * c / (whole - (1 - part) * c) / (c / whole) - 1
    return (after[worker] / before[worker] - 1) / demanded >= HALF


def median_steps(steps: Sequence[int | None]) -> float:
    """Over all runs; one that never settled counts as infinity."""
    return statistics.median(math.inf if s is None else s for s in steps)


def once(args: Any) -> dict[str, Any]:
    """One run."""
    size, total = len(args.cores), args.global_batch

    def run(directory: str) -> list[tuple[float, list[int]]]:
        return train(directory, total=total, steps=args.settle + args.after)

    changed: list[float] = []

    def slow_down() -> None:
        if not changed and lab.hub.status()["step"] >= args.settle:
            lab.quotas[args.worker].set(args.cores[args.worker] * args.part)
            changed.append(time.time())

    with common.scratch() as directory:
        lab = ProcessLab(run, directory, LabSlots(num_slots=size, cores=args.cores), files=WorkerFiles(ledger=False))
        seen = lab.run(timeout_s=1800, on_poll=slow_down)[0]
    after = [shares for at, shares in seen if at > changed[0]]
    before = [shares for at, shares in seen if at <= changed[0]]
    settled = has_followed(steady(before), steady(after), args.cores, args.worker, args.part)
    return {
        "steps": steps_to_settle(after) if settled else None,
        "reached": steps_to_reach(after) if settled else None,
        "followed": settled,
        "before": steady(before),
        "after": steady(after),
        "num_after": len(after),
    }


def main() -> None:
    def add(parser: Any) -> None:
        parser.add_argument("--cores", type=float, nargs="+", default=[0.8, 0.4, 0.2, 0.2])
        parser.add_argument("--global-batch", type=int, default=1024)
        parser.add_argument("--worker", type=int, default=0, help="which one is slowed down")
        parser.add_argument("--part", type=float, default=0.5, help="to this part of its quota")
        parser.add_argument("--runs", type=int, default=5)
        parser.add_argument("--settle", type=int, default=60)
        parser.add_argument("--after", type=int, default=90)

    args = common.arguments(__doc__, add)
    runs = [once(args) for _ in range(args.runs)]
    common.show(
        f"Worker {args.worker} of cores {args.cores} slowed to {args.part:g}; global batch {args.global_batch}", runs
    )
    median = median_steps([r["steps"] for r in runs])
    reached = median_steps([r["reached"] for r in runs])
    print(f"steps until all shares are for the first time within {WITHIN:.0%} of their new values: median {reached:g}")
    never = sum(r["steps"] is None for r in runs)
    print(
        f"steps until all shares stay within {WITHIN:.0%} of their new values: median {median:g}; never: {never} runs"
    )
    settings = {name: value for name, value in vars(args).items() if name != "json"}
    common.keep(args.json, {"benchmark": "slow_down", **settings, "results": runs})


if __name__ == "__main__":
    main()
