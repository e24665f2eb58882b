"""What a codec remembers, through kills, skipped updates and resumes: it counts the steps that used what it sent."""

import dataclasses
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from labs import SMALL_BUCKETS, run
from remembering import Counting, CountingConfig

from raytrain_het.allreduce import layout
from raytrain_het.allreduce.codecs import RESIDUAL
from raytrain_het.allreduce.error_feedback import ErrorFeedback
from raytrain_het.config import HetConfig
from raytrain_het.membership.cursor import Cursor
from raytrain_het.testing.faults import Fault, happened
from raytrain_het.testing.ledger import read_ledgers
from raytrain_het.testing.regression import Regression, go_on
from raytrain_het.worker import session as sessions
from raytrain_het.worker.state.checkpoint import read_meta
from raytrain_het.worker.state.handing_on import HandingOn

CONFIG = CountingConfig(bucket_mib=SMALL_BUCKETS.bucket_mib, shares=None)


@dataclass(frozen=True, kw_only=True)
class Remembering(Regression):
    """Also returns who the worker is, and its codec's state."""

    def __call__(self, directory: str) -> dict[str, Any]:
        Counting.register()
        result = super().__call__(directory)
        session = sessions.current()
        return result | {
            "uid": session.worker.agent.uid,
            "counts": Counting.counts(session.worker.communicator.codec_states),
        }


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
    done = run(task, tmp_path, faults=faults, config=CONFIG)
    done.check(task)
    expected = used(tmp_path, skipped={20})
    assert {r["uid"]: r["counts"] for r in done.results.values()} == {
        r["uid"]: [expected[r["uid"]]] for r in done.results.values()
    }
    assert expected[done.results[0]["uid"]] == task.num_steps - 1


def test_a_resumed_run_goes_on_with_what_each_worker_remembered(tmp_path):
    run(dataclasses.replace(TASK, epochs=2), tmp_path / "first", config=CONFIG)
    path = sorted((tmp_path / "first" / "storage").iterdir())[-1]
    context = {
        "checkpoint": str(path),
        "checkpoint_cursor": Cursor.from_dict(read_meta(str(path))["cursor"]),
    }
    done = run(TASK, tmp_path / "second", num_slots=4, config=CONFIG, context=context)
    half = TASK.num_steps / 2
    assert [done.results[slot]["counts"] for slot in range(4)] == [[2 * half]] * 3 + [[half]], "the fourth is new"


@dataclass(frozen=True, kw_only=True)
class LeavingOut(Regression):
    """Also returns what the worker's codec has left out: when it began, and at its end."""

    def __call__(self, directory: str) -> dict[str, Any]:
        layout.SMALL, adopt, begun = 1, ErrorFeedback.adopt, {}

        def adopting(states, by_parameter):
            adopt(states, by_parameter)
            begun.update(residuals(states))

        ErrorFeedback.adopt = adopting
        result = super().__call__(directory)
        return result | {
            "begun": begun,
            "left": residuals(sessions.current().worker.communicator.codec_states),
        }


def residuals(states):
    return {name: state[RESIDUAL].clone() for name, state in states.by_parameter().items()}


def test_a_smaller_fleet_takes_over_what_those_that_are_gone_had_left_out(tmp_path):
    config = HetConfig(compression={"topk": {"density": 0.1}}, shares=None)
    first = run(LeavingOut(epochs=2), tmp_path / "first", num_slots=4, config=config)
    path = sorted((tmp_path / "first" / "storage").iterdir())[-1]
    context = {"checkpoint": str(path), "checkpoint_cursor": Cursor.from_dict(read_meta(str(path))["cursor"])}
    done = run(LeavingOut(), tmp_path / "second", num_slots=3, config=config, context=context)
    left = {slot: result["left"] for slot, result in first.results.items()}
    for name in left[0]:
        begun = [done.results[slot]["begun"].get(name) for slot in range(3)]
        torch.testing.assert_close(begun[0], left[0][name] + left[3][name])
        assert torch.equal(begun[1], left[1][name]) and torch.equal(begun[2], left[2][name])
    assert any(values.any() for values in left[3].values())


@dataclass(frozen=True, kw_only=True)
class HandingOver(LeavingOut):
    """Notes what a worker has left out when it was let go, and returns what others have handed on to it."""

    def __call__(self, directory: str) -> dict[str, Any]:
        session, inherited = sessions.current(), {}
        hand_on, inherit = HandingOn.hand_on, ErrorFeedback.inherit

        def noting(handing_on):
            torch.save(
                residuals(session.worker.communicator.codec_states),
                Path(directory) / f"left_out_{session.slot}.pt",
            )
            return hand_on(handing_on)

        def inheriting(states, by_parameter):
            inherited.update({name: state[RESIDUAL] for name, state in by_parameter.items()})
            return inherit(states, by_parameter)

        HandingOn.hand_on, ErrorFeedback.inherit = noting, inheriting
        return super().__call__(directory) | {"inherited": inherited}


@pytest.mark.parametrize("compression", [{"topk": {"density": 0.1}}, {"lowrank": {"rank": 1}}])
@pytest.mark.parametrize(("slot", "kind"), [(0, "leave"), (2, "leave"), (2, "drain")])
def test_what_a_worker_that_leaves_has_left_out_is_sent_by_another_one(tmp_path, slot, kind, compression):
    config, task = HetConfig(compression=compression, shares=None), HandingOver(waits_at=(30,))
    faults = [Fault(slot=slot, step=17, point="slice", kind=kind)]

    def on_poll(lab):
        if kind == "drain" and happened(tmp_path):
            lab.hub.slot_drains(slot, "a notice")
        if any(e["kind"] == "handed_on" for e in lab.hub.events(0)):
            go_on(tmp_path, 30)

    done = run(task, tmp_path, config=config, faults=faults, refill=False, on_poll=on_poll)
    left_out = torch.load(tmp_path / f"left_out_{slot}.pt")
    heir = 0 if slot else 1
    inherited = done.results[heir]["inherited"]
    assert left_out.keys() == inherited.keys() and any(values.any() for values in left_out.values())
    assert all(torch.equal(left_out[name], inherited[name]) for name in left_out)
    norm = sum(float(values.norm()) ** 2 for values in left_out.values()) ** 0.5
    assert [(e["slot"], e["by"]) for e in done.kinds("handed_on")] == [(heir, slot)]
    assert done.kinds("handed_on")[0]["norm"] == pytest.approx(norm)


def test_a_killed_worker_takes_what_it_has_left_out_with_it_and_its_norm_is_told(tmp_path):
    config, task = HetConfig(compression={"topk": {"density": 0.1}}, shares=None), LeavingOut()
    faults = [Fault(slot=1, step=25, point="slice")]
    done = run(task, tmp_path, config=config, faults=faults, refill=False)
    (lost,) = done.kinds("lost")
    assert lost["left_out"] > 0
