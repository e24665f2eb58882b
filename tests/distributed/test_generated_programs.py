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
from raytrain_het.testing.programs.verdict import Verdict, verdict_of

NUMBERS = ()

KEPT = {
}

OPEN = {
}


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


@pytest.mark.parametrize("program", KEPT.values(), ids=KEPT.keys())
def test_what_a_generated_program_once_found_stays_mended(pool, program):
    check(pool, program, "equal", "refused")


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
    assert len(used) >= 45
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
