"""Workers on two machines that add up their gradients there first: the same result, whatever happens to leaders."""

import dataclasses

import pytest
from labs import run

from raytrain_het.allreduce import layout
from raytrain_het.testing.faults import Fault, happened
from raytrain_het.testing.regression import SMALL_BUCKETS, Regression

TWO_AND_TWO = [0, 0, 1, 1]
CONFIG = dataclasses.replace(SMALL_BUCKETS, hierarchy=True, shares=(1, 2, 2, 1))


class Compressed(Regression):
    """Parameters as small as its are compressed too."""

    def __call__(self, directory):
        layout.SMALL = 1
        return super().__call__(directory)


@pytest.mark.parametrize("slot", [0, 3])
@pytest.mark.parametrize("point", ["backward", "between_buckets", "decoded", "updated"])
def test_a_leader_or_another_worker_that_is_killed_costs_no_step(tmp_path, slot, point):
    task = Regression(patience_s=0.05)
    done = run(
        task,
        tmp_path,
        num_slots=4,
        config=CONFIG,
        machines=TWO_AND_TWO,
        faults=[Fault(slot=slot, step=13, point=point)],
    )
    done.check(task)
    assert len(happened(tmp_path)) == 1


@pytest.mark.parametrize(
    "codec", ["int8", "topk(density=0.5)", "topk(density=0.5, all_gather=true)", "lowrank(rank=2)"]
)
def test_replicas_stay_identical_with_codecs_where_a_leader_leaves(tmp_path, codec):
    config = dataclasses.replace(CONFIG, compression=codec)
    task = Compressed(patience_s=0.05)
    faults = [Fault(slot=0, step=13, point="slice", kind="leave")]
    done = run(task, tmp_path, num_slots=4, config=config, machines=TWO_AND_TWO, faults=faults)
    done.check(task, error=0.3 if codec.startswith("lowrank") else 5e-2)


def test_a_machine_whose_workers_are_all_killed_comes_back(tmp_path):
    task = Regression(patience_s=0.05)
    faults = [Fault(slot=slot, step=13, point="backward") for slot in (2, 3)]
    run(task, tmp_path, num_slots=4, config=CONFIG, machines=TWO_AND_TWO, faults=faults).check(task)
