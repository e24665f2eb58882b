"""Failures that are no deaths: is a worker lost that lives, or a step done again from a checkpoint?

Cut connections, machines that cannot reach each other (network namespaces; as root), an interpreter that is held, a
large collection of garbage, a slow storage, a busy machine. Each row is one run or several, with real processes. Of
each it says how many workers were lost or dropped, how often one was suspended and for how long at most, how often all
began again from a checkpoint, and how many steps were done again.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import gc
import json
import multiprocessing
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from raytrain_het.config import HetConfig
from raytrain_het.testing.cuts import cut
from raytrain_het.testing.lab_worker import WorkerFiles
from raytrain_het.testing.ledger import check_exactly_once, read_ledgers
from raytrain_het.testing.networks import Network
from raytrain_het.testing.processes import LabSlots, ProcessLab
from raytrain_het.testing.regression import SMALL_BUCKETS, Regression, differing_replicas, relative_error, traces
from raytrain_het.worker.session import current
from raytrain_het.worker.state.checkpoint import LocalStorage

TASK = Regression(pace_s=0.01, epochs=12, report=False)
OnPoll = Callable[[ProcessLab], None]
OnNetwork = Callable[[Network], None]


def last_step(lab: ProcessLab) -> int:
    """The last step that a worker has done."""
    return max((step for step, *_ in traces(lab.directory)), default=0)


class Cuts:
    """Resets connections between hub and members at random steps.

    Args:
        times: how often.
        slots: of which members; None is all.
        seed: of the steps.
    """

    def __init__(self, times: int, slots: list[int] | None, seed: int) -> None:
        self.left, self.slots, self.chance, self.next_step = times, slots, random.Random(seed), 4

    def __call__(self, lab: ProcessLab) -> None:
        if self.left and last_step(lab) >= self.next_step:
            self.next_step += self.chance.randint(1, 4)
            self.left -= 1
            cut(lab.hub, self.slots)


class Partition:
    """Cuts machines off at step 10, for a while.

    Args:
        begins: takes the links between machines.
        ends: too.
        seconds: how long.
    """

    def __init__(self, begins: OnNetwork, ends: OnNetwork, seconds: float) -> None:
        self.begins, self.ends, self.seconds = begins, ends, seconds
        self.began = self.ended = 0.0

    def __call__(self, lab: ProcessLab) -> None:
        assert lab.network is not None, "the lab has cables"
        if not self.began and last_step(lab) >= 10:
            self.begins(lab.network)
            self.began = time.monotonic()
        elif self.began and not self.ended and time.monotonic() - self.began > self.seconds:
            self.ends(lab.network)
            self.ended = time.monotonic()


@dataclasses.dataclass(frozen=True)
class HoldsUp:
    """A task in which one worker's interpreter is held up before step 20."""

    task: Regression
    how: str
    """``call`` into C for 5 s, or ``garbage``: a collection over six million objects."""

    def __call__(self, directory: str) -> Any:
        session = current()
        objects: list[Any] = []

        def at(point: str, step: int) -> None:
            if point != "slice" or step != 20 or session.slot != 1:
                return
            if self.how == "call":
                ctypes.PyDLL(None).usleep(5_000_000)
            else:
                gc.disable()
                objects.extend({"a": k, "b": [k]} for k in range(3_000_000))
                gc.enable()
                gc.collect()

        session.points.listeners.append(at)
        return self.task(directory)


class SlowStorage(LocalStorage):
    """Takes long for each checkpoint."""

    def persist(self, local_dir: str, name: str, staged: str | None = None) -> str:
        """Store it, later."""
        time.sleep(8.0)
        return super().persist(local_dir, name, staged)


def slow_storage() -> SlowStorage:
    """A new one."""
    return SlowStorage(tempfile.mkdtemp(prefix="slow_storage_"))


def spin() -> None:
    """Keep a core busy."""
    while True:
        pass


def run(
    task: Any,
    plan_of: Regression,
    *,
    num_slots: int = 3,
    on_poll: OnPoll | None = None,
    config: HetConfig = SMALL_BUCKETS,
    storage: Any = None,
    cables: bool = False,
    timeout_s: float = 200.0,
) -> dict[str, float]:
    """One run, and what it has cost."""
    with tempfile.TemporaryDirectory() as directory:
        slots = LabSlots(num_slots=num_slots, rates_mbit=[None] * num_slots if cables else None)
        lab = ProcessLab(task, directory, slots, config=config, files=WorkerFiles(storage=storage))
        results = lab.run(timeout_s, on_poll=(lambda: on_poll(lab)) if on_poll else None)
        report = check_exactly_once(read_ledgers(directory), plan_of.plan, epochs=plan_of.epochs)
        differing = len(differing_replicas(directory))
        error = max(relative_error(r["parameters"], plan_of.plain()) for r in results.values() if r is not None)
        kinds = [e["kind"] for e in lab.events]
        resets = sum(e["kind"] == "formed" and e["reset"] for e in lab.events) - 1
        return {
            "lost": kinds.count("lost") + kinds.count("evicted"),
            "suspended": kinds.count("suspended"),
            "longest_s": max((e["away_s"] for e in lab.events if e["kind"] == "came_back"), default=0.0),
            "resets": resets,
            "redone": report.num_redone_steps,
            "checkpoints_lost": sum(r["checkpoint"] is None for r in lab.reports),
            "differing": differing,
            "error": error,
        }


def together(results: list[dict[str, float]]) -> dict[str, float]:
    """Of several runs: the sum, of times and errors the largest."""
    largest = ("longest_s", "error")
    return {k: (max if k in largest else sum)(r[k] for r in results) for k in results[0]}


