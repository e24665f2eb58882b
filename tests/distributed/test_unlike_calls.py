"""Calls that not all workers make: named within seconds, with who is where, and nobody is dropped for them."""

import dataclasses
import re
import time

import pytest
import torch
from labs import run
from torch.utils.data import DataLoader, Dataset

import raytrain_het as het
from raytrain_het.errors import ConfigError, ForeignError
from raytrain_het.testing.processes import WorkersFailedError
from raytrain_het.testing.regression import SMALL_BUCKETS, Regression, flat
from raytrain_het.worker import session as sessions

TASK = Regression(epochs=3)
CONFIG = dataclasses.replace(SMALL_BUCKETS, silence_s=5.0)
STEPS = TASK.plan.steps_per_epoch


class Program:
    """The task with calls of its own; each is given the worker's rank, the epoch and the steps that are done."""

    def __call__(self, directory):
        session, task = sessions.current(), TASK
        self.rank, self.session, self.seen = session.slot, session, []
        model, dataset = task.build()
        self.model = model = het.prepare_model(model)
        optimizer = het.prepare_optimizer(torch.optim.SGD(model.parameters(), lr=task.lr))
        loader = het.prepare_data_loader(DataLoader(dataset, shuffle=True), global_batch_size=task.global_batch_size)
        for epoch in loader.epochs(task.epochs):
            for x, y in loader:
                if self.returns("top"):
                    return self.result(model)
                optimizer.zero_grad()
                torch.nn.functional.mse_loss(model(x), y).backward()
                if self.returns("before step"):
                    return self.result(model)
                optimizer.step()
                self.after_step(session.worker.engine.cursor.step)
            self.after_epoch(epoch)
        return self.result(model)

    def result(self, model):
        return {
            "parameters": flat(model.parameters()),
            "seen": self.seen,
            "step": self.session.worker.engine.cursor.step,
        }

    def returns(self, where):
        return False

    def after_step(self, step):
        pass

    def after_epoch(self, epoch):
        pass


def failure_of(program, directory, **settings):
    """What the run says in the end; nobody was dropped."""
    began = time.monotonic()
    settings.setdefault("num_slots", 2)
    lab = None

    def keep(of):
        nonlocal lab
        lab = of

    with pytest.raises(WorkersFailedError) as caught:
        run(program, directory, config=CONFIG, on_poll=keep, **settings)
    assert [e for e in lab.events if e["kind"] in ("evicted", "lost") and not e.get("expected")] == []
    assert time.monotonic() - began < 60, "the hang limit is 600 s"
    return str(caught.value)


class ReportsFromRank0(Program):
    def __init__(self, when):
        self.when = when

    def after_epoch(self, epoch):
        if self.rank == 0 and (self.when == "always" or epoch == TASK.epochs - 1):
            het.report({"epoch": epoch})

    def after_step(self, step):
        if self.when == "twice" and step == 5:
            het.report({"step": step}, checkpoint=False)
            if self.rank == 1:
                het.report({"step": step}, checkpoint=False)


@pytest.mark.parametrize(
    ("when", "said"),
    [
        ("always", r"called at step 10 at test_unlike_calls.py:\d+ by worker 0, and not by all: worker 1 has gone on"),
        ("last", r"called at step 30 at .* by worker 0, and not by all: worker 1 has finished without it"),
        ("twice", r"called at step 5 at .* by worker 1, and not by all: worker 0 has gone on"),
    ],
)
def test_a_report_that_not_all_make_fails_the_run_and_names_who_made_it_and_who_did_not(tmp_path, when, said):
    text = failure_of(ReportsFromRank0(when), tmp_path)
    assert re.search(said, text), text
    assert "if rank == 0" in text


