"""What is made for equal workers, or for one process, is refused where it is written, and a script that was not ported
fails when it returns. One worker, in process."""

import sys

import pytest
import torch
import torch.distributed as dist
from labs import alone
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import raytrain_het as het
from raytrain_het.errors import LoopOrderError
from raytrain_het.worker import session as sessions
from raytrain_het.worker.checks.unsupported import TABLE

DATA = TensorDataset(torch.randn(8, 3))


def prepare():
    model = het.prepare_model(torch.nn.Linear(3, 1))
    optimizer = het.prepare_optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    return model, optimizer, het.prepare_data_loader(DataLoader(DATA), global_batch_size=2)


def train(model, optimizer, loader):
    for _ in loader.epochs(1):
        for (x,) in loader:
            optimizer.zero_grad()
            model(x).mean().backward()
            optimizer.step()


def sharded():
    from torch.distributed.fsdp import fully_shard

    fully_shard(torch.nn.Linear(3, 1))


def in_a_group(call):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        call()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("row", "use"),
    [
        ("DistributedDataParallel", lambda: DistributedDataParallel(torch.nn.Linear(3, 1))),
        ("DistributedSampler", lambda: DistributedSampler(DATA, num_replicas=2, rank=0)),
        ("SyncBatchNorm", lambda: torch.nn.SyncBatchNorm.convert_sync_batchnorm(torch.nn.BatchNorm1d(3))),
        ("DeviceMesh", sharded),
        ("torch collective", lambda: dist.all_reduce(torch.ones(1))),
        ("torch collective", dist.barrier),
        ("torch collective", lambda: dist.broadcast_object_list([1])),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_torchs_tools_for_equal_workers_are_refused_where_they_are_used_and_nowhere_else(tmp_path, row, use):
    def train_fn():
        prepare()
        in_a_group(use)

    with pytest.raises(LoopOrderError) as caught:
        alone(train_fn, tmp_path, num_slots=2)
    assert TABLE[row].what in str(caught.value)
    assert TABLE[row].way_out in str(caught.value)
    assert DistributedSampler(DATA, num_replicas=2, rank=0).num_samples == 4, "outside of a run it works again"


def test_what_a_group_of_one_is_right_for_is_left_alone(tmp_path):
    def train_fn():
        value = torch.ones(1)
        in_a_group(lambda: dist.all_reduce(value))
        train(*prepare())
        return float(value)

    assert alone(train_fn, tmp_path) == 1.0


def own_loop():
    model = torch.nn.Linear(3, 1)
    model(torch.randn(2, 3)).sum().backward()


def epochs_never_iterated():
    *_, loader = prepare()
    loader.epochs(3)


def loop_without_the_loader():
    *_, loader = prepare()
    for _ in loader.epochs(1):
        return


@pytest.mark.parametrize(
    ("train_fn", "said"),
    [
        (own_loop, "returned without prepare_model() and prepare_optimizer() and prepare_data_loader() and a turn of"),
        (lambda: prepare() and None, "returned without a turn of `for epoch in loader.epochs(n)`"),
        (epochs_never_iterated, "returned without a turn of `for epoch in loader.epochs(n)`"),
        (loop_without_the_loader, "returned in epoch 0 without a turn of `for batch in loader`"),
    ],
)
def test_a_function_that_trains_nothing_together_is_an_error_that_says_what_it_never_called(tmp_path, train_fn, said):
    with pytest.raises(LoopOrderError) as caught:
        alone(train_fn, tmp_path)
    assert said in str(caught.value)
    assert "Write for epoch in loader.epochs(n)" in str(caught.value)


def test_who_comes_when_the_run_is_over_or_only_evaluates_is_no_such_function(tmp_path):
    def evaluates():
        *_, loader = prepare()
        for _ in loader.epochs(1):
            return het.evaluate(lambda batch: {"n": len(batch[0])}, DATA)["n"]

    assert alone(evaluates, tmp_path) == 1.0

    def ends_its_process():
        train(*prepare())
        assert sessions.current().worker.engine.cursor.step == 4
        sys.exit(0)

    assert alone(ends_its_process, tmp_path) is None
    with pytest.raises(SystemExit):
        alone(lambda: sys.exit(3), tmp_path)
