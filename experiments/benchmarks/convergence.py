"""What compression costs in quality, at equal samples: the built-in jobs' held-out metric with each codec against none.

Four workers with equal shares in plain processes, one torch thread each, no Ray; the jobs' own settings, but for
``--set``. The same seeds for all: data order and initial weights are the same, so differences are taken seed by seed.
``auto`` runs behind links of ``--rate`` Mbit/s (network namespaces; as root), where it has a reason to compress; what
it has chosen is told. All others run without such links, since the bytes that come are the same.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.train.torch
import torch

import raytrain_het as het
from experiments.benchmarks import common
from raytrain_het.jobs.config import JobConfig
from raytrain_het.jobs.table import load_job
from raytrain_het.testing.lab_worker import WorkerFiles
from raytrain_het.testing.processes import LabSlots, ProcessLab

JOBS = Path(__file__).parents[1] / "jobs"
METRIC = {"digits": ("accuracy", 100.0, "points"), "char_lm": ("bits_per_character", 1.0, "bits per character")}
SIZE = 4


@dataclass(frozen=True)
class Train:
    """A job's training function in a worker without Ray."""

    job: type[JobConfig]
    config: dict[str, Any]

    def __call__(self, directory: str) -> None:
        ray.train.torch.get_device = lambda: torch.device("cpu")
        self.job.train(self.config)


def run(kind: str, seed: int, compression: str, *, rate: float, overrides: list[str]) -> dict[str, Any]:
    """One run: its last report's metric, steps, and the codecs at the end."""
    workers = f"workers=[{{count: {SIZE}, resources: {{CPU: 1}}}}]"
    job = load_job(JOBS / f"{kind}.yaml", [workers, "het.shares=null", f"het.seed={seed}", *overrides])
    config = het.HetConfig(shares=None, seed=seed, compression=compression)
    rates = [rate] * SIZE if compression == "auto" else None
    with common.scratch() as directory:
        lab = ProcessLab(
            Train(type(job), job.train_loop_config()),
            directory,
            LabSlots(num_slots=SIZE, rates_mbit=rates),
            config=config,
            files=WorkerFiles(ledger=False),
        )
        lab.run(timeout_s=1800)
    name, factor, _ = METRIC[kind]
    report = lab.reports[-1]
    chosen = [e["codecs"] for e in lab.events if e["kind"] == "table" and e.get("codecs")]
    return {"value": factor * report["metrics"][name], "steps": report["step"], "chosen": chosen}


def main() -> None:
    def add(parser: Any) -> None:
        parser.add_argument("--job", choices=list(METRIC), default="digits")
        parser.add_argument("--seeds", type=int, default=3)
        parser.add_argument("--rate", type=float, default=5.0, help="Mbit/s of the links behind which auto runs")
        parser.add_argument(
            "--codecs", nargs="*", default=["int8", "int4", "topk(density=0.1)", "topk", "sign", "auto"]
        )
        parser.add_argument("--set", action="append", default=[], dest="overrides", help="of the job, such as epochs=5")

    args = common.arguments(__doc__, add)
    words, found = ["none", *args.codecs], {}
    for word in words:
        found[word] = [
            run(args.job, seed, word, rate=args.rate, overrides=args.overrides) for seed in range(args.seeds)
        ]
    rows = []
    for word in words:
        values = [r["value"] for r in found[word]]
        off = [value - dense["value"] for value, dense in zip(values, found["none"], strict=True)]
        rows.append(
            {
                "codec": word,
                "mean": statistics.fmean(values),
                "against none": statistics.fmean(off),
                "least": min(off),
                "most": max(off),
                "steps": found[word][0]["steps"],
            }
        )
    common.show(f"{args.job}, held out, {METRIC[args.job][2]}, {args.seeds} seeds", rows)
    for result in found.get("auto", []):
        print(f"auto chose {result['chosen'] or 'nothing'}")
    common.keep(args.json, {"benchmark": "convergence", "job": args.job, "rows": rows, "runs": found})


if __name__ == "__main__":
    main()
