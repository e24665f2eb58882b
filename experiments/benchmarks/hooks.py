"""What hooks on the parameters cost in a backward pass, against torch's DDP comm hook, with all communication left out.

One process, one thread, the model with 1.3 million parameters. Three copies of it in turns, in blocks:

- *plain*: no hooks; the gradients stay where autograd leaves them;
- *ddp*: ``DistributedDataParallel`` (world size 1, gloo) with a comm hook that returns a finished future of the bucket
  as it is;
- *ours*: :class:`raytrain_het.worker.step.gradients.Gradients`, its buckets handed to a function that does nothing; the
  weighting, the check for finiteness and ``p.grad`` at its end included.

Measured are forward and backward together with ``zero_grad`` (DDP prepares its reducer in the forward pass), by the
thread's CPU time: median over blocks of the difference to *plain*. At a small batch the hooks are the larger part of
the figure, so that is the default.
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

from experiments.benchmarks import common
from raytrain_het.allreduce.jobs import StepJob
from raytrain_het.allreduce.step_summary import StepSummary
from raytrain_het.worker.step.gradients import Gradients


def plain() -> Callable[[torch.Tensor, torch.Tensor], None]:
    """No hooks at all."""
    model = common.make_model()

    def run(x: torch.Tensor, y: torch.Tensor) -> None:
        clear(model)
        F.cross_entropy(model(x), y).backward()

    return run


def ddp() -> Callable[[torch.Tensor, torch.Tensor], None]:
    """torch's route: DDP with a comm hook."""
    model = DistributedDataParallel(common.make_model())

    def finished(state, bucket):  # type: ignore[no-untyped-def]  # Torch compares annotations, and ours are texts.
        future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    model.register_comm_hook(None, finished)

    def run(x: torch.Tensor, y: torch.Tensor) -> None:
        clear(model)
        F.cross_entropy(model(x), y).backward()

    return run


def ours() -> Callable[[torch.Tensor, torch.Tensor], None]:
    """Our route."""
    model = common.make_model()
    gradients = Gradients(model, 4 * 2**20)
    step = 0

    def run(x: torch.Tensor, y: torch.Tensor) -> None:
        nonlocal step
        step += 1

        used: list[int] = []
        gradients.begin(
            StepJob(1, step),
            on_full=lambda buckets: used.extend(bucket.used for bucket in buckets),
            on_backward_done=lambda last: gradients.publish(StepSummary(step=step, total_weight=1.0, used=used)),
        )
        clear(model)
        gradients.arm(float(len(x)), of_buffers=float(len(x)), contributes=True, last=True)
        F.cross_entropy(model(x), y).backward()
        gradients.disarm()

    return run


def clear(model: nn.Module) -> None:
    """``zero_grad`` as an optimizer does it."""
    for p in model.parameters():
        p.grad = None


def main() -> None:
    def add(parser: Any) -> None:
        parser.add_argument("--batch", type=int, default=8)
        parser.add_argument("--blocks", type=int, default=40)
        parser.add_argument("--steps", type=int, default=20, help="backward passes in a block")

    args = common.arguments(__doc__, add)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    x, y = common.make_data(args.batch).tensors
    sides = {"plain": plain(), "ddp": ddp(), "ours": ours()}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for block in range(args.blocks + 2):
        for name, run in sides.items():
            began = time.thread_time()
            for _ in range(args.steps):
                run(x, y)
            if block >= 2:  # DDP settles its buckets after the first pass.
                times[name].append((time.thread_time() - began) / args.steps * 1000)
    rows = []
    for name, values in times.items():
        extra = [v - p for v, p in zip(values, times["plain"], strict=True)]
        low, high = common.bootstrap_interval(extra)
        rows.append(
            {
                "route": name,
                "forward and backward ms": statistics.median(values),
                "hooks ms": statistics.median(extra),
                "low": low,
                "high": high,
            }
        )
    common.show("Thread CPU time of one pass, communication left out", rows)
    common.keep(args.json, {"benchmark": "hooks", "batch": args.batch, "rows": rows, "times_ms": times})
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
