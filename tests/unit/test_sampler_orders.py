"""The order of an epoch from the user's sampler: a pure function of the run's seed and the epoch."""

import itertools
import pickle
import random
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from raytrain_het.errors import ConfigError, LoopOrderError
from raytrain_het.membership.cursor import Cursor
from raytrain_het.testing.ledger import LedgerEntry, LedgerError, check_exactly_once
from raytrain_het.worker.data.data_loader import plan_of
from raytrain_het.worker.data.data_plan import DataPlan, slice_of
from raytrain_het.worker.data.sampler_orders import check_epoch

DATA = list(range(40))


class Backwards(SequentialSampler):
    def __iter__(self):
        return iter(range(len(self.data_source) - 1, -1, -1))


class ByEpoch(Sampler):
    """Another number of samples in each epoch, by generators of all three kinds."""

    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        order = torch.randperm(40).tolist()[: 10 + self.epoch]
        return iter([*order, random.randrange(40), int(np.random.randint(40))])


class Buckets:
    """Batches of unlike sizes, as a class of the user's that is no torch Sampler."""

    def __init__(self, sampler):
        self.sampler = sampler

    def __iter__(self):
        order = list(self.sampler)
        for size in (3, 8, 5, 8, 8, 4):
            yield order[:size]
            del order[:size]


class Drawing(Sampler):
    """Draws from a generator of its own, or of the caller's."""

    def __init__(self, draw):
        self.draw = draw

    def __iter__(self):
        return iter(sorted(range(40), key=lambda _: self.draw()))


def loader_of(kind):
    generator = torch.Generator().manual_seed(3)
    kinds = {
        "backwards": lambda: {"sampler": Backwards(DATA)},
        "short": lambda: {"sampler": RandomSampler(DATA, num_samples=16)},
        "replacement": lambda: {"sampler": RandomSampler(DATA, replacement=True, num_samples=100)},
        "generator": lambda: {"shuffle": True, "generator": generator},
        "weighted": lambda: {"sampler": WeightedRandomSampler([1.0, 5.0] * 20, 30)},
        "weighted with a generator": lambda: {"sampler": WeightedRandomSampler([1.0] * 40, 30, generator=generator)},
        "subset": lambda: {"sampler": SubsetRandomSampler([3, 9, 1, 30])},
        "list": lambda: {"sampler": [5, 1, 1, 39]},
        "by epoch": lambda: {"sampler": ByEpoch()},
        "numpy": lambda: {"sampler": np.arange(20)[::-1]},
        "tensor": lambda: {"sampler": torch.arange(20)},
        "torch": lambda: {"sampler": Drawing(lambda: float(torch.rand(1)))},
        "drop last": lambda: {"sampler": RandomSampler(DATA, num_samples=19), "drop_last": True},
        "batches": lambda: {"batch_sampler": BatchSampler(RandomSampler(DATA), 8, False)},
        "unlike batches": lambda: {"batch_sampler": Buckets(RandomSampler(DATA, generator=generator))},
        "list of batches": lambda: {"batch_sampler": [[1, 2], np.array([3, 4, 5]), (6,)]},
    }
    settings = kinds[kind]()
    return DataLoader(DATA, **settings) if "batch_sampler" in settings else DataLoader(DATA, batch_size=8, **settings)


KINDS = [
    "backwards",
    "short",
    "replacement",
    "generator",
    "weighted",
    "weighted with a generator",
    "subset",
    "list",
    "by epoch",
    "numpy",
    "tensor",
    "torch",
    "drop last",
    "batches",
    "unlike batches",
    "list of batches",
]
RANDOM = {
    "short",
    "replacement",
    "generator",
    "weighted",
    "weighted with a generator",
    "subset",
    "by epoch",
    "torch",
    "drop last",
    "batches",
    "unlike batches",
}


def batches(plan, epoch):
    cursor, found = Cursor(epoch=epoch), []
    while window := plan.batch_at(cursor):
        found.append(plan.permutation(epoch)[window.start : window.stop].tolist())
        cursor = plan.advance(cursor)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_who_comes_at_epoch_5_has_the_order_of_those_who_were_there_from_the_beginning(kind):
    there, late = plan_of(loader_of(kind), seed=1), plan_of(loader_of(kind), seed=1)
    assert there == late
    orders = {epoch: batches(there, epoch) for epoch in range(7)}
    torch.manual_seed(77), np.random.seed(77), random.seed(77)  # The worker's own draws do not matter.
    assert [batches(late, epoch) for epoch in (5, 6, 2)] == [orders[epoch] for epoch in (5, 6, 2)]
    assert late.order_digest(5) == there.order_digest(5)
    assert 0 <= late.order_digest(5) < 2**63


@pytest.mark.parametrize("kind", sorted(RANDOM))
def test_epochs_and_seeds_have_orders_of_their_own(kind):
    plan = plan_of(loader_of(kind), seed=1)
    assert batches(plan, 0) != batches(plan, 1)
    assert plan.order_digest(0) != plan.order_digest(1)
    if "generator" not in kind and kind != "unlike batches":
        assert plan_of(loader_of(kind), seed=2) != plan


