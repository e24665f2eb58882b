"""What a codec remembers, through kills, skipped updates and resumes: it counts the steps that used what it sent."""

import dataclasses
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from labs import run
from remembering import Counting

from raytrain_het.collectives import layout
from raytrain_het.collectives.codec_states import CodecStates
from raytrain_het.compression import CODECS, RESIDUAL
from raytrain_het.config import HetConfig
from raytrain_het.testing.faults import Fault
from raytrain_het.testing.ledger import read_ledgers
from raytrain_het.testing.regression import Regression
from raytrain_het.training import session as sessions
from raytrain_het.training.checkpoint import read_meta

SETTINGS = {"codecs": ("counting",)}


@dataclass(frozen=True, kw_only=True)
class Remembering(Regression):
    """Also returns who the worker is, and its codec's state."""

    def __call__(self, directory: str) -> dict[str, Any]:
        CODECS["counting"] = Counting()
        result = super().__call__(directory)
        session = sessions.current()
        return result | {"uid": session.agent.uid, "counts": Counting.counts(session._communicator.codec_states)}


TASK = Remembering()


def used(directory, skipped=()):
    """By worker, the committed steps that its gradient was part of, and whose update was made."""
    last = {}
    for entry in read_ledgers(directory):
        if entry.step not in last or entry.generation > last[entry.step].generation:
            last[entry.step] = entry
    steps = [entry for step, entry in last.items() if step not in skipped]
    return Counter(uid for entry in steps for uid, (start, stop) in entry.slices.items() if stop > start)


@pytest.mark.parametrize("point", ["between_buckets", "decoded", "updated"])
def test_a_step_counts_once_though_it_was_done_again_or_taken_over(tmp_path, point):
    task = dataclasses.replace(TASK, nan_steps=(20,), nan_slot=0, patience_s=0.05)
    faults = [Fault(slot=1, step=7, point=point), Fault(slot=2, step=13, point=point)]
    done = run(task, tmp_path, faults=faults, settings=SETTINGS)
    done.check(task)
    expected = used(tmp_path, skipped={20})
    assert {r["uid"]: r["counts"] for r in done.results.values()} == {
        r["uid"]: [expected[r["uid"]]] for r in done.results.values()
    }
    assert expected[done.results[0]["uid"]] == task.num_steps - 1


def test_a_resumed_run_goes_on_with_what_each_worker_remembered(tmp_path):
    run(dataclasses.replace(TASK, epochs=2), tmp_path / "first", settings=SETTINGS)
    path = sorted((tmp_path / "first" / "storage").iterdir())[-1]
    settings = SETTINGS | {"checkpoint": str(path), "checkpoint_cursor": read_meta(str(path))["cursor"]}
    done = run(TASK, tmp_path / "second", num_slots=4, settings=settings)
    half = TASK.num_steps / 2
    assert [done.results[slot]["counts"] for slot in range(4)] == [[2 * half]] * 3 + [[half]], "the fourth is new"


@dataclass(frozen=True, kw_only=True)
class LeavingOut(Regression):
    """Also returns what the worker's codec has left out: when it began, and at its end."""

    def __call__(self, directory: str) -> dict[str, Any]:
        layout.SMALL, adopt, begun = 1, CodecStates.adopt, {}

        def adopting(states, by_parameter):
            adopt(states, by_parameter)
            begun.update(residuals(states))

        CodecStates.adopt = adopting
        result = super().__call__(directory)
        return result | {"begun": begun, "left": residuals(sessions.current()._communicator.codec_states)}


def residuals(states):
    return {name: state[RESIDUAL].clone() for name, state in states.by_parameter().items()}


def test_a_smaller_fleet_takes_over_what_those_that_are_gone_had_left_out(tmp_path):
    config = HetConfig(compression={"topk": {"density": 0.1}}, shares=None)
    first = run(LeavingOut(epochs=2), tmp_path / "first", num_slots=4, config=config)
    path = sorted((tmp_path / "first" / "storage").iterdir())[-1]
    settings = {"checkpoint": str(path), "checkpoint_cursor": read_meta(str(path))["cursor"]}
    done = run(LeavingOut(), tmp_path / "second", num_slots=3, config=config, settings=settings)
    left = {slot: result["left"] for slot, result in first.results.items()}
    for name in left[0]:
        begun = [done.results[slot]["begun"].get(name) for slot in range(3)]
        torch.testing.assert_close(begun[0], left[0][name] + left[3][name])
        assert torch.equal(begun[1], left[1][name]) and torch.equal(begun[2], left[2][name])
    assert any(values.any() for values in left[3].values())
