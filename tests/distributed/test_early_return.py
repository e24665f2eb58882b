"""A worker that has enough before the others have."""

import functools

import pytest
import torch
from labs import run
from torch.utils.data import DataLoader

import raytrain_het as het
from raytrain_het.testing.regression import Regression, flat
from raytrain_het.worker import session as sessions

RETURNS_AT = 13


def returns_early(directory, *, report=False):
    """The worker in slot 1 has enough in the middle of an epoch."""
    task, session = Regression(), sessions.current()
    model, dataset = task.build()
    model = het.prepare_model(model)
    optimizer = het.prepare_optimizer(torch.optim.SGD(model.parameters(), lr=task.lr, momentum=task.momentum))
    loader = het.prepare_data_loader(DataLoader(dataset, shuffle=True), global_batch_size=task.global_batch_size)
    for _ in loader.epochs(task.epochs):
        for x, y in loader:
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
            if report and session.worker.engine.cursor.step == RETURNS_AT:
                het.report({"step": RETURNS_AT})
                report = False  # The body runs again with this step behind it.
            if session.slot == 1 and session.worker.engine.cursor.step == RETURNS_AT:
                return None
    return {"parameters": flat(model.parameters())}


@pytest.mark.parametrize("report", [False, True])
def test_a_function_that_returns_in_mid_epoch_holds_nobody_up(tmp_path, report):
    done = run(functools.partial(returns_early, report=report), tmp_path)
    done.check(Regression(), reports=False)
    assert {e["slot"]: e["step"] for e in done.kinds("finished")}[1] == RETURNS_AT
    assert done.kinds("lost", "evicted") == []
    slots = [e["slots"] for e in done.kinds("formed")]
    assert (slots[0], slots[-1], len(slots)) == ([0, 1, 2], [0, 2], 2 + report)
    assert [(r["step"], r["num_workers"]) for r in done.lab.reports] == [(RETURNS_AT, 3)] * report
    assert sorted(slot for slot, result in done.results.items() if result is not None) == [0, 2]
