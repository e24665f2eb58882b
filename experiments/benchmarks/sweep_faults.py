"""Twenty trials of a sweep, of which about half are pruned, one raises, and whose driver is killed once and resumed.

    python -m experiments.benchmarks.sweep_faults

On a cluster of its own, that outlives the driver. Afterwards all trials must be accounted for, the cluster's resources
be free as at the start, and no trial that had ended have run again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import yaml
from ray.cluster_utils import Cluster

from raytrain_het.sweeps.ledger import TrialEntry, read_ledger
from raytrain_het.sweeps.runs import read_reports

RATES = [
    0.1,
    1e-9,
    0.08,
    1e-8,
    0.09,
    1e30,
    0.07,
    1e-7,
    0.06,
    2e-9,
    0.05,
    2e-8,
    0.04,
    2e-7,
    0.03,
    3e-9,
    0.02,
    3e-8,
    0.01,
    3e-7,
]
"""Some train, some learn nothing and are to be pruned, and one is not finite and raises."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=len(RATES))
    parser.add_argument("--kill-after", type=int, default=7, help="trials that have ended when the driver is killed")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
    try:
        with tempfile.TemporaryDirectory() as folder:
            result = measure(Path(folder), cluster.address, arguments.trials, arguments.kill_after)
    finally:
        ray.shutdown()
        cluster.shutdown()
    if arguments.json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        print(f"{name:42} {value}")


def measure(folder: Path, address: str, num_trials: int, kill_after: int) -> dict[str, Any]:
    """What became of the trials."""
    sweep = {
        "space": {"lr": {"grid": RATES[:num_trials]}},
        "metric": "accuracy",
        "search": "grid",
        "scheduler": {"asha": {"grace_epochs": 1, "reduction_factor": 2}},
        "set": {"epochs": 4, "het.shares": "auto", "global_batch_size": 128},
    }
    (folder / "s.yaml").write_text(yaml.safe_dump(sweep))
    command = [sys.executable, "-m", "raytrain_het.cli", "sweep", str(folder / "s.yaml"), "--name", "x"]
    command += ["--storage", str(folder), "--address", address]
    ledger, before = folder / "x", free()
    driver = subprocess.Popen(command, stdout=subprocess.PIPE)
    wait_for(lambda: len(ended(ledger)) >= kill_after and len(read_ledger(ledger)) > len(ended(ledger)), 1800)
    driver.kill()
    driver.communicate()
    ended_before = {key: (e, read_reports(ledger / "runs" / e.run)) for key, e in ended(ledger).items()}
    killed = time.monotonic()
    wait_for(lambda: free() == before, 60)
    free_after_s = time.monotonic() - killed
    out = subprocess.run([*command, "--resume", "--json"], stdout=subprocess.PIPE, text=True, check=False).stdout
    result = json.loads(out)
    ended_at = time.monotonic()
    wait_for(lambda: free() == before, 60)
    entries = read_ledger(ledger)
    return {
        "trials": len(entries),
        **{status: result[status] for status in ("complete", "pruned", "failed", "unfinished", "not begun")},
        "ended before the kill": len(ended_before),
        "of these begun again": sum(entries[k].num_starts - e.num_starts for k, (e, _) in ended_before.items()),
        "of these trained again": sum(
            read_reports(ledger / "runs" / e.run) != reports for e, reports in ended_before.values()
        ),
        "begun more than once": sum(e.num_starts > 1 for e in entries.values()),
        "resources free after the kill, s": round(free_after_s, 1),
        "resources free after the end, s": round(time.monotonic() - ended_at, 1),
        "free resources as at the start": free() == before,
    }


def ended(ledger: Path) -> dict[str, TrialEntry]:
    """Trials that have ended."""
    return {key: e for key, e in read_ledger(ledger).items() if e.status != "unfinished"}


def free() -> dict[str, float]:
    """The cluster's, but for what memory a machine happens to have."""
    return {k: v for k, v in ray.available_resources().items() if k == "CPU" or k.startswith("node:")}


def wait_for(condition: Callable[[], bool], timeout_s: float) -> None:
    """Poll until it holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {timeout_s:.0f} s")
        time.sleep(0.2)


if __name__ == "__main__":
    main()
