"""Rates by schedule and clipped gradients: as in one process, whatever happens to workers and after a resume."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from labs import run

from raytrain_het.membership.cursor import Cursor
from raytrain_het.optim import schedule_of
from raytrain_het.testing.faults import Fault, happened
from raytrain_het.testing.regression import SMALL_BUCKETS, Regression, flat
from raytrain_het.worker.state.checkpoint import read_meta

NORM = 0.4


@dataclass(frozen=True, kw_only=True)
class Decaying(Regression):
    """Knows what one process does by this schedule, with clipping to ``NORM``."""

    schedule: Any = None

    def rate(self, cursor: Cursor) -> float:
        progress = cursor.epoch + cursor.offset / self.num_samples
        return self.lr * schedule_of(self.schedule).factor(progress, self.epochs)

    def plain(self) -> torch.Tensor:
        model, dataset = self.build()
        optimizer = torch.optim.SGD(model.parameters(), lr=self.lr, momentum=self.momentum)
        for cursor, indices in self.steps():
            x, y = dataset[indices]
            optimizer.zero_grad()
            F.mse_loss(model(x), y).backward()
            norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()  # Without the 1e-6 of torch's own.
            for p in model.parameters():
                p.grad.mul_(float((NORM / norm).float()) if norm > NORM else 1.0)
            optimizer.param_groups[0]["lr"] = self.rate(cursor)
            optimizer.step()
        return flat(model.parameters())

    def steps(self):
        plan, cursor = self.plan, Cursor()
        while cursor.epoch < self.epochs:
            batch = plan.batch_at(cursor)
            yield cursor, torch.from_numpy(plan.permutation(cursor.epoch)[batch.start : batch.stop].copy())
            cursor = plan.advance(cursor)
            if plan.is_epoch_end(cursor):
                cursor = plan.next_epoch(cursor)

    def check_rates(self, seen: list[tuple[int, float]]) -> None:
        expected = {step: self.rate(cursor) for step, (cursor, _) in enumerate(self.steps())}
        assert seen
        for step, rate in seen:
            assert rate == pytest.approx(expected[step], rel=1e-12)


COSINE = {"cosine": {"floor": 0.1, "warmup_epochs": 1, "warmup_from": 0.2}}


def config_of(task, **values):
    return dataclasses.replace(SMALL_BUCKETS, schedule=task.schedule, clip={"norm": NORM}, shares=(3, 2, 1), **values)


# The dataclass is hashed: plain results are kept.
class _Hashable(dict):
    def __hash__(self):
        return hash(repr(self))


@pytest.mark.parametrize("point", ["backward", "decoded", "updated"])
@pytest.mark.parametrize("micro_batch_size", [None, 2])
def test_rates_and_clipping_are_right_for_steps_done_again_and_workers_that_heal(tmp_path, point, micro_batch_size):
    task = Decaying(schedule=_Hashable(COSINE), patience_s=0.05, micro_batch_size=micro_batch_size)
    faults = [Fault(slot=1, step=7, point=point), Fault(slot=0, step=17, point=point, when_stored=True)]
    done = run(task, tmp_path, config=config_of(task), faults=faults)
    done.check(task)
    assert len(happened(tmp_path)) == 2
    for result in done.results.values():
        task.check_rates(result["rates"])


def test_a_resumed_run_goes_on_where_its_schedule_stood(tmp_path):
    task = Decaying(schedule=_Hashable({"exponential": {"gamma": 0.7}}))
    config = config_of(task)
    run(dataclasses.replace(task, epochs=2), tmp_path / "first", config=config)
    path = sorted((tmp_path / "first" / "storage").iterdir())[-1]
    context = {"checkpoint": str(path), "checkpoint_cursor": Cursor.from_dict(read_meta(str(path))["cursor"])}
    done = run(task, tmp_path / "second", config=config, context=context)
    for result in done.results.values():
        task.check_rates(result["rates"])
        assert min(step for step, _ in result["rates"]) == task.num_steps // 2
    assert float((done.parameters - task.plain()).abs().max()) < 1e-9


def test_a_run_that_goes_on_without_its_schedule_has_its_own_rate_again(tmp_path):
    task = Decaying(schedule=_Hashable({"linear": {}}), epochs=2)
    run(task, tmp_path / "first", config=config_of(task))
    path = sorted((tmp_path / "first" / "storage").iterdir())[-1]
    context = {"checkpoint": str(path), "checkpoint_cursor": Cursor.from_dict(read_meta(str(path))["cursor"])}
    longer = dataclasses.replace(task, epochs=3)
    config = dataclasses.replace(config_of(task), schedule=None)
    done = run(longer, tmp_path / "second", config=config, context=context)
    assert {rate for result in done.results.values() for _, rate in result["rates"]} == {task.lr}


def test_what_does_not_suit_is_an_event_of_the_run(tmp_path):
    task = Regression(epochs=1)
    config = dataclasses.replace(SMALL_BUCKETS, compression={"topk": {"warmup_epochs": 1}})
    done = run(task, tmp_path, config=config)
    said = [e["text"] for e in done.kinds("warning")]
    assert len(said) == 2 and "does nothing here" in said[0] and "all of them in the warm-up" in said[1]
