"""Many random faults, and an account of what they cost.

``python -m raytrain_het.testing.campaign --faults 200 --seed 0``. The seed fixes the script of faults. A fault does not
happen if its worker is not there at its step; rounds go on until as many faults as asked for have happened. In every
round each sample must be used exactly once, replicas must be identical to the bit, and the parameters must be those of
torch alone without faults.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import random
import signal
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raytrain_het.config import HetConfig
from raytrain_het.membership.points import POINTS
from raytrain_het.testing.faults import Fault, Happened, Kind, happened
from raytrain_het.testing.ledger import LedgerError, check_exactly_once, read_ledgers
from raytrain_het.testing.outside import Outside
from raytrain_het.testing.processes import LabSlots, ProcessLab
from raytrain_het.testing.regression import SMALL_BUCKETS, Regression, differing_replicas, relative_error, traces

FAULTS_PER_ROUND = 12
USUAL: Mapping[Kind, int] = {"kill": 12, "leave": 4, "stop": 1}
"""How often each kind of fault happens, relative to the others."""
EVERY: Mapping[Kind, int] = {
    **USUAL,
    "hold": 3,
    "cut": 3,
    "drain": 3,
    "unplug": 2,
    "mute": 1,
    "restart_hub": 1,
}
"""The same with faults of the network, the hub and the interpreter: those after which nobody is dead. Needs root."""
STEPS_BETWEEN = 9
"""Steps between faults, on average. A refill takes about as long: some faults meet a worker that is healing, most do
not."""


@dataclass
class Account:
    """The results of a campaign."""

    faults: int = 0
    """Faults that happened."""
    by_kind: dict[str, int] = field(default_factory=dict)
    by_point: dict[str, int] = field(default_factory=dict)
    rounds: int = 0
    steps: int = 0
    """Steps that counted, over all rounds."""
    samples: int = 0
    redone_steps: int = 0
    ledger_violations: list[str] = field(default_factory=list)
    """Steps lost, samples lost or used twice. A correct run has none."""
    differing_replicas: int = 0
    """Steps after which replicas were not identical to the bit."""
    worst_relative_error: float = 0.0
    """Largest difference of a parameter from the run without faults, relative to the largest parameter."""
    lost_checkpoints: int = 0
    """Checkpoints that are lost since all workers that held them died. The run goes on; the checkpoint before stays."""
    recovery_s: dict[str, float] = field(default_factory=dict)
    """Seconds from a kill until a step of the next generation is committed: median and largest."""
    eviction_s: dict[str, float] = field(default_factory=dict)
    """The same for stopped workers."""
    apart_s: dict[str, float] = field(default_factory=dict)
    """The same for workers whose machines were taken off the network."""
    slow: list[str] = field(default_factory=list)
    """Kills whose recovery took more than a second, with what the hub saw meanwhile."""
    failures: list[str] = field(default_factory=list)
    """Rounds that did not finish."""

    @property
    def clean(self) -> bool:
        """Whether nothing was lost."""
        return (
            not (self.ledger_violations or self.differing_replicas or self.failures)
            and self.worst_relative_error < 1e-9
        )


def script(
    rng: random.Random, num_faults: int, num_slots: int, task: Regression, kinds: Mapping[Kind, int] = USUAL
) -> list[Fault]:
    """Faults at random points, of random workers, with random gaps of steps."""
    faults, step = [], 2
    for _ in range(num_faults):
        step += rng.randint(1, 2 * STEPS_BETWEEN)
        if step > task.num_steps:
            break
        kind = rng.choices(list(kinds), weights=list(kinds.values()))[0]
        point, at = rng.choice(POINTS), step
        if point == "report":
            per_epoch = task.plan.steps_per_epoch
            at = min(-(-step // per_epoch) * per_epoch, task.num_steps)
        slot = rng.randrange(num_slots)
        seconds = rng.uniform(0.3, 2.0) if kind in ("hold", "unplug", "mute") else 0.0
        faults.append(Fault(slot=slot, step=at, point=point, kind=kind, seconds=seconds))
    return faults


def campaign(
    num_faults: int,
    seed: int,
    *,
    num_slots: int = 3,
    config: HetConfig | None = None,
    directory: str | None = None,
    kinds: Mapping[Kind, int] = USUAL,
) -> Account:
    """Run rounds of a small training until ``num_faults`` faults have happened.

    Args:
        num_faults: How many faults.
        seed: Of the script.
        num_slots: Workers in a round.
        config: The run's settings; by default unequal shares and small buckets.
        directory: Where the rounds leave their files; by default a temporary folder.
        kinds: How often each kind of fault happens.
    """
    rng, account = random.Random(seed), Account()
    shares = tuple(float(num_slots - slot) for slot in range(num_slots))
    config = config or dataclasses.replace(SMALL_BUCKETS, shares=shares, silence_s=0.5)
    task = Regression(patience_s=0.01, epochs=FAULTS_PER_ROUND + 2)
    expected = task.plain()
    with tempfile.TemporaryDirectory() as temporary:
        while account.faults < num_faults and account.rounds < 4 + num_faults:
            faults = script(rng, min(FAULTS_PER_ROUND, num_faults - account.faults), num_slots, task, kinds)
            _round(
                task, expected, faults, num_slots, config, Path(directory or temporary) / str(account.rounds), account
            )
    for values in (account.recovery_s, account.eviction_s, account.apart_s):
        gaps = sorted(values.values())
        values.clear()
        if gaps:
            values.update(median=statistics.median(gaps), largest=gaps[-1])
    return account


def _round(
    task: Regression,
    expected: Any,
    faults: list[Fault],
    num_slots: int,
    config: HetConfig,
    directory: Path,
    account: Account,
) -> None:
    cables = any(fault.kind in ("unplug", "mute") for fault in faults)
    slots = LabSlots(num_slots=num_slots, rates_mbit=[None] * num_slots if cables else None)
    lab = ProcessLab(task, directory, slots, faults=faults, config=config)
    outside, waker = Outside(lab), Waker(lab, LONGEST_STOP_S)

    def on_poll() -> None:
        outside()
        waker()

    try:
        results = lab.run(60.0, on_poll=on_poll)
    except AssertionError as error:
        account.failures.append(f"round {account.rounds}, {faults}: {error}")
        results = {}
    account.rounds += 1
    faults_now = happened(directory)
    account.faults += len(faults_now)
    for fault in faults_now:
        account.by_kind[fault.kind] = account.by_kind.get(fault.kind, 0) + 1
        account.by_point[fault.point] = account.by_point.get(fault.point, 0) + 1
    try:
        report = check_exactly_once(read_ledgers(directory), task.plan, epochs=task.epochs)
        account.steps += report.num_steps
        account.samples += report.num_samples
        account.redone_steps += report.num_redone_steps
    except LedgerError as error:
        account.ledger_violations.append(f"round {account.rounds - 1}: {error}")
    account.differing_replicas += len(differing_replicas(directory))
    for result in results.values():
        account.worst_relative_error = max(account.worst_relative_error, relative_error(result["parameters"], expected))
    account.lost_checkpoints += sum(r["checkpoint"] is None for r in lab.reports)
    commits = sorted((at, generation) for _, generation, _, _, at in traces(directory))
    for fault in faults_now:
        before = max((generation for at, generation in commits if at <= fault.time), default=0)
        after = next((at for at, generation in commits if generation > before), None)
        into = {"kill": account.recovery_s, "stop": account.eviction_s, "unplug": account.apart_s}.get(fault.kind)
        if fault.kind == "unplug" and not _was_suspended(lab.events, fault):
            into = None  # It was back before anybody missed it.
        if after is not None and into is not None:
            into[f"{account.rounds}/{fault.time}"] = after - fault.time
            if fault.kind == "kill" and after - fault.time > 1.0:
                meanwhile = [
                    (round(e["time"] - fault.time, 3), e["kind"], e.get("slot"), e.get("reason"))
                    for e in lab.events
                    if -0.3 < e["time"] - fault.time < after - fault.time
                ]
                account.slow.append(f"round {account.rounds - 1}: {fault}: {meanwhile}")


def _was_suspended(events: list[dict[str, Any]], fault: Happened) -> bool:
    until = fault.time + fault.seconds
    return any(
        e["kind"] == "suspended" and e["slot"] == fault.slot and fault.time < e["time"] < until + 0.5 for e in events
    )


SILENT = ("suspended", "evicted")
LONGEST_STOP_S = 2.0
"""A stopped worker is woken after so long in any case."""


class Waker:
    """Wakes stopped workers once they were suspended. They find out by themselves what they have missed."""

    def __init__(self, lab: ProcessLab, longest_stop_s: float = math.inf) -> None:
        self._lab, self._longest_stop_s = lab, longest_stop_s
        self._seen = 0

    def __call__(self) -> None:
        """To be called at every poll."""
        for event in self._lab.hub.events(self._seen):
            self._seen = event["seq"] + 1
            if event["kind"] in SILENT:
                self._wake(event["slot"])
        for fault in happened(self._lab.directory):  # The only holder of the state is waited for, and not suspended.
            if fault.kind == "stop" and time.time() - fault.time > self._longest_stop_s:
                self._wake(fault.slot)

    def _wake(self, slot: int) -> None:
        process = self._lab.processes.get(slot)
        if process is not None and process.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGCONT)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    parser.add_argument("--every-kind", action="store_true", help="also faults after which nobody is dead; as root")
    args = parser.parse_args()
    account = campaign(args.faults, args.seed, num_slots=args.workers, kinds=EVERY if args.every_kind else USUAL)
    values = {**dataclasses.asdict(account), "clean": account.clean}
    if args.json:
        print(json.dumps(values))
    else:
        for name, value in values.items():
            print(f"{name:>22}  {value}")
    raise SystemExit(0 if account.clean else 1)


if __name__ == "__main__":
    main()
