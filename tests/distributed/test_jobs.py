"""The built-in jobs' training functions, as workers run them: what they report is what they say it is."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn import functional as F

from raytrain_het.jobs.char_lm import training as char_lm
from raytrain_het.jobs.config import JobConfig
from raytrain_het.jobs.probe_worker import ProbeWorker
from raytrain_het.jobs.table import load_job
from raytrain_het.jobs.tabular import training as tabular
from raytrain_het.testing.processes import LabSlots, ProcessLab
from raytrain_het.worker.session import current

JOBS = Path(__file__).parents[2] / "experiments" / "jobs"


@dataclasses.dataclass
class Job:
    """A job's training function in a worker without Ray."""

    job: type[JobConfig]
    config: dict

    def __call__(self, directory):
        import ray.train.torch

        ray.train.torch.get_device = lambda: torch.device("cpu")
        self.job.train(self.config)
        session = current()
        return session.worker.replica.model.state_dict(), session.worker._speed._step


def run(tmp_path, kind, *overrides):
    job = load_job(JOBS / f"{kind}.yaml", overrides)
    config = job.train_loop_config()
    lab = ProcessLab(Job(type(job), config), tmp_path / "lab", LabSlots(num_slots=2), config=job.het)
    results = lab.run(60)
    return config, results[0], lab.reports[-1]["metrics"]


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_a_table_is_learnt_in_its_own_unit_and_begins_with_what_the_probe_measured(tmp_path, one_thread):
    """The target is a noiseless sum of the columns, in thousands: torn apart they could not be learnt."""
    random = np.random.default_rng(0)
    a, b = random.normal(3, 2, 500), random.normal(-1, 0.5, 500)
    frame = pd.DataFrame({"a": a, "b": b, "price": 1000 * (2 * a - 3 * b)})
    frame.to_csv(tmp_path / "t.csv", index=False)
    overrides = [f"data={tmp_path / 't.csv'}", "global_batch_size=50", "epochs=15", "het.micro_batch_size=20"]
    job = load_job(JOBS / "tabular.yaml", overrides)
    probe = ProbeWorker(device="cpu", num_threads=1)
    probe.prepare(type(job), job.train_loop_config(), job.het)
    measured = probe.step([10, 50], 0.1)[0].step

    config, (state, known), metrics = run(tmp_path, "tabular", *overrides)
    assert known == measured
    order = np.random.default_rng(config["seed"]).permutation(500)
    train, held_out = frame.to_numpy()[order[:400]], frame.to_numpy()[order[400:]]
    scaled = (held_out - train.mean(axis=0)) / train.std(axis=0)
    model = tabular.build_model(config, tabular.open_table(tabular.Source.of(config)))
    model.load_state_dict(state)
    out = model(torch.tensor(scaled[:, :2], dtype=torch.float32)).detach().squeeze(1).double().numpy()
    errors = out * train[:, 2].std() + train[:, 2].mean() - held_out[:, 2]
    assert metrics["held_out_mse"] == pytest.approx((errors**2).mean(), rel=1e-3)
    assert metrics["held_out_mse"] < 1e-3 * held_out[:, 2].var()


def test_a_language_model_reports_bits_per_character(tmp_path):
    small = ["max_characters=10000", "context=16", "width=16", "layers=1", "global_batch_size=64"]
    config, (state, _), metrics = run(tmp_path, "char_lm", *small)
    model = char_lm.build_model(config)
    model.load_state_dict(state)
    _, test_set = char_lm.windows(config)
    seen, following = (torch.stack(part) for part in zip(*test_set, strict=True))
    with torch.no_grad():
        nats = F.cross_entropy(model(seen).flatten(0, 1), following.flatten()).item()
    assert metrics["bits_per_character"] == pytest.approx(nats / math.log(2), rel=1e-4)
    assert 4 < metrics["bits_per_character"] < 7
    assert metrics["train_bits_per_character"] == pytest.approx(metrics["bits_per_character"], rel=0.2)
