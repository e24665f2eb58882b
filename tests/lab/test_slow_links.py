"""Links that are really slow, in a network namespace for each worker."""

import itertools
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import raytrain_het as het
from raytrain_het.config import HetConfig
from raytrain_het.testing.networks import sent
from raytrain_het.testing.processes import LabSlots, ProcessLab
from raytrain_het.testing.regression import differing_replicas, trace_steps
from raytrain_het.worker.session import current

pytestmark = pytest.mark.lab
WIDTH, STEPS = 256, 60
PACKET_HEAD = 14 + 20 + 32
"""Bytes: Ethernet, IP, TCP with time stamps."""


def train(directory):
    """Returns every step's end."""
    session = current()
    trace_steps(session, directory)
    torch.manual_seed(0)
    model = het.prepare_model(
        torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH), torch.nn.ReLU(), torch.nn.Linear(WIDTH, WIDTH))
    )
    optimizer = het.prepare_optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    data = torch.randn(STEPS * 6, WIDTH)
    loader = het.prepare_data_loader(DataLoader(TensorDataset(data, data.roll(1, 1))), global_batch_size=6)
    steps = []
    for _ in loader.epochs(1):
        for x, y in loader:
            loss = F.mse_loss(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            codecs = session.worker.engine.opened.record.codecs
            steps.append(Step(codecs, time.monotonic(), *sent(), session.worker.communicator.moved.sent))
    return steps


class Step(NamedTuple):
    codecs: tuple[str, ...]
    ended: float
    card_bytes: int
    card_packets: int
    our_bytes: int


def median_s(steps):
    return statistics.median(after.ended - before.ended for before, after in itertools.pairwise(steps))


def test_auto_compresses_what_slow_links_carry_and_replicas_stay_identical(tmp_path: Path):
    config = HetConfig(compression="auto", shares=None)
    lab = ProcessLab(train, tmp_path, LabSlots(num_slots=3, rates_mbit=[20, 20, 20]), config=config)
    steps = lab.run(timeout_s=120)[0]
    assert differing_replicas(tmp_path) == []
    assert set(steps[0].codecs) == {"none"} and "none" not in steps[-1].codecs
    tables = [e for e in lab.events if e["kind"] == "table" and e["codecs"]]
    assert "compression: a step of" in tables[0]["reason"]
    plain = [step for step in steps if set(step.codecs) == {"none"}]
    assert median_s(steps[-20:]) < median_s(plain) / 2


@pytest.mark.parametrize("word", ["none", "int8", "topk(density=0.25)"])
def test_our_count_of_bytes_is_that_of_the_network_card_and_of_the_formula(tmp_path: Path, word):
    config = HetConfig(compression=word, shares=None, replica_check_steps=0)
    lab = ProcessLab(train, tmp_path, LabSlots(num_slots=3, rates_mbit=[None, None, None]), config=config)
    steps = lab.run(timeout_s=120)[0]
    first, last = steps[10], steps[-1]
    ours, packets = last.our_bytes - first.our_bytes, last.card_packets - first.card_packets
    card = last.card_bytes - first.card_bytes
    assert (card - PACKET_HEAD * packets) / ours == pytest.approx(1, abs=0.03)  # What the hub is told is in it.
    assert card / ours == pytest.approx(1, abs=0.03)
    if word == "none":
        formula = 2 * 2 / 3 * 4 * 2 * WIDTH * (WIDTH + 1)
        assert ours / (len(steps) - 11) == pytest.approx(formula, rel=0.03)
