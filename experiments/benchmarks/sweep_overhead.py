"""What a trial of a sweep takes beyond the same run by itself.

    python -m experiments.benchmarks.sweep_overhead --pairs 5

In one Ray: the digits job by itself (its trainer's ``fit``), then a sweep of two trials of the same job, again and
again. A trial is what the sweep's ledger says of it, from its beginning to its end: the first one starts the trial's
process, the second one goes on in it. Besides, a whole sweep of two trials less two runs.

*stolen* is the time, by core, for which a virtual machine's cores wanted to run and its host did not let them: what
differs by that differs by what others did.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import statistics
import tempfile
import threading
import time
from pathlib import Path

from raytrain_het.jobs.ray_session import ray_session
from raytrain_het.jobs.table import load_job
from raytrain_het.jobs.trainer import make_trainer
from raytrain_het.sweeps import SweepConfig, make_sweep, run_sweep
from raytrain_het.sweeps.ledger import FILE as LEDGER
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
                    told = ", ".join(f"{which} {s:.1f} s ({stolen:.1f} stolen)" for which, (s, stolen) in found.items())
                    print(f"round {k + 1}: {told}", flush=True)
    over = {name: [over_alone(r, name) for r in rounds] for name in rounds[0] if name != "alone"}
    if arguments.json:
        print(json.dumps({"rounds": rounds, "over": over}))
        return
    print(f"\na run alone: {statistics.median(r['alone'][0] for r in rounds):.1f} s (median of {arguments.pairs})")
    for name, pairs in over.items():
        seconds, stolen = zip(*pairs, strict=True)
        print(
            f"{name:24} {statistics.median(seconds):+.1f} s more ({min(seconds):+.1f} to {max(seconds):+.1f}), "
            f"of which stolen {statistics.median(stolen):+.1f} ({min(stolen):+.1f} to {max(stolen):+.1f})"
        )


class StolenTime(threading.Thread):
    """How much of the time was stolen, of any stretch while it runs."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._seen: list[tuple[float, float]] = []
        self._enough = threading.Event()

    def run(self) -> None:
        while not self._enough.wait(0.1):
            with open("/proc/stat", encoding="ascii") as file:
                ticks = int(file.readline().split()[8])
            self._seen.append((time.time(), ticks / os.sysconf("SC_CLK_TCK") / (os.cpu_count() or 1)))

    def __enter__(self) -> StolenTime:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._enough.set()
        self.join()

    def between(self, began: float, ended: float) -> float:
        """Seconds of each core, by ``time.time``."""
        first, last = (max((s for s in self._seen if s[0] <= t), default=self._seen[0])[1] for t in (began, ended))
        return last - first


def over_alone(one: dict[str, tuple[float, float]], name: str) -> tuple[float, float]:
    seconds, stolen = (mine - alone for mine, alone in zip(one[name], one["alone"], strict=True))
    return seconds, stolen


def one_round(folder: Path, name: str, epochs: int) -> dict[str, tuple[float, float]]:
    """(seconds, stolen seconds) of a run by itself, of two trials of the same, and of half their sweep."""
    job = load_job(None, [f"epochs={epochs}", f"name={name}", f"storage={folder / 'alone'}", "keep_checkpoints=1"])
    sweep = make_sweep(
        SweepConfig(
            space={"label_smoothing": {"grid": [0.1, 0.10001]}},
            metric="accuracy",
            search="grid",
            set={"epochs": epochs},
            storage=str(folder / "sweeps"),
        )
    )
    with StolenTime() as stolen:
        times = [time.time()]
        make_trainer(job, lambda *told: None).fit()
        times.append(time.time())
        with contextlib.redirect_stdout(io.StringIO()):
            results = run_sweep(sweep, name=name)
        times.append(time.time())
    stretches = {"alone": (times[0], times[1])}
    lines = [json.loads(line) for line in (results.folder / LEDGER).read_text("utf-8").splitlines()]
    for which, key in zip(("first trial", "second trial"), read_ledger(results.folder), strict=True):
        own = [line["time"] for line in lines if line.get("id") == key]
        stretches[which] = (min(own), max(own))
    found = {which: (b - a, stolen.between(a, b)) for which, (a, b) in stretches.items()}
    found["whole sweep, per trial"] = ((times[2] - times[1]) / 2, stolen.between(*times[1:]) / 2)
    return found


if __name__ == "__main__":
    main()
