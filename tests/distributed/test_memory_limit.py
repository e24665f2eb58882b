"""A device with little memory: its share comes in as many passes as it needs, and the result stays exact."""

import dataclasses

from labs import run

from raytrain_het.testing.regression import SMALL_BUCKETS, Regression
from raytrain_het.worker.session import current
from raytrain_het.worker.step.memory import MemoryLimit

TASK = Regression(num_samples=240, global_batch_size=48, epochs=4, report=False)


class Meter:
    """A device that holds ten samples at once (and nine tenths of that is what may be used)."""

    def reset(self):
        return 0

    def peak_bytes(self):
        opened = current().worker.engine.opened
        return max(map(len, opened.micro[: len(opened.weights)]))

    def total_bytes(self):
        return 10


class Small:
    """The task; worker 1 has little memory. Returns its parameters with the sizes of all passes."""

    def __call__(self, directory):
        session, sizes = current(), {}
        begin = session.begin

        def begin_small(num_epochs):
            worker = begin(num_epochs)
            if session.slot == 1:
                worker.engine.passes.memory = MemoryLimit(Meter())
            return worker

        def note(point, step):
            if point == "backward":
                sizes[step] = [len(part) for part in session.worker.engine.opened.micro]

        session.begin = begin_small
        session.points.listeners.append(note)
        return TASK(directory) | {"sizes": sizes}


def test_a_share_is_cut_into_passes_that_fit_and_sums_stay_exact(tmp_path):
    config = dataclasses.replace(SMALL_BUCKETS, shares=(1.0, 3.0))
    done = run(Small(), tmp_path, num_slots=2, config=config)
    done.check(TASK)
    sizes = done.results[1]["sizes"]
    assert sizes[1] == [2, 7, 9, 9, 9]
    assert [max(s) for s in list(sizes.values())[1:]] == [9] * (TASK.num_steps - 1)
    assert all(sum(s) == 36 for s in sizes.values())
    assert {len(s) for s in done.results[0]["sizes"].values()} == {1}