def partition(begins: OnNetwork, ends: OnNetwork, seconds: float, *, pause_s: float, epochs: int) -> dict[str, float]:
    """A run in which machines are cut off for a while; its steps pause while a worker is away."""
    task = dataclasses.replace(TASK, patience_s=pause_s, pace_s=0.02, epochs=epochs)
    config = dataclasses.replace(SMALL_BUCKETS, hang_limit_s=120.0)
    return run(task, task, on_poll=Partition(begins, ends, seconds), cables=True, config=config)


def busy(num_runs: int) -> dict[str, float]:
    """Small runs of two workers beside a busy loop on each core."""
    context = multiprocessing.get_context("fork")
    loops = [context.Process(target=spin, daemon=True) for _ in range(multiprocessing.cpu_count())]
    for loop in loops:
        loop.start()
    task = dataclasses.replace(TASK, epochs=4, pace_s=0.0, report=True)
    try:
        return together([run(task, task, num_slots=2) for _ in range(num_runs)])
    finally:
        for loop in loops:
            loop.kill()


def train_small() -> None:
    """A small run's training function, for Ray."""
    with tempfile.TemporaryDirectory() as directory:
        dataclasses.replace(TASK, epochs=4, pace_s=0.0, report=False)(directory)


def busy_under_ray(num_runs: int) -> dict[str, float]:
    """The same under Ray, on this machine."""
    import ray

    from raytrain_het.ray_train.scaling import HetScalingConfig, WorkerSpec
    from raytrain_het.ray_train.trainer import HetTrainer

    ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR")
    context = multiprocessing.get_context("spawn")
    loops = [context.Process(target=spin, daemon=True) for _ in range(multiprocessing.cpu_count())]
    for loop in loops:
        loop.start()
    results = []
    try:
        for k in range(num_runs):
            with tempfile.TemporaryDirectory() as directory:
                trainer = HetTrainer(
                    train_small,
                    scaling_config=HetScalingConfig((WorkerSpec(count=2),)),
                    run_config=ray.train.RunConfig(name=f"small_{k}", storage_path=directory),
                )
                trainer.fit()
                (lines,) = Path(directory).glob("*/events.jsonl")
                events = [json.loads(line) for line in lines.read_text().splitlines()]
            kinds = [e["kind"] for e in events]
            away = max((e["away_s"] for e in events if e["kind"] == "came_back"), default=0.0)
            resets = sum(e["kind"] == "formed" and e.get("reset", False) for e in events) - 1
            lost = kinds.count("lost") + kinds.count("evicted")
            zero = dict.fromkeys(("redone", "checkpoints_lost", "differing"), 0)
            row = {"lost": lost, "suspended": kinds.count("suspended"), "longest_s": away, "resets": resets}
            results.append({**row, **zero, "error": 0.0})
    finally:
        for loop in loops:
            loop.kill()
        ray.shutdown()
    return together(results)


def rows(num_runs: int, num_ray_runs: int) -> dict[str, Callable[[], dict[str, float]]]:
    """What is tried."""
    long = dataclasses.replace(TASK, epochs=16)
    reporting = dataclasses.replace(TASK, epochs=6, report=True)
    slow = dataclasses.replace(SMALL_BUCKETS, hang_limit_s=0.8)
    return {
        "all connections to the hub cut 50 times": lambda: run(long, long, on_poll=Cuts(50, None, 1)),
        "each worker's connection cut 50 times": lambda: together(
            [run(long, long, on_poll=Cuts(50, [slot], slot)) for slot in range(3)]
        ),
        "hub not reached for 30 s": lambda: partition(
            lambda network: network.hide_host(),
            lambda network: network.show_host(),
            30.0,
            pause_s=0.02,
            epochs=200,
        ),
        "one worker not reached for 5 s": lambda: partition(
            lambda network: network.unplug(2), lambda network: network.plug_in(2), 5.0, pause_s=0.2, epochs=12
        ),
        "one worker not reached for 60 s": lambda: partition(
            lambda network: network.unplug(2), lambda network: network.plug_in(2), 60.0, pause_s=0.5, epochs=20
        ),
        "one worker hears and is not heard for 5 s": lambda: partition(
            lambda network: network.mute(1), lambda network: network.unmute(1), 5.0, pause_s=0.2, epochs=12
        ),
        "a call holds the interpreter for 5 s": lambda: run(HoldsUp(TASK, "call"), TASK),
        "a collection of six million objects": lambda: run(HoldsUp(TASK, "garbage"), TASK),
        "a storage that takes ten times the hang limit": lambda: run(
            reporting, reporting, config=slow, storage=slow_storage
        ),
        f"{num_runs} small runs of two workers, a busy loop on each core": lambda: busy(num_runs),
        f"{num_ray_runs} of them under Ray": lambda: busy_under_ray(num_ray_runs),
    }


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=80, help="small runs beside busy loops")
    parser.add_argument("--ray-runs", type=int, default=20, help="the same under Ray")
    parser.add_argument("--only", default="", help="rows whose name has this in it")
    parser.add_argument("--json", type=Path, help="write the results here")
    args = parser.parse_args()
    results: dict[str, Any] = {}
    print(f"{'':<62} lost suspended longest resets redone error")
    for name, measure in rows(args.runs, args.ray_runs).items():
        if args.only not in name:
            continue
        results[name] = r = measure()
        print(
            f"{name:<62} {r['lost']:>4} {r['suspended']:>9} {r['longest_s']:>6.1f}s {r['resets']:>6} {r['redone']:>6} "
            f"{r['error']:.1e}" + (f", {r['checkpoints_lost']} checkpoints lost" if r["checkpoints_lost"] else ""),
            flush=True,
        )
    if args.json is not None:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
