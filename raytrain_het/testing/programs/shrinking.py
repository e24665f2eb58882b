"""From a program that fails to the smallest one that fails alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from raytrain_het.testing.programs.program import Program
from raytrain_het.testing.programs.settling import settled
from raytrain_het.testing.programs.verdict import Verdict

PLAINEST = Program()


def shrunk(judge: Callable[[Program], Verdict], program: Program) -> tuple[Program, Verdict]:
    """Switch features off, one at a time, as long as the verdict is of the same kind; returns what is left."""
    verdict = judge(program)
    if verdict.good:
        return program, verdict
    tried: set[Program] = {program}
    going = True
    while going:
        going = False
        for smaller in _smaller(program):
            if smaller in tried:
                continue
            tried.add(smaller)
            seen = judge(smaller)
            if _alike(seen, verdict):
                program, verdict, going = smaller, seen, True
                break
    return program, verdict


def _alike(one: Verdict, other: Verdict) -> bool:
    if one.kind != other.kind:
        return False
    if one.kind in ("internal", "misnamed"):
        return one.key[:60] == other.key[:60]
    return True


def _smaller(program: Program) -> Iterator[Program]:
    for name in ("blocks", "buffers"):
        for place in range(len(getattr(program, name))):
            rest = list(getattr(program, name))
            del rest[place]
            yield settled(program.but(**{name: tuple(rest)}))
    for name in program.changed():
        if name not in ("blocks", "buffers"):
            yield settled(program.but(**{name: getattr(PLAINEST, name)}))
