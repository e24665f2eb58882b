"""CPU time of a worker in a step with many small buckets, by the number of workers.

One machine, one torch thread a worker, 1.3 million parameters in some 20 buckets, two samples a worker: next to nothing
is computed, and what is left is what a step costs a worker however small it is. CPU time is that of the whole process,
by the kernel: all of its threads, whatever they do. The watchman beside it is a process of its own and is not in it.

*solo* is the same step in the same process without any of this, a copy of the model and its optimizer: what the
training itself takes. Workers are Ray Train's, or with ``--plain`` processes without Ray. *longest* is that of the
worker with the most.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import raytrain_het as het
from experiments.benchmarks import common

LAYERS, WIDTH, BATCH = 20, 256, 2
CONFIG = het.HetConfig(shares=None, bucket_mib=0.26)


def make_model() -> nn.Module:
    """1.32 million parameters."""
    torch.manual_seed(0)
    return nn.Sequential(*[layer for _ in range(LAYERS) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU())])


def update(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> None:
    """One step."""
    optimizer.zero_grad()
    F.mse_loss(model(x), y).backward()
    optimizer.step()


def train(directory: str, num_workers: int, steps: int, warm: int) -> dict[str, float]:
    """Runs in every worker. Milliseconds a step."""
    torch.set_num_threads(1)
    data = TensorDataset(*torch.randn(2, 64 * num_workers * BATCH, WIDTH, generator=torch.Generator().manual_seed(0)))
    plain = make_model()
    plain_optimizer = torch.optim.SGD(plain.parameters(), lr=0.01, momentum=0.9)
    model = het.prepare_model(make_model())
    optimizer = het.prepare_optimizer(torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9))
    loader = het.prepare_data_loader(
        DataLoader(data, shuffle=True, drop_last=True), global_batch_size=num_workers * BATCH
    )
    done, cpu_began, wall_began, found = 0, 0.0, 0.0, {}
    for _ in loader.epochs(-(-(warm + steps + 1) // 64)):
        for x, y in loader:
            if done == warm:
                cpu_began, wall_began = time.process_time(), time.perf_counter()
            if done == warm + steps:
                found["cpu_ms"] = (time.process_time() - cpu_began) * 1000 / steps
                found["step_ms"] = (time.perf_counter() - wall_began) * 1000 / steps
            update(model, optimizer, x, y)
            done += 1
    solo_began = time.thread_time()
    for _ in range(steps):
        update(plain, plain_optimizer, x, y)
    found["solo_ms"] = (time.thread_time() - solo_began) * 1000 / steps
    Path(directory, f"{os.getpid()}.json").write_text(json.dumps(found))
    return found


def under_ray(num_workers: int, steps: int, warm: int) -> list[dict[str, float]]:
    """By worker."""
    import ray
    from ray.train import RunConfig

    with tempfile.TemporaryDirectory() as directory:
        found = Path(directory, "found")
        found.mkdir()
        ray.init(num_cpus=num_workers, include_dashboard=False, logging_level="ERROR")
        try:
            het.HetTrainer(
                lambda: train(str(found), num_workers, steps, warm) and None,
                scaling_config=het.HetScalingConfig(workers=[het.WorkerSpec(count=num_workers)]),
                het_config=CONFIG,
                run_config=RunConfig(name="cpu", storage_path=directory),
            ).fit()
        finally:
            ray.shutdown()
        return [json.loads(path.read_text()) for path in found.iterdir()]


def as_processes(num_workers: int, steps: int, warm: int) -> list[dict[str, float]]:
    """By worker."""
    from raytrain_het.testing.lab_worker import WorkerFiles
    from raytrain_het.testing.processes import LabSlots, ProcessLab

    def run(directory: str) -> dict[str, float]:
        return train(directory, num_workers, steps, warm)

    with common.scratch() as directory:
        lab = ProcessLab(
            run, directory, LabSlots(num_slots=num_workers), config=CONFIG, files=WorkerFiles(ledger=False)
        )
        return list(lab.run(timeout_s=600).values())


def main() -> None:
    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--workers", type=int, nargs="+", default=[4, 16])
        parser.add_argument("--steps", type=int, default=150)
        parser.add_argument("--warm", type=int, default=50, help="first steps, not counted")
        parser.add_argument("--plain", action="store_true", help="processes without Ray")

    args = common.arguments(__doc__, add)
    rows: list[dict[str, Any]] = []
    for num_workers in args.workers:
        found = (as_processes if args.plain else under_ray)(num_workers, args.steps, args.warm)
        rows.append(
            {
                "workers": num_workers,
                **{name: statistics.median(worker[name] for worker in found) for name in found[0]},
                "longest": max(worker["cpu_ms"] for worker in found),
            }
        )
    common.show("CPU time of a worker and step, milliseconds, medians over workers", rows)
    common.keep(args.json, {"benchmark": "worker_cpu", "under_ray": not args.plain, "rows": rows})


if __name__ == "__main__":
    main()