class Broken(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        if index == 0:
            raise ValueError("a broken image")
        return torch.zeros(4)


class TwoArguments(Exception):
    def __init__(self, code, detail):
        super().__init__(f"{code}: {detail}")


class EvaluationsThatRaise(Program):
    def after_epoch(self, epoch):
        try:
            het.evaluate(lambda batch: {"n": float(len(batch))}, Broken(), batch_size=2)
        except ValueError as error:
            self.seen.append(str(error))
        try:
            het.evaluate(self.two_arguments, [torch.zeros(2)] * 4, batch_size=2)
        except ForeignError as error:
            self.seen.append(str(error).strip().splitlines()[-1])
        for returned in ({"text": "good"}, {"many": torch.zeros(3)}, 3.0, {"n": None}):
            try:
                het.evaluate(lambda batch, returned=returned: returned, [torch.zeros(2)] * 4)
            except ConfigError as error:
                self.seen.append(str(error))
        try:
            het.evaluate(lambda batch: {f"of {len(batch)}": 1}, [torch.zeros(2)] * 3, batch_size=2)
        except ConfigError as error:
            self.seen.append(str(error))

    @staticmethod
    def two_arguments(batch):
        raise TwoArguments(404, "no labels")


def test_what_one_chunk_raises_is_raised_on_all_workers_alike(tmp_path):
    done = run(EvaluationsThatRaise(), tmp_path, num_slots=2, config=CONFIG)
    first, second = (done.results[slot]["seen"] for slot in (0, 1))
    assert first == second
    assert len(first) == 7 * TASK.epochs
    assert first[0] == "a broken image"
    assert "TwoArguments: 404: no labels" in first[1]
    assert all("evaluate(): fn" in text for text in first[2:7])
    assert done.kinds("evicted", "lost") == []


class EvaluatesWhereOthersDoNot(Program):
    """One line on rank 0 alone, one helper from two places, one in a loop over names."""

    def after_epoch(self, epoch):
        if self.rank == 0:
            self.seen.append(self.score(1.0))
        both = self.score(2.0)
        assert both == 2.0

    @staticmethod
    def score(value):
        return het.evaluate(lambda batch: {"x": value * len(batch)}, [torch.zeros(2)] * 4, batch_size=2)["x"]


def test_an_evaluation_that_only_some_workers_make_is_made_by_these_and_mixed_up_with_no_other(tmp_path):
    done = run(EvaluatesWhereOthersDoNot(), tmp_path, num_slots=2, config=CONFIG)
    assert done.results[0]["seen"] == [1.0] * TASK.epochs
    assert done.results[1]["seen"] == []
    assert done.parameters.isfinite().all(), "and the same on both"


class Returns(Program):
    def __init__(self, where, who, at=13):
        self.where, self.who, self.at = where, who, at

    def returns(self, where):
        return where == self.where and self.rank in self.who and self.session.worker.engine.cursor.step == self.at

    def after_epoch(self, epoch):
        het.report({"epoch": epoch})


@pytest.mark.parametrize("where", ["top", "before step"])
@pytest.mark.parametrize("who", [(0, 1), (1,)], ids=str)
def test_a_return_inside_the_body_is_a_return(tmp_path, where, who):
    done = run(Returns(where, who), tmp_path, num_slots=2, config=CONFIG)
    steps = {slot: done.results[slot]["step"] for slot in (0, 1)}
    assert steps == {slot: 13 if slot in who else TASK.num_steps for slot in (0, 1)}
    assert done.kinds("evicted", "lost", "failed") == []
    assert [r["step"] for r in done.lab.reports] == ([10] if who == (0, 1) else [10, 20, 30])


class WaitsAtUnlikePlaces(Program):
    """Three reports at once by one worker, none by the other, at the end of an epoch: each waits for the other."""

    def after_epoch(self, epoch):
        if self.rank == 0:
            for _ in range(3):
                het.report({"epoch": epoch})


def test_workers_that_wait_for_each_other_at_unlike_places_are_told_where_each_is(tmp_path):
    text = failure_of(WaitsAtUnlikePlaces(), tmp_path)
    assert "worker 0: in report() at step 10" in text
    assert "worker 1: in step 11, waiting for the others' gradients" in text


class Slow(Program):
    def after_step(self, step):
        if self.rank == 1 and step == 5:
            time.sleep(7)


def test_who_is_waited_for_is_told_with_where_it_is(tmp_path):
    done = run(Slow(), tmp_path, num_slots=2, config=CONFIG)
    told = done.kinds("waiting")
    assert [e["slots"] for e in told] == [[1]]
    assert "worker 0: in step 6, waiting for the others' gradients" in told[0]["reason"]
    assert "worker 1: after step 5, in the function's own code" in told[0]["reason"]
    assert done.kinds("evicted", "lost") == []