@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_is_what_torchs_loader_makes_of_the_sampler(kind):
    """The same samples if the order is not random, else the same numbers of them, and of repeated ones."""
    ours, theirs = batches(plan_of(loader_of(kind), seed=1), 0), [batch.tolist() for batch in loader_of(kind)]
    assert [len(batch) for batch in ours] == [len(batch) for batch in theirs]
    if kind not in RANDOM:
        assert ours == theirs


def test_making_an_order_leaves_all_generators_as_they_were():
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state()
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    expected = torch.rand(1), np.random.rand(), random.random()
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    plan = plan_of(DataLoader(DATA, shuffle=True, generator=generator), seed=0)
    plan_of(DataLoader(DATA, sampler=ByEpoch()), seed=0).permutation(4)
    assert (torch.rand(1), np.random.rand(), random.random()) == expected
    assert torch.equal(generator.get_state(), before)
    assert plan.permutation(0).tolist() == plan.permutation(0).tolist()


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_plain_loader_has_the_order_of_the_run(shuffle):
    plan = plan_of(DataLoader(DATA, batch_size=8, shuffle=shuffle), seed=4)
    assert plan == DataPlan(dataset_size=40, global_batch_size=8, shuffle=shuffle, drop_last=False, seed=4)
    assert not plan.has_sampler
    same = plan_of(
        DataLoader(DATA, batch_size=8, sampler=(RandomSampler if shuffle else SequentialSampler)(DATA)), seed=4
    )
    assert same == plan


def test_sizes_and_rates_follow_the_epoch_that_the_sampler_gives():
    plan = plan_of(DataLoader(DATA, batch_size=4, sampler=ByEpoch()), seed=0)
    assert [plan.epoch_size(e) for e in range(3)] == [12, 13, 14]
    assert [plan.steps_in(e) for e in range(3)] == [3, 4, 4]
    assert plan.progress(Cursor(epoch=2, offset=7)) == 2.5
    assert plan.samples_before(Cursor(epoch=2, offset=7)) == 12 + 13 + 7
    cut = plan_of(loader_of("unlike batches"), seed=0)
    assert (cut.global_batch_size, cut.full_batch, cut.steps_per_epoch) == (8, 8, 6)
    assert plan_of(loader_of("list of batches"), seed=0).batch_at(Cursor(offset=3)) == range(3, 5), "the rest of one"


def test_plans_with_samplers_are_compared_pickled_and_described_by_numbers_and_texts():
    plan = plan_of(loader_of("weighted"), seed=1)
    assert asdict(plan)["sampler"].startswith("WeightedRandomSampler ")
    assert plan != plan_of(DataLoader(DATA, batch_size=8, sampler=WeightedRandomSampler([5.0, 1.0] * 20, 30)), seed=1)
    assert plan != plan_of(DataLoader(DATA, batch_size=8, shuffle=True), seed=1)
    copy = pickle.loads(pickle.dumps(plan))
    assert copy == plan and copy.permutation(3).tolist() == plan.permutation(3).tolist()
    for lost in (DataPlan(**asdict(plan)), replace(plan)):
        assert lost == plan
        with pytest.raises(ValueError, match="plan of its loader"):
            lost.permutation(0)


def test_an_index_that_comes_again_in_an_epoch_is_counted():
    plan = plan_of(DataLoader(DATA, batch_size=2, sampler=[7, 3, 7, 7, 3, 0]), seed=0)
    assert plan.repeats(0).tolist() == [0, 0, 1, 2, 1, 0]
    assert plan_of(loader_of("subset"), seed=0).repeats(0) is None


def test_the_ledger_counts_samples_that_a_sampler_repeats():
    plan = plan_of(loader_of("replacement"), seed=1)

    def entries(lost=()):
        cursor = Cursor()
        while window := plan.batch_at(cursor):
            slices = {f"w{k}": slice_of(window, (3, 1), k) for k in range(2)}
            if cursor.step not in lost:
                yield LedgerEntry(
                    step=cursor.step,
                    generation=1,
                    epoch=0,
                    offset=window.start,
                    batch_size=len(window),
                    slices={uid: [part.start, part.stop] for uid, part in slices.items()},
                    writer="w0",
                    own_samples=plan.permutation(0)[slices["w0"].start : slices["w0"].stop],
                )
            cursor = plan.advance(cursor)

    assert check_exactly_once(entries(), plan, epochs=1).num_samples == 100
    with pytest.raises(LedgerError, match="never"):
        check_exactly_once(entries(lost=[4]), plan, epochs=1)


