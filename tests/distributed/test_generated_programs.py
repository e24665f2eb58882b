"""Generated programs train as one process with the whole batch would, or are refused by name.

``python -m raytrain_het.testing.programs --seed N --count 500`` runs more of them, ``--shrink NUMBER`` finds the
smallest one that fails like a number's.
"""

import dataclasses

import pytest
import torch

from raytrain_het.testing.programs.drawing import generate
from raytrain_het.testing.programs.pool import Pool
from raytrain_het.testing.programs.program import Program
from raytrain_het.testing.programs.shrinking import shrunk
from raytrain_het.testing.programs.text import text_of
from raytrain_het.testing.programs.text_model import BLOCKS, BUFFERS
from raytrain_het.testing.programs.verdict import Verdict, verdict_of

# Chosen so that they have nearly every choice between them.
NUMBERS = (
    1393,
    3384,
    3148,
    3359,
    2862,
    3168,
    2937,
    1311,
    2796,
    1614,
    2881,
    3964,
    2253,
    3473,
    3216,
    19,
    2105,
    2443,
    2682,
    2309,
    329,
)
REFUSED = (277, 2581, 3995, 1244, 3107, 341)

KEPT = {
    "re-entrant checkpointing: earlier parameters kept local gradients": Program(blocks=("checkpoint_reentrant",)),
    "a function that calls backward() inside: the same": Program(blocks=("inner_backward",)),
    "an optimizer of the head only, with a check of every step": Program(groups="head", check="every_step"),
    "a kept gradient changed under one's hands": Program(keep="compare"),
    "a sampler with replacement was a plain permutation": Program(sampler="replacement"),
    "batch_sampler= was refused as a batch size of None": Program(sampler="own_batches"),
    "a buffer that starts at infinity became NaN": Program(buffers=("infinite",)),
    "gradients that add up were changed by the body once a pass": Program(
        blocks=("scale",), groups="decay", clip="inf_norm", edit="sign", micro=2
    ),
    "what a frozen layer's optimizer does with zeros was lost with a worker": Program(
        blocks=("scale",),
        thaw="freeze_stem",
        optimizer="adafactor",
        zero="keep",
        workers=3,
        fault="kill_reporting",
        report="tensor",
        epochs=3,
    ),
    "an expanded buffer could not be written": Program(buffers=("expanded",), fault="kill_updated"),
    "whole numbers beyond 2^53, on a worker without a share": Program(buffers=("big_counter",), shares=(0.0, 1.0)),
    "a weight changed after step(), which was done again": Program(after="data", fault="kill_updated"),
    "a weight changed after step(), in each micro-batch": Program(after="clamp", micro=2),
    "renormalised weights in each micro-batch, by rounding": Program(after="renorm", micro=2),
    "zeros of a micro-batch were taken for a gradient": Program(
        blocks=("late",), optimizer="momentum", zero="keep", micro=2
    ),
    "a sum over samples was called none": Program(loss="sum_declared", samples=17, check="every_step"),
    "a sum over a constant was taken for a mean": Program(loss="sum_of_constant", shares=None, check_steps=0),
    "a standard deviation was taken for a mean": Program(loss="spread"),
    "a mean by a mask was told one step late": Program(task="tokens", loss="token_mask", shares=None, check_steps=0),
    "a worker without samples added to a sum of metrics": Program(report="sum", shares=(0.0, 1.0)),
    "a return in the loop's body": Program(early="top"),
    "a user's hook after the gradient": Program(blocks=("post_hook",), workers=3, shares=(2.0, 0.0, 1.0)),
    "numpy's numbers": Program(odd="numpy_sizes"),
}
"""What generated programs have found, by what went wrong."""

LATE = {
    "a buffer of a worker's own samples": Program(buffers=("queue",)),
    "a rate that follows a worker's own loss": Program(odd="local_rate"),
}
"""What can be noticed after it has happened only."""


@pytest.fixture(scope="module")
def pool():
    with Pool() as kept:
        yield kept


def check(pool, program, *kinds):
    verdict = verdict_of(pool.run(program))
    if verdict.kind not in kinds:
        pytest.fail(f"{verdict.kind}: {verdict.detail}\n\n# {program}\n{text_of(program)}", pytrace=False)


@pytest.mark.parametrize("number", NUMBERS)
def test_a_generated_program_trains_as_one_process_or_is_refused_by_name(pool, number):
    check(pool, generate(number), "equal", "refused")


@pytest.mark.parametrize("number", REFUSED)
def test_a_generated_program_that_is_not_supported_is_refused_by_name(pool, number):
    check(pool, generate(number), "refused")


@pytest.mark.parametrize("program", KEPT.values(), ids=KEPT.keys())
def test_what_a_generated_program_once_found_stays_mended(pool, program):
    check(pool, program, "equal", "refused")


@pytest.mark.parametrize("program", LATE.values(), ids=LATE.keys())
def test_replicas_that_come_to_differ_end_the_run_with_names(pool, program):
    check(pool, program, "late", "refused")


def test_numbers_that_are_off_and_steps_that_are_missing_are_seen(pool):
    ran = pool.run(Program(buffers=("mean",)))
    assert verdict_of(ran).kind == "equal"
    note = ran.plain.notes[3]
    off = {**note.state, "buffer mean": note.state["buffer mean"] + 1e-8}
    wrong = dataclasses.replace(note, state=off)
    ran.plain.notes[3] = wrong
    assert verdict_of(ran).kind == "wrong"
    assert "step 3, worker 0: buffer mean" in verdict_of(ran).detail
    ran.plain.notes[3] = note
    ran.notes[-1].bits += "."
    assert "not the same on workers 0, 1" in verdict_of(ran).detail
    ran.notes[-1].bits = ran.notes[-2].bits
    del ran.plain.notes[3]
    assert "steps" in verdict_of(ran).detail


def test_one_number_names_one_program_and_all_choices_come_up():
    programs = [generate(number) for number in range(1500)]
    assert programs[7] == generate(7)
    for field in dataclasses.fields(Program):
        values = {getattr(program, field.name) for program in programs}
        assert len(values) > 1, field.name
    used = {name for program in programs for name in program.blocks + program.buffers}
    assert used == {*BLOCKS, *BUFFERS}
    for program in programs[:200]:
        compile(text_of(program), "<program>", "exec")


def test_a_failing_program_is_shrunk_to_what_it_needs_to_fail():
    def judge(program):
        fails = "shared" in program.blocks and program.micro == 2
        return Verdict(kind="wrong" if fails else "equal")

    large = Program(
        blocks=("residual", "shared", "tied"), buffers=("mean",), optimizer="adam", micro=2, epochs=3, zero="after"
    )
    small, verdict = shrunk(judge, large)
    assert small == Program(blocks=("shared",), micro=2)
    assert verdict.kind == "wrong"


def test_the_reference_is_torch_alone_on_the_whole_batch(pool):
    ran = pool.run(Program(report="sum", epochs=1))
    torch.manual_seed(0)
    assert ran.plain.kind == "result"
    assert len(ran.plain.notes) == 3
    assert [len(parts) for used in ran.used.values() for parts in used.parts] == [6, 2] * 3
