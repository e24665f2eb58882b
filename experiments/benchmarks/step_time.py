"""Step time of four equal workers against plain DistributedDataParallel.

Four processes, one torch thread each, gloo on this machine, no Ray. Each process holds the same model twice: one copy
in ``DistributedDataParallel`` on a gloo group of its own, one prepared by raytrain_het's public functions. They run in
turns, in blocks of steps (ABBA), so that whatever else the machine does meets both alike; while one runs, the other is
idle. Every block starts and ends at a barrier. A step is everything between two batches: fetching the batch, forward,
backward, update. Both take batches from the same tensors by one indexing each, which is the cheapest loader DDP can
have.

The batch size is chosen so that DDP's step takes ``--step-ms`` or more. What counts is the ratio of a block of ours to
the DDP block beside
it: the median over pairs, with a 95 % bootstrap interval over pairs. The upper end must be 1.05 or less.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import raytrain_het as het
from experiments.benchmarks import common
from raytrain_het.testing.lab_worker import WorkerFiles
from raytrain_het.testing.processes import LabSlots, ProcessLab
from raytrain_het.worker.session import current

SAMPLES = 32768


def cpu_seconds() -> float:
    """CPU time of all threads of this process."""
    return time.process_time()


class PlainDDP:
    """The side to compare with."""

    def __init__(self, data: Any, rank: int, size: int) -> None:
        self.model = DistributedDataParallel(common.make_model())
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)
        self.x, self.y = data.tensors
        self.order = torch.randperm(len(data), generator=torch.Generator().manual_seed(rank))
        self.place = 0

    def step(self, batch: int) -> None:
        if self.place + batch > len(self.order):
            self.place = 0
        picked = self.order[self.place : self.place + batch]
        self.place += batch
        loss = F.cross_entropy(self.model(self.x[picked]), self.y[picked])
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def block(self, batch: int, steps: int) -> dict[str, float]:
        dist.barrier()
        started, cpu = time.perf_counter(), cpu_seconds()
        for _ in range(steps):
            self.step(batch)
        dist.barrier()
        return {"wall_s": (time.perf_counter() - started) / steps, "cpu_s": (cpu_seconds() - cpu) / steps}

    def choose_batch(self, step_s: float) -> int:
        """The same on all ranks: the smallest of some batch sizes at which a step takes long enough."""
        batch = 64
        while True:
            self.block(batch, 2)
            # The fastest of some blocks: a disturbed one would pass for a long step.
            taken = torch.tensor([min(self.block(batch, 4)["wall_s"] for _ in range(4))])
            dist.broadcast(taken, 0)
            if float(taken) >= step_s:
                return batch
            batch = int(batch * min(2.0, max(1.08 * step_s / float(taken), 1.1)) / 8 + 1) * 8


def train(directory: str, *, size: int, blocks: int, steps: int, step_s: float, batch: int, config: dict) -> list[dict]:
    """Runs in every worker: alternates between the two sides, led by the loop over our loader."""
    rank = current().slot
    dist.init_process_group("gloo", init_method=f"file://{directory}/ddp", rank=rank, world_size=size)
    data = common.make_data(SAMPLES)
    ddp = PlainDDP(data, rank, size)
    batch = batch or ddp.choose_batch(step_s)
    results: list[dict[str, Any]] = []
    count, block, started, cpu = 0, -1, 0.0, 0.0  # The first block of either side warms up.
    for _ in common.het_steps(common.make_model(), data, size * batch):
        count += 1
        if count < steps:
            continue
        dist.barrier()
        taken = time.perf_counter() - started
        ours = {"wall_s": taken / steps, "cpu_s": (cpu_seconds() - cpu) / steps}
        # ABBA: after every even block of ours both DDP blocks come; then two of ours.
        if block < 0:
            ddp.block(batch, steps)
        else:
            results.append({"side": "het", "block": block, "batch": batch, **ours})
            if block % 2 == 0:
                results += [
                    {"side": "ddp", "block": b, "batch": batch, **ddp.block(batch, steps)} for b in (block, block + 1)
                ]
        block += 1
        if block == blocks:
            return results
        dist.barrier()
        count, started, cpu = 0, time.perf_counter(), cpu_seconds()
    return results


def measure(args: Any) -> dict[str, Any]:
    """Run it and evaluate the blocks; all ranks move together, so rank 0's clock is taken."""
    size, blocks, steps, step_s, batch = args.workers, 2 * args.pairs, args.steps, args.step_ms / 1000, args.batch

    def run(directory: str) -> list[dict]:
        return train(directory, size=size, blocks=blocks, steps=steps, step_s=step_s, batch=batch, config={})

    with common.scratch() as directory:
        lab = ProcessLab(
            run,
            directory,
            LabSlots(num_slots=size),
            config=het.HetConfig(**args.config),
            files=WorkerFiles(ledger=False),
        )
        results = lab.run(timeout_s=3600)
    rows = results[0]
    pair = {side: [r for r in rows if r["side"] == side] for side in ("het", "ddp")}
    ratios = [h["wall_s"] / d["wall_s"] for h, d in zip(pair["het"], pair["ddp"], strict=True)]
    low, high = common.bootstrap_interval(ratios)
    cpu = {
        side: float(
            np.median(
                [
                    sum(r["cpu_s"] for r in step)
                    for step in zip(
                        *([row for row in results[rank] if row["side"] == side] for rank in results), strict=True
                    )
                ]
            )
        )
        for side in ("het", "ddp")
    }
    return {
        "ratio": float(np.median(ratios)),
        "low": low,
        "high": high,
        "steps_each": steps * len(ratios),
        "ddp_ms": 1000 * float(np.median([r["wall_s"] for r in pair["ddp"]])),
        "het_ms": 1000 * float(np.median([r["wall_s"] for r in pair["het"]])),
        "ddp_cpu_ms": 1000 * cpu["ddp"],
        "het_cpu_ms": 1000 * cpu["het"],
        "batch": rows[0]["batch"],
        "ratios": ratios,
        "passes": high <= 1.05 and pair["ddp"] != [],
    }


def main() -> None:
    def add(parser: Any) -> None:
        parser.add_argument("--workers", type=int, default=4)
        parser.add_argument("--pairs", type=int, default=24, help="half as many blocks of each side")
        parser.add_argument("--steps", type=int, default=10, help="steps in a block")
        parser.add_argument("--step-ms", type=float, default=110.0, help="DDP's step takes at least so long")
        parser.add_argument("--batch", type=int, default=0, help="samples of each worker, instead of choosing")
        parser.add_argument("--bucket-mib", type=float, default=None)

    args = common.arguments(__doc__, add)
    args.config = {} if args.bucket_mib is None else {"bucket_mib": args.bucket_mib}
    result = measure(args)
    shown = {k: v for k, v in result.items() if k != "ratios"}
    common.show("Step time against plain DDP (ratio het / ddp; CPU time of all workers)", [shown])
    common.keep(args.json, {"benchmark": "step_time", **result})


if __name__ == "__main__":
    main()
