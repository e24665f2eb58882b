"""A thousand kills and refills of one member of a process group, in one run: do the others, or the hub, leak anything?

Three processes, no Ray, a tiny model. The third worker kills itself (``kill -9``) two committed steps after it
has healed, at the protocol's points in turn, and is refilled at once. The two survivors train throughout; every tenth
of a second they write down their threads, open file descriptors and resident memory (/proc), and so does the process
that hosts the hub.

What counts: in each of these processes the median over the last tenth of the refills against that over a tenth after
warm-up (the second tenth). Threads and descriptors must not have grown at all; memory by less than 2 %, and less than 2
KiB a refill.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import time
from pathlib import Path
from typing import Any

from experiments.benchmarks import common
from raytrain_het.membership.points import POINTS
from raytrain_het.testing.lab_worker import WorkerFiles
from raytrain_het.testing.processes import LabSlots, ProcessLab
from raytrain_het.worker.session import current

VICTIM = 2
STEPS_PER_LIFE = 2
INTERVAL_S = 0.1
KILL_POINTS = tuple(point for point in POINTS if point != "report")


class Meter:
    """Writes down what this process uses."""

    def __init__(self, path: Path, refills: Path) -> None:
        self._file, self._refills, self._last = path.open("w", buffering=1), refills, 0.0

    def sample(self) -> None:
        """At most every ``INTERVAL_S``."""
        if time.monotonic() - self._last < INTERVAL_S:
            return
        self._last = time.monotonic()
        self._file.write(json.dumps({"refills": self._refills.stat().st_size, **usage()}) + "\n")


def usage() -> dict[str, int]:
    """Threads, open file descriptors and resident kilobytes of this process."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        "threads": int(status["Threads"]),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "rss_kib": int(status["VmRSS"].split()[0]),
    }


def train(directory: str) -> None:
    """Runs in every worker. It never returns: the survivors are ended by the lab."""
    session, refills = current(), Path(directory) / "refills"
    if session.slot == VICTIM:
        arrange_death(refills)
    else:
        meter = Meter(Path(directory) / f"usage_{session.slot}_{os.getpid()}.jsonl", refills)
        session.listeners.append(lambda note: meter.sample())
    for _ in common.het_steps(common.make_model("tiny"), common.make_data(600), 6):
        pass


def arrange_death(refills: Path) -> None:
    """Die at one of the protocol's points, a few committed steps from now; ``refills`` grows by a byte each time."""
    committed: list[int] = []
    current().listeners.append(lambda note: committed.append(note.step))
    fatal = KILL_POINTS[refills.stat().st_size % len(KILL_POINTS)]

    def reached(point: str, step: int) -> None:
        # Between two buckets is reached by the communication thread, also while this worker heals.
        if point == fatal and len(committed) >= STEPS_PER_LIFE:
            with refills.open("ab") as file:
                file.write(b".")
            os.kill(os.getpid(), signal.SIGKILL)

    current().points.listeners.append(reached)


class Enough(Exception):
    """So many refills were done."""


def judge(samples: list[dict[str, int]], refills: int) -> dict[str, Any]:
    """Compare the second tenth of the refills with the last."""

    def median(low: float, high: float, key: str) -> float:
        part = [s[key] for s in samples if low * refills <= s["refills"] < high * refills]
        return statistics.median(part) if part else float("nan")

    row: dict[str, Any] = {}
    for key in ("threads", "descriptors", "rss_kib"):
        row[key], row[f"{key} at the end"] = median(0.1, 0.2, key), median(0.9, 1.01, key)
    growth = row["rss_kib at the end"] - row["rss_kib"]
    row["KiB a refill"] = growth / (0.8 * refills)
    row["flat"] = (
        row["threads at the end"] <= row["threads"]
        and row["descriptors at the end"] <= row["descriptors"]
        and growth < 0.02 * row["rss_kib"]
        and row["KiB a refill"] < 2
    )
    return row


def course(samples: list[dict[str, int]], refills: int) -> list[dict[str, float]]:
    """Medians over every twentieth of the refills."""
    parts = [[s for s in samples if k * refills <= 20 * s["refills"] < (k + 1) * refills] for k in range(20)]
    return [{key: statistics.median(s[key] for s in part) for key in part[0]} for part in parts if part]


def main() -> None:
    def add(parser: Any) -> None:
        parser.add_argument("--refills", type=int, default=1000)

    args = common.arguments(__doc__, add)
    with common.scratch() as directory:
        refills = directory / "refills"
        refills.touch()
        lab = ProcessLab(train, directory, LabSlots(num_slots=3), files=WorkerFiles(ledger=False))
        lost: list[dict[str, Any]] = []
        meter = Meter(directory / "usage_hub.jsonl", refills)

        def on_poll() -> None:
            meter.sample()
            if refills.stat().st_size >= args.refills:
                lost.extend(e for e in lab.hub.events(0) if e["kind"] in ("lost", "evicted") and e["slot"] != VICTIM)
                raise Enough

        started = time.monotonic()
        with contextlib.suppress(Enough):
            lab.run(timeout_s=24 * 3600, on_poll=on_poll)
        duration = time.monotonic() - started
        samples = {
            path.stem.removeprefix("usage_"): [json.loads(line) for line in path.read_text().splitlines()]
            for path in sorted(directory.glob("usage_*.jsonl"))
        }
    for event in lost:
        print(f"a survivor was lost, so nothing can be said of it: {event}")
    rows = [{"process": name, **judge(part, args.refills)} for name, part in samples.items()]
    common.show(f"{args.refills} kills and refills of one member in {duration:.0f} s", rows)
    common.keep(
        args.json,
        {
            "benchmark": "churn",
            "refills": args.refills,
            "seconds": duration,
            "processes": rows,
            "survivors_lost": lost,
            "course": {name: course(s, args.refills) for name, s in samples.items()},
        },
    )


if __name__ == "__main__":
    main()
