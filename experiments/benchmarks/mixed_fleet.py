"""Unequal workers: what a fleet does together, as a fraction of the sum of what each worker does by itself.

Plain processes under CPU quotas of the kernel (Linux, as root), one torch thread each, no Ray. Every process holds four
copies of a conv net of 1.1 million parameters: one for itself (*solo*), two in torch's ``DistributedDataParallel`` over
gloo, one prepared by raytrain_het. All of them take random samples of the same data by index.
They take turns in blocks, round after round, in an order that moves on by one each round; a block begins with a step
that is not counted, and all blocks but *solo* have the same number of steps:

- *solo*: all workers at once, each by itself, without any communication, with the batch that it has in *het*;
- *ddp*: DDP with equal batches, what stock Ray Train does;
- *static*: DDP with the best batches that solo speeds can tell (an oracle: nobody has those at hand), each loss
  weighted so that the mean gradient is right. They are in proportion to speeds at these very batches: measured at equal
  batches, at what follows from that, and in each round again, of which the median counts;
- *het*: ``HetConfig(shares="auto")``, which starts with equal shares and learns the rest from its own steps.

The first ``--settle`` steps of *het* are not counted, but the number of tables that it took is shown. What counts: the
median over rounds of (global batch / step time) / (sum of solo speeds of the same round).

Beside them stands *bound*: what steps together would reach if messages and all else cost nothing. The workers' solo
step times at *het*'s shares are put side by side, first with first, second with second; of each such step the slowest
worker counts. What is missing there to 1 is chance: the same step takes a worker now less time and now more.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset

from experiments.benchmarks import common
from raytrain_het.balance.batch_shares import apportion
from raytrain_het.testing.lab_worker import WorkerFiles
from raytrain_het.testing.processes import LabSlots, ProcessLab
from raytrain_het.worker.session import current

SAMPLES = 16384
ORACLE_WINDOW = 5


def make_net() -> nn.Module:
    """Two convolutions and two linear layers: 1.10 million parameters, for images of 16 x 16."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(512, 2096),
        nn.ReLU(),
        nn.Linear(2096, 10),
    )


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
        self.order, self.place = torch.randperm(len(self.x)), 0

    def step(self, batch: int, factor: float = 1.0) -> None:
        """One step on random samples; the loss is the mean over the batch, times ``factor``."""
        if self.place + batch > len(self.order):
            self.place = 0
        part = self.order[self.place : self.place + batch]
        self.place += batch
        x, y = self.x.index_select(0, part), self.y.index_select(0, part)
        loss = F.cross_entropy(self.model(x), y) * factor
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


class HetSide:
    """The copy that raytrain_het trains: its loop, a step at a time."""

    def __init__(self, data: TensorDataset, total: int) -> None:
        self._steps = common.het_steps(make_net(), data, total)

    def step(self) -> None:
        """One step."""
        next(self._steps)


class Oracle:
    """Shares in proportion to the workers' solo speeds at these very shares.

    From equal ones on: where a step takes ``c + k b``, whose times at proportional shares are not yet equal, each
    measurement at the shares of the last one leaves ``c / (c + k b)`` of the error.
    """

    def __init__(self, total: int, size: int) -> None:
        self.shares = apportion(total, [1.0] * size)
        self._total = total
        self._seen: list[Sequence[float]] = []

    def learn(self, speeds: Sequence[float]) -> None:
        """The workers' speeds at the present shares. The first two are far from the end; of later ones the median of
        the last ``ORACLE_WINDOW`` counts."""
        self._seen.append(speeds)
        counted = self._seen[max(2, len(self._seen) - ORACLE_WINDOW) :] or [speeds]
        self.shares = apportion(self._total, [statistics.median(worker) for worker in zip(*counted, strict=True)])


def timed(steps: int, run: Callable[[], None]) -> float:
    """Seconds per step of a block that starts and ends at a barrier, after a step that is not counted."""
    run()
    dist.barrier()
    began = time.perf_counter()
    for _ in range(steps):
        run()
    dist.barrier()
    return (time.perf_counter() - began) / steps


def solo_steps(side: Side, batch: int, seconds: float) -> list[float]:
    """Durations of a worker's steps by itself, while the others do the same."""
    side.step(batch)
    dist.barrier()
    times = [time.perf_counter()]
    while times[-1] - times[0] < seconds:
        side.step(batch)
        times.append(time.perf_counter())
    dist.barrier()
    return [after - before for before, after in itertools.pairwise(times)]


