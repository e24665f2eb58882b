"""What comparing replicas costs a step: CPU time of one worker's look at its part, and what else is done at each
opening.

One process, one torch thread, no peers: a look reads memory, hashes it and hashes the settings, whoever else is there.
The model is a perceptron of about the given number of parameters with Adam's state beside it, and is used as in a run:
light state, look, digest, at each step. Steps after the first twenty are those of the usual rate; the first twenty
read up to 5 MB each.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from torch import nn

from experiments.benchmarks import common
from raytrain_het.worker.state.replica import Replica
from raytrain_het.worker.state.replica_check import EAGER_STEPS, ReplicaCheck

STEP_MS = 100.0
"""What is called a step in the share told."""


def replica(num_parameters: int) -> Replica:
    """A model of about so many parameters, after one step of Adam."""
    width = round((num_parameters / 8) ** 0.5)
    layers = [layer for _ in range(8) for layer in (nn.Linear(width, width), nn.ReLU())]
    model = nn.Sequential(*layers, nn.BatchNorm1d(width))
    optimizer = torch.optim.Adam(model.parameters())
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    return Replica(model, optimizer)


def measure(num_parameters: int, every: int, steps: int) -> dict[str, Any]:
    """Milliseconds of CPU time by step."""
    of = replica(num_parameters)
    check = ReplicaCheck(of, every=every, everything=False)
    total = sum(p.numel() * 4 * 3 for _, p in of.named_parameters())
    took, other = [], torch.empty(16_000_000)
    for step in range(steps + EAGER_STEPS):
        other.fill_(step)  # A step between two looks: caches hold something else.
        light = of.light()
        began = time.thread_time()
        look = check.look(step, light, {"position": step})
        assert look is not None
        look.digest()
        took.append((time.thread_time() - began) * 1000)
    usual = np.array(took[EAGER_STEPS:])
    whole_began = time.thread_time()
    check.whole_audit(of.light(), {})
    return {
        "parameters": sum(p.numel() for _, p in of.named_parameters()),
        "bytes_mb": round(total / 1e6, 1),
        "mean_ms": round(float(usual.mean()), 3),
        "median_ms": round(float(np.median(usual)), 3),
        "longest_ms": round(float(usual.max()), 3),
        "first_20_mean_ms": round(float(np.mean(took[:EAGER_STEPS])), 3),
        "share_of_100_ms_percent": round(float(usual.mean()) / STEP_MS * 100, 3),
        "a_report_ms": round((time.thread_time() - whole_began) * 1000, 1),
    }


def main() -> None:
    def add(parser: Any) -> None:
        parser.add_argument("--parameters", type=float, nargs="+", default=[1.3e6, 25e6])
        parser.add_argument("--every", type=int, default=50, help="replica_check_steps")
        parser.add_argument("--steps", type=int, default=400)

    args = common.arguments(__doc__, add)
    torch.set_num_threads(1)
    rows = [measure(int(n), args.every, args.steps) for n in args.parameters]
    common.show("Comparing replicas, of a step", rows)
    common.keep(args.json, {"benchmark": "replica_check", "every": args.every, "steps": args.steps, "rows": rows})


if __name__ == "__main__":
    main()
