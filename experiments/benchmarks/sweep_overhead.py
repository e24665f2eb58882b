"""What a trial of a sweep takes beyond the same run by itself.

    python -m experiments.benchmarks.sweep_overhead --pairs 5

In one Ray: the digits job by itself (its trainer's ``fit``), then a sweep of two trials of the same job, again and
again. A trial is what the sweep's ledger says of it, from its beginning to its end: the first one starts the trial's
process, the second one goes on in it. Besides, a whole sweep of two trials less two runs.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import tempfile
import time
from pathlib import Path

from raytrain_het.jobs.ray_session import ray_session
from raytrain_het.jobs.table import load_job
from raytrain_het.jobs.trainer import make_trainer
from raytrain_het.sweeps import SweepConfig, make_sweep, run_sweep
from raytrain_het.sweeps.ledger import read_ledger


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rounds = []
    with tempfile.TemporaryDirectory() as folder, ray_session("local", num_cpus=2):
        for k in range(-1, arguments.pairs):  # The first round starts what all later ones find there.
            found = one_round(Path(folder), f"r{k + 1}", arguments.epochs)
            if k >= 0:
                rounds.append(found)
                if not arguments.json:
                    print(f"round {k + 1}: " + ", ".join(f"{name} {s:.1f} s" for name, s in found.items()), flush=True)
    over = {
        "first trial": [r["first trial"] - r["alone"] for r in rounds],
        "second trial": [r["second trial"] - r["alone"] for r in rounds],
        "whole sweep, per trial": [r["sweep"] / 2 - r["alone"] for r in rounds],
    }
    result = {"rounds": rounds, "over": {name: statistics.median(values) for name, values in over.items()}}
    if arguments.json:
        print(json.dumps(result))
        return
    print(f"\na run alone: {statistics.median(r['alone'] for r in rounds):.1f} s (median of {arguments.pairs})")
    for name, values in over.items():
        print(f"{name:24} {statistics.median(values):+.1f} s more ({min(values):+.1f} to {max(values):+.1f})")


def one_round(folder: Path, name: str, epochs: int) -> dict[str, float]:
    """Seconds of a run by itself, of two trials of the same, and of their sweep."""
    job = load_job(None, [f"epochs={epochs}", f"name={name}", f"storage={folder / 'alone'}", "keep_checkpoints=1"])
    began = time.monotonic()
    make_trainer(job, lambda *told: None).fit()
    alone = time.monotonic() - began
    sweep = make_sweep(
        SweepConfig(
            space={"label_smoothing": {"grid": [0.1, 0.10001]}}, metric="accuracy", search="grid",
            set={"epochs": epochs}, storage=str(folder / "sweeps"),
        )
    )  # fmt: skip
    began = time.monotonic()
    with contextlib.redirect_stdout(io.StringIO()):
        results = run_sweep(sweep, name=name)
    seconds = time.monotonic() - began
    first, second = (entry.wall_s for entry in read_ledger(results.folder).values())
    return {"alone": alone, "first trial": first, "second trial": second, "sweep": seconds}


if __name__ == "__main__":
    main()