def speed_of(batch: int, steps_s: Sequence[float]) -> float:
    """Samples per second."""
    return batch * len(steps_s) / sum(steps_s)


def solo_speed(side: Side, batch: int, seconds: float) -> float:
    """Samples per second of a worker by itself, while the others do the same."""
    return speed_of(batch, solo_steps(side, batch, seconds))


def together_s(steps_s: Sequence[Sequence[float]]) -> float:
    """A step's mean time, by workers' durations, if each waits for the slowest and nothing else takes time."""
    slowest = [max(step) for step in zip(*steps_s, strict=False)]
    return sum(slowest) / len(slowest)


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
    torch.manual_seed(rank)
    solo, ours = Side(data, make_net()), HetSide(data, total)
    ddp, static = (Side(data, DistributedDataParallel(make_net())) for _ in range(2))
    oracle = Oracle(total, size)
    figures: dict[str, Any] = {}

    def learn() -> None:
        figures["static_solo"] = gathered(solo_speed(solo, oracle.shares[rank], solo_s), size)
        oracle.learn(figures["static_solo"])

    def solo_block() -> None:
        share = session.joined().stats.batch_share()
        figures["shares"] = [int(b) for b in gathered(share, size)]
        steps_s: list[list[float]] = [[]] * size
        dist.all_gather_object(steps_s, solo_steps(solo, share, solo_s))
        figures["solo"] = [speed_of(b, durations) for b, durations in zip(figures["shares"], steps_s, strict=True)]
        figures["bound_s"] = together_s(steps_s)

    def ddp_block() -> None:
        figures["ddp_s"] = timed(steps, lambda: ddp.step(total // size))

    def static_block() -> None:
        learn()
        share = oracle.shares[rank]
        figures["static_shares"] = oracle.shares
        figures["static_s"] = timed(steps, lambda: static.step(share, share * size / total))

    def het_block() -> None:
        figures["het_s"] = timed(steps, ours.step)

    for _ in range(settle):
        ours.step()
    for _ in range(2):
        learn()
    results: list[dict[str, Any]] = []
    blocks = [het_block, solo_block, ddp_block, static_block]
    for i in range(rounds):
        for k in range(len(blocks)):
            blocks[(i + k) % len(blocks)]()
        results.append({**figures, "table": session.joined().connections.record().table})
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
        lab = ProcessLab(run, directory, LabSlots(num_slots=size, cores=args.cores), files=WorkerFiles(ledger=False))
        rounds = lab.run(timeout_s=3600)[0]
    settings = {name: value for name, value in vars(args).items() if name != "json"}
    figures: dict[str, Any] = {"cores": args.cores, "global_batch": total, "settings": settings}
    for side in ("ddp", "static", "het", "bound"):
        fractions = [total / r[f"{side}_s"] / sum(r["solo"]) for r in rounds]
        low, high = common.bootstrap_interval(fractions)
        figures[side] = {
            "fraction": statistics.median(fractions),
            "low": low,
            "high": high,
            "step_s": statistics.median(r[f"{side}_s"] for r in rounds),
        }
    for side in ("ddp", "static"):
        figures[f"het against {side}"] = statistics.median(r[f"{side}_s"] / r["het_s"] for r in rounds)
    return figures | {
        "shares": rounds[-1]["shares"],
        "static_shares": rounds[-1]["static_shares"],
        "tables": rounds[-1]["table"],
        "rounds": rounds,
    }


def main() -> None:
    def add(parser: Any) -> None:
        parser.add_argument("--cores", type=float, nargs="+", default=[0.8, 0.4, 0.2, 0.2])
        parser.add_argument("--global-batch", type=int, default=1024)
        parser.add_argument("--rounds", type=int, default=7)
        parser.add_argument("--steps", type=int, default=8, help="counted steps in a block")
        parser.add_argument("--settle", type=int, default=40, help="first steps of het, not counted")
        parser.add_argument("--solo-s", type=float, default=10.0, help="seconds of a solo block")

    args = common.arguments(__doc__, add)
    result = measure(args)
    rows = [{"side": side, **result[side]} for side in ("ddp", "static", "het", "bound")]
    title = f"Fraction of the sum of solo speeds; cores {args.cores}, global batch {args.global_batch}"
    common.show(f"{title}; shares {result['shares']}, {result['tables']} tables", rows)
    for side in ("ddp", "static"):
        print(f"het against {side}: {result[f'het against {side}']:.3f} times as fast")
    common.keep(args.json, {"benchmark": "mixed_fleet", **result})


if __name__ == "__main__":
    main()
