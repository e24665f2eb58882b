"""The settings and the faults of a program's run, and the samples that it has used."""

from __future__ import annotations

from collections.abc import Sequence

from raytrain_het.config import HetConfig
from raytrain_het.testing.faults import Fault
from raytrain_het.testing.programs.plain import Used
from raytrain_het.testing.programs.program import Program
from raytrain_het.testing.programs.traces import StepNote


def config_of(program: Program) -> HetConfig:
    """The settings of a program's run."""
    clip = {"config_norm": {"norm": 0.3}, "config_value": {"value": 0.05}}.get(program.clip)
    return HetConfig(
        shares=program.shares,
        bucket_mib=program.bucket_mib,
        replica_check_steps=program.check_steps,
        clip=clip,
        schedule={"cosine": {"floor": 0.1}} if program.scheduler == "config" else None,
        check=program.check,
        silence_s=10.0,
        hang_limit_s=30.0,
    )


def faults_of(program: Program) -> tuple[Fault, ...]:
    """The faults that happen in a program's run."""
    last = program.workers - 1
    steps = -(-program.samples // program.batch)  # Of an epoch, for most samplers.
    return {
        "kill": (Fault(slot=last, step=3, point="backward"),),
        "kill_first": (Fault(slot=0, step=2, point="between_buckets"),),
        "kill_updated": (Fault(slot=last, step=2, point="updated"),),
        "kill_decoded": (Fault(slot=0, step=4, point="decoded"),),
        "leave": (Fault(slot=last, step=2, point="slice", kind="leave"),),
        "kill_reporting": (Fault(slot=last, step=steps, point="report"),),
        "resume": tuple(Fault(slot=k, step=steps + 2, point="slice", when_stored=True) for k in range(program.workers)),
        "kill_all": tuple(Fault(slot=k, step=5, point="backward") for k in range(program.workers)),
    }.get(program.fault, ())


def used_in(notes: Sequence[StepNote]) -> dict[int, Used]:
    """The samples that each step has used, by member: of several generations the last counts."""
    used: dict[int, Used] = {}
    newest: dict[int, int] = {}
    for note in notes:
        if note.generation > newest.get(note.step, -1):
            newest[note.step] = note.generation
    for note in notes:
        if note.generation == newest[note.step] and note.step not in used:
            places = sorted(note.slices.values())
            parts = tuple(tuple(note.batch[a - note.offset : b - note.offset]) for a, b in places)
            used[note.step] = Used(epoch=note.epoch, parts=parts)
    return used