class Counting(Sampler):
    """Goes on in its second iteration where its first one ended, as torch would let it."""

    def __init__(self, every=1):
        self.count, self.every = 0, every

    def __iter__(self):
        self.count += 1
        return iter(range(self.count // self.every % 7, 40))


class Endless(Sampler):
    def __iter__(self):
        return itertools.cycle(range(40))


class DealsOut(Sampler):
    num_replicas, rank = 4, 0

    def __iter__(self):
        return iter(range(0, 40, 4))


class OwnIteration(DataLoader):
    def __iter__(self):
        yield from reversed(list(super().__iter__()))


class Stream(IterableDataset):
    def __iter__(self):
        yield torch.zeros(3)


@pytest.mark.parametrize(
    ("loader", "text"),
    [
        (lambda: DataLoader(DATA, sampler=Counting()), "Counting.*set_epoch"),
        (lambda: DataLoader(DATA, sampler=Counting(every=50)), r"Counting\.count.*set_epoch"),
        (lambda: DataLoader(DATA, batch_sampler=BatchSampler(Counting(), 4, False)), "how often.*set_epoch"),
        (lambda: DataLoader(DATA, sampler=Drawing(np.random.default_rng(0).random)), "Drawing.*set_epoch"),
        (lambda: DataLoader(DATA, sampler=Drawing(random.Random(0).random)), "Drawing.*set_epoch"),
        (lambda: DataLoader(DATA, sampler=iter(range(40))), "how often"),
        (lambda: DataLoader(DATA, batch_sampler=BatchSampler(iter(range(40)), 4, False)), "how often"),
        (lambda: DataLoader(DATA, sampler=Endless()), "does not end.*Endless"),
        (lambda: DataLoader(DATA, sampler=DistributedSampler(DATA, num_replicas=2, rank=0)), "nobody owns a part"),
        (lambda: DataLoader(DATA, sampler=DealsOut()), "DealsOut.*shuffle=True"),
        (
            lambda: DataLoader(DATA, batch_sampler=BatchSampler(DistributedSampler(DATA, 2, 0), 4, False)),
            "DistributedSampler.*nobody owns a part",
        ),
        (lambda: DataLoader(DATA, batch_size=None), "batch_size=32"),
        (lambda: OwnIteration(DATA, batch_size=8), "OwnIteration.*plain"),
        (lambda: DataLoader(Stream(), batch_size=8), "Stream.*__len__"),
    ],
)
def test_what_is_no_map_of_the_epoch_is_refused_by_name_with_a_way_out(loader, text):
    with pytest.raises(LoopOrderError, match=text):
        plan_of(loader(), seed=0)


@pytest.mark.parametrize(
    ("sampler", "text"),
    [
        ([1, 2.0], r"index 2\.0"),
        ([(3, 224)], r"index \(3, 224\)"),
        (["a"], "index 'a'"),
        ([True, False], "index True"),
        ([1, None], "index None"),
        ([3, 40], "index 40 in epoch 0: allowed is 0 to 39"),
        ([3, -1], "index -1"),
        ([], "no step"),
    ],
)
def test_an_index_of_no_sample_is_named(sampler, text):
    with pytest.raises(ConfigError, match=text):
        check_epoch(plan_of(DataLoader(DATA, batch_size=2, sampler=sampler), seed=0), 40, 0)


@pytest.mark.parametrize(("batches", "text"), [([[1], []], r"gave \[\]"), ([1, 2], "gave 1"), (["ab"], "index 'a'")])
def test_a_batch_of_no_indices_is_named(batches, text):
    with pytest.raises(ConfigError, match=text):
        plan_of(DataLoader(DATA, batch_sampler=batches), seed=0)


@pytest.mark.parametrize("size", [None, 8, np.int64(8), torch.tensor(8)])
def test_batches_of_a_sampler_are_the_global_ones(size):
    assert plan_of(loader_of("batches"), seed=0, global_batch_size=size).global_batch_size == 8


def test_another_global_batch_size_beside_a_batch_sampler_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"global_batch_size=16 .*BatchSampler.*up to 8.*Leave global_batch_size out"):
        plan_of(loader_of("batches"), seed=0, global_batch_size=16)


def test_an_epoch_that_the_loop_sets_by_hand_is_the_loaders_or_an_error():
    sampler = ByEpoch()
    plan = plan_of(DataLoader(DATA, batch_size=4, sampler=sampler), seed=0)
    plan.begin_epoch(3)
    sampler.set_epoch(3)
    plan.begin_epoch(3)
    sampler.set_epoch(4)
    with pytest.raises(LoopOrderError, match=r"ByEpoch\.epoch was set to 4 in epoch 3.*Leave the call out"):
        plan.begin_epoch(3)


class Levels(Sampler):
    level, size, shift = 0, 20, 0

    def __iter__(self):
        return iter(range(self.shift, self.shift + self.size))


def test_what_the_loop_changes_on_a_sampler_is_seen_unless_it_changes_the_number_of_samples():
    sampler = Levels()
    plan = plan_of(DataLoader(DATA, batch_size=4, sampler=sampler), seed=0)
    plan.begin_epoch(1)
    sampler.shift = 5
    plan.begin_epoch(1)
    assert plan.permutation(1)[0] == 5
    sampler.size = 24
    with pytest.raises(ConfigError, match=r"Levels: epoch 1 had 20 samples .* has 24 samples now.*set_epoch\(self"):
        plan.begin_epoch(1)


def test_a_dataset_without_a_length_is_refused_by_name():
    class NoLength(Dataset):
        def __getitem__(self, index):
            return index

    with pytest.raises(ConfigError, match="NoLength has no length"):
        plan_of(DataLoader(NoLength(), sampler=[1, 2]), seed=0)
