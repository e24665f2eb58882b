"""Unequal workers: what a fleet does together, as a fraction of the sum of what each worker does by itself.

Plain processes under CPU quotas of the kernel (Linux, as root), one torch thread each, gloo, no Ray. Every process
holds three copies of a conv net of 1.1 million parameters: one for itself (*solo*), one in torch's
``DistributedDataParallel``, one prepared by raytrain_het. They take turns in blocks, round after round:

- *solo*: all workers at once, each by itself, without any communication, with the batch that it has in *het*;
- *ddp*: DDP with equal batches, what stock Ray Train does;
- *static*: DDP with batches in proportion to the solo speeds at equal batches, measured before (an oracle: nobody has
  that at hand), each loss weighted so that the mean gradient is right;
- *het*: ``HetConfig(shares="auto")``, which starts with equal shares and learns the rest from its own steps.

The first ``--settle`` steps of *het* are not counted, but the number of tables that it took is shown. What counts: the
median over rounds of (global batch / step time) / (sum of solo speeds of the same round).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import raytrain_het as het
from experiments.benchmarks import common
from raytrain_het.allocation.batch_shares import apportion
from raytrain_het.testing.processes import ProcessLab
from raytrain_het.training.session import current

SAMPLES = 16384


def make_net() -> nn.Module:
    """Two convolutions and two linear layers: 1.06 million parameters, for images of 16 x 16."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(512, 1984), nn.ReLU(), nn.Linear(1984, 10),
    )  # fmt: skip


def make_data() -> TensorDataset:
    """Noise and labels, the same everywhere: what is measured does not depend on what is learnt."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(SAMPLES, 1, 16, 16, generator=generator)
    return TensorDataset(images, torch.randint(0, 10, (SAMPLES,), generator=generator))


class Side:
    """A copy of the model with what it takes to train it outside of raytrain_het."""

    def __init__(self, data: TensorDataset, model: nn.Module) -> None:
        self.model, (self.x, self.y) = model, data.tensors
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        self.place = 0

    def step(self, batch: int, factor: float = 1.0) -> None:
        """One step; the loss is the mean over the batch, times ``factor``."""
        if self.place + batch > len(self.x):
            self.place = 0
        part = slice(self.place, self.place + batch)
        self.place += batch
        loss = F.cross_entropy(self.model(self.x[part]), self.y[part]) * factor
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


def timed(steps: int, run: Callable[[], None]) -> float:
    """Seconds per step of a block that starts and ends at a barrier."""
    dist.barrier()
    began = time.perf_counter()
    for _ in range(steps):
        run()
    dist.barrier()
    return (time.perf_counter() - began) / steps


def solo_speed(side: Side, batch: int, seconds: float) -> float:
    """Samples per second of a worker by itself, while the others do the same."""
    side.step(batch)
    dist.barrier()
    began, done = time.perf_counter(), 0
    while time.perf_counter() - began < seconds or done == 0:
        side.step(batch)
        done += batch
    speed = done / (time.perf_counter() - began)
    dist.barrier()
    return speed


def gathered(value: float, size: int) -> list[float]:
    """Every worker's value."""
    values = [torch.zeros(1, dtype=torch.float64) for _ in range(size)]
    dist.all_gather(values, torch.tensor([value], dtype=torch.float64))
    return [float(v) for v in values]


def train(directory: str, *, size: int, total: int, rounds: int, steps: int, settle: int, solo_s: float) -> list[dict]:
    """Runs in every worker; returns the rounds' figures, the same on all."""
    session = current()
    rank = session.slot
    dist.init_process_group("gloo", init_method=f"file://{directory}/ddp", rank=rank, world_size=size)
    data = make_data()
    solo, ddp = Side(data, make_net()), Side(data, DistributedDataParallel(make_net()))
    equal = total // size
    static = apportion(total, gathered(solo_speed(solo, equal, solo_s), size))
    model = het.prepare_model(make_net())
    optimizer = het.prepare_optimizer(torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9))
    loader = het.prepare_data_loader(DataLoader(data, shuffle=True, drop_last=True), global_batch_size=total)
    results: list[dict[str, Any]] = []
    count, began, settled = 0, 0.0, False
    for _ in loader.epochs(10**6):
        for x, y in loader:
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            count += 1
            if count < (steps if settled else settle):
                continue
            dist.barrier()
            taken = (time.perf_counter() - began) / count
            if settled:
                share = session._batch_share()
                results.append({
                    "het_s": taken, "shares": [int(b) for b in gathered(share, size)], "static_shares": static,
                    "solo": gathered(solo_speed(solo, share, solo_s), size),
                    "ddp_s": timed(steps, lambda: ddp.step(equal)),
                    "static_s": timed(steps, lambda: ddp.step(static[rank], static[rank] * size / total)),
                    "table": session._agent().record.table,
                })  # fmt: skip
            settled = True
            if len(results) == rounds:
                return results
            dist.barrier()
            count, began = 0, time.perf_counter()
    return results


def measure(args: Any) -> dict[str, Any]:
    """Run it and evaluate the rounds."""
    size, total = len(args.cores), args.global_batch

    def run(directory: str) -> list[dict]:
        return train(
            directory,
            size=size,
            total=total,
            rounds=args.rounds,
            steps=args.steps,
            settle=args.settle,
            solo_s=args.solo_s,
        )

    with common.scratch() as directory:
        lab = ProcessLab(run, directory, num_slots=size, config=het.HetConfig(), ledger=False, cores=args.cores)
        rounds = lab.run(timeout_s=3600)[0]
    figures: dict[str, Any] = {"cores": args.cores, "global_batch": total}
    for side in ("ddp", "static", "het"):
        fractions = [total / r[f"{side}_s"] / sum(r["solo"]) for r in rounds]
        low, high = common.bootstrap_interval(fractions)
        figures[side] = {"fraction": statistics.median(fractions), "low": low, "high": high,
                         "step_s": statistics.median(r[f"{side}_s"] for r in rounds)}  # fmt: skip
    for side in ("ddp", "static"):
        figures[f"het against {side}"] = statistics.median(r[f"{side}_s"] / r["het_s"] for r in rounds)
    return figures | {"shares": rounds[-1]["shares"], "static_shares": rounds[-1]["static_shares"],
                      "tables": rounds[-1]["table"], "rounds": rounds}  # fmt: skip


def main() -> None:
    def add(parser: Any) -> None:
        parser.add_argument("--cores", type=float, nargs="+", default=[0.8, 0.4, 0.2, 0.2])
        parser.add_argument("--global-batch", type=int, default=1024)
        parser.add_argument("--rounds", type=int, default=7)
        parser.add_argument("--steps", type=int, default=8, help="steps in a block")
        parser.add_argument("--settle", type=int, default=40, help="first steps of het, not counted")
        parser.add_argument("--solo-s", type=float, default=10.0, help="seconds of a solo block")

    args = common.arguments(__doc__, add)
    result = measure(args)
    rows = [{"side": side, **result[side]} for side in ("ddp", "static", "het")]
    title = f"Fraction of the sum of solo speeds; cores {args.cores}, global batch {args.global_batch}"
    common.show(f"{title}; shares {result['shares']}, {result['tables']} tables", rows)
    for side in ("ddp", "static"):
        print(f"het against {side}: {result[f'het against {side}']:.3f} times as fast")
    common.keep(args.json, {"benchmark": "mixed_fleet", **result})


if __name__ == "__main__":
    main()
