"""An error of the user's own ends the run at once, and its traceback is what people see."""

import os
import pickle
import re
import signal

import pytest
import torch
from labs import alone
from torch.utils.data import DataLoader, TensorDataset

import raytrain_het as het
from raytrain_het.config import HetConfig
from raytrain_het.errors import RunFailedError
from raytrain_het.testing.faults import Fault
from raytrain_het.testing.processes import LabSlots, ProcessLab, WorkersFailedError
from raytrain_het.testing.regression import Regression
from raytrain_het.worker import session as sessions

TASK = Regression()


def failing(task, directory, **kwargs):
    lab = ProcessLab(task, directory, LabSlots(num_slots=kwargs.pop("num_slots", 3)), **kwargs)
    with pytest.raises(WorkersFailedError):
        lab.run(60.0)
    return lab


@pytest.mark.parametrize("point", ["slice", "backward", "updated", "report"])
def test_an_exception_on_one_worker_ends_all_others_and_its_traceback_is_kept(tmp_path, point):
    step = 20 if point == "report" else 14
    lab = failing(TASK, tmp_path, faults=[Fault(slot=1, step=step, point=point, kind="raise")])
    own = lab.errors.pop(1)
    assert f"RuntimeError: scripted fault at {point} of step {step}" in own
    assert sorted(lab.errors) == [0, 2]
    for text in lab.errors.values():
        assert "RunFailedError: the training function of worker 1 raised" in text
    assert lab.failure is not None
    assert "Traceback" in lab.failure
    assert f"scripted fault at {point}" in lab.failure
    assert lab.restarts == 0


class BeforeJoining:
    def __call__(self, directory):
        if sessions.current().slot == 1:
            raise RuntimeError("no such file")
        return TASK(directory)


def test_an_exception_before_the_run_was_joined_is_known_to_the_lab(tmp_path):
    """The hub has no connection to such a worker; whoever started the process sees it die (Ray does)."""
    lab = ProcessLab(BeforeJoining(), tmp_path, LabSlots(num_slots=3), config=HetConfig(start_timeout_s=0.3))
    with pytest.raises(WorkersFailedError, match="RuntimeError: no such file"):
        lab.run(60.0)


class OtherModel:
    def __call__(self, directory):
        wide = sessions.current().slot == 2
        model = het.prepare_model(torch.nn.Linear(3, 2 if wide else 1))
        optimizer = het.prepare_optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
        loader = het.prepare_data_loader(DataLoader(TensorDataset(torch.zeros(12, 3))), global_batch_size=4)
        for _ in loader.epochs(1):
            for (x,) in loader:
                optimizer.zero_grad()
                model(x).mean().backward()
                optimizer.step()


def test_another_model_on_one_worker_ends_the_run_before_its_first_step(tmp_path):
    lab = failing(OtherModel(), tmp_path)
    mismatched = [slot for slot, text in lab.errors.items() if "ReplicaMismatchError" in text]
    assert mismatched
    assert sorted(lab.errors) == [0, 1, 2]
    assert "built another model or dataset than worker" in lab.errors[mismatched[0]]


class Poison:
    """Sample 5 kills whoever looks at it."""

    def __call__(self, directory):
        model = het.prepare_model(torch.nn.Linear(1, 1))
        optimizer = het.prepare_optimizer(torch.optim.SGD(model.parameters(), lr=0.001))
        data = TensorDataset(torch.arange(24.0)[:, None])
        loader = het.prepare_data_loader(DataLoader(data, shuffle=True), global_batch_size=6)
        for _ in loader.epochs(3):
            for (x,) in loader:
                if (x == 5).any():
                    os.kill(os.getpid(), signal.SIGKILL)  # As a crash in native code would.
                optimizer.zero_grad()
                model(x).mean().backward()
                optimizer.step()


@pytest.mark.parametrize("num_slots", [2, 4])
def test_a_sample_that_kills_its_worker_three_times_fails_the_run_and_is_named(tmp_path, num_slots):
    """Two workers die of it both and start again from the beginning; of four, one is left."""
    lab = failing(Poison(), tmp_path, num_slots=num_slots)
    assert "Workers died 3 times in step" in (lab.failure or ""), (lab.errors, lab.restarts, lab.events[-20:])
    assert any(re.search(r"Samples of the last dead workers: \[(.*\b)?5\b", text) for text in lab.errors.values())


def test_an_error_in_the_communication_thread_is_not_taken_for_a_broken_link(tmp_path, monkeypatch):
    def fail(self, job):
        raise MemoryError("no room for a message")

    def train():
        model = het.prepare_model(torch.nn.Linear(3, 1))
        optimizer = het.prepare_optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
        loader = het.prepare_data_loader(DataLoader(TensorDataset(torch.zeros(8, 3))), global_batch_size=4)
        for _ in loader.epochs(1):
            for (x,) in loader:
                optimizer.zero_grad()
                model(x).mean().backward()
                optimizer.step()

    monkeypatch.setattr("raytrain_het.allreduce.communicator.Communicator._step", fail)
    with pytest.raises(RunFailedError, match="communication thread of worker 0 has failed: MemoryError: no room"):
        alone(train, tmp_path)


def test_a_worker_alone_raises_its_own_error(tmp_path):
    def train():
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        alone(train, tmp_path)


def test_run_failed_error_survives_pickling():
    error = pickle.loads(pickle.dumps(RunFailedError("why", {"step": 1, "slots": [0]})))
    assert (str(error), error.poison) == ("why", {"step": 1, "slots": [0]})
