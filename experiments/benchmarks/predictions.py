"""Predicted against measured throughput of a fleet: before its first step, and after 20 steps.

On Ray nodes with CPU quotas (:class:`raytrain_het.testing.cluster.RayLab`; Linux, as root), several times over, each
time on new nodes that know nothing of earlier runs:

1. *before*: what ``raytrain-het probe --model`` predicts;
2. the same job is run. *after 20 steps*: what the membership actor expects by then of the shares in force;
3. *measured*: samples over time from there on, the median over epochs, evaluation between them not included.

Each row gives both predictions as multiples of what was measured, and how many tables of shares there had been at the
second one and at the end.
"""

from __future__ import annotations

import io
import os
import statistics
import tempfile
import time
from typing import Any

import numpy as np

from experiments.benchmarks import common
from raytrain_het.jobs.display import PlainDisplay, Records, Status
from raytrain_het.jobs.probe import run_probe
from raytrain_het.jobs.runner import run_job
from raytrain_het.jobs.table import load_job
from raytrain_het.testing.cluster import Node, RayLab

MIN_POINTS = 6
"""Of an epoch whose speed counts; the driver looks twice a second."""


class Recorder(PlainDisplay):
    """Keeps what the driver learns of a run: (time, status), each time that a step was committed since the last."""

    def __init__(self) -> None:
        super().__init__(io.StringIO())
        self.seen: list[tuple[float, dict[str, Any]]] = []

    def on_update(self, status: Status, events: Records, reports: Records) -> None:
        if status["samples"] > (self.seen[-1][1]["samples"] if self.seen else 0):
            self.seen.append((time.monotonic(), dict(status)))


def measure_once(args: Any, name: str, folder: str) -> dict[str, Any]:
    """Probe and run on nodes of their own."""
    settings = ["workers=auto", f"epochs={args.epochs}", f"storage={folder}", f"name={name}", *args.set]
    job = load_job(args.job, settings)
    os.environ["XDG_CACHE_HOME"] = f"{folder}/{name}.cache"  # Of its own: profiles that others kept are not found.
    with RayLab([Node(cores=cores) for cores in args.cores]) as lab:
        model = run_probe(job=job, address=lab.address, say=lambda line: None).model
        assert model is not None
        recorder = Recorder()
        run_job(job, display=recorder, address=lab.address)
    known = [(t, s) for t, s in recorder.seen if s["step"] >= args.after and s["expected_samples_per_s"]]
    speeds = []
    for epoch in {s["epoch"] for _, s in known}:
        # Not its first point: that may be the end of the one before, and an evaluation lies between the two.
        part = [(t, s["samples"]) for t, s in known if s["epoch"] == epoch][1:]
        if len(part) >= MIN_POINTS:
            times, samples = np.array(part).T
            speeds.append(float(np.polyfit(times, samples, 1)[0]))
    if not speeds:
        raise SystemExit(f"no epoch was seen at {MIN_POINTS} points or more after step {args.after}: take longer ones")
    measured, first, last = statistics.median(speeds), known[0][1], known[-1][1]
    return {
        "before": model.advice.prediction.samples_per_s,
        "after": first["expected_samples_per_s"],
        "after_step": first["step"],
        "measured": measured,
        "table": first["table"],
        "last table": last["table"],
        "steps": last["step"],
        "epochs": len(speeds),
        "before / measured": model.advice.prediction.samples_per_s / measured,
        "after / measured": first["expected_samples_per_s"] / measured,
    }


def main() -> None:
    def add(parser: Any) -> None:
        parser.add_argument("--cores", type=float, nargs="+", default=[0.8, 0.4, 0.2, 0.2])
        parser.add_argument("--job", default="experiments/jobs/char_lm.yaml")
        parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the job")
        parser.add_argument("--epochs", type=int, default=6)
        parser.add_argument("--after", type=int, default=20, help="steps after which the second prediction is taken")
        parser.add_argument("--runs", type=int, default=5)

    args = common.arguments(__doc__, add)
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure_once(args, f"run{i}", folder) for i in range(args.runs)]
    common.show(f"Predicted and measured samples/s; {args.job}, cores {args.cores}", rows)
    for name in ("before", "after"):
        off = [abs(row[f"{name} / measured"] - 1) for row in rows]
        print(f"{name}: off by {statistics.median(off):.3f} (median), {max(off):.3f} (most)")
    common.keep(args.json, {"benchmark": "predictions", "cores": args.cores, "job": args.job, "rows": rows})


if __name__ == "__main__":
    main()
