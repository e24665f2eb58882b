"""Kills and refills leave nothing behind in those who stay. A thousand of them: `experiments.benchmarks.churn`."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from labs import run

import raytrain_het as het
from raytrain_het.testing.faults import Fault
from raytrain_het.testing.regression import Regression
from raytrain_het.worker import session as sessions
from raytrain_het.worker.step.step_record import StepRecord

KILLS = range(5, 113, 14)
POINTS = ("slice", "backward", "between_buckets", "decoded", "updated")


@dataclass(frozen=True, kw_only=True)
class Watched(Regression):
    """Also returns, by step, the threads and open descriptors of this process while all take part."""

    def __call__(self, directory: str) -> dict[str, Any]:
        usage: dict[int, tuple[int, int]] = {}
        session = sessions.current()

        def look(note: StepRecord) -> None:
            if het.num_participants() == session.num_slots:
                usage[note.step] = len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))

        session.listeners.append(look)
        return super().__call__(directory) | {"usage": usage}


def test_threads_and_descriptors_of_the_others_are_as_before_after_many_kills_and_refills(tmp_path: Path) -> None:
    task = Watched(epochs=12, patience_s=0.25, pace_s=0.02, report=False)
    faults = [Fault(slot=2, step=step, point=POINTS[k % len(POINTS)]) for k, step in enumerate(KILLS)]
    done = run(task, tmp_path, faults=faults)
    done.check(task)
    assert len(done.kinds("lost")) == len(KILLS)
    for slot in (0, 1):
        usage = done.results[slot]["usage"]
        early = [seen for step, seen in usage.items() if KILLS[0] < step <= KILLS[2]]
        late = [seen for step, seen in usage.items() if step > KILLS[-1]]
        assert early
        assert late
        # The lowest of each: what is on its way out at a kill may still be there a step later.
        assert min(threads for threads, _ in late) <= min(threads for threads, _ in early)
        assert min(descriptors for _, descriptors in late) <= min(descriptors for _, descriptors in early)
