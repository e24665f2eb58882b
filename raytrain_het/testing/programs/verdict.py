"""Whether a program's run is right: the same numbers as one process, or an error by name before anything was wrong."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from raytrain_het.testing.ledger import LedgerError, check_exactly_once
from raytrain_het.testing.programs.comparing import TOLERANCE, differences, error_of, same_bits
from raytrain_het.testing.programs.expected import refusals_of
from raytrain_het.testing.programs.pool import Ran
from raytrain_het.testing.programs.program import Program
from raytrain_het.testing.programs.text_loss import UNDECLARED
from raytrain_het.testing.programs.traces import Outcome
from raytrain_het.worker.data.data_plan import DataPlan

GOOD = ("equal", "refused")
VERDICTS = (*GOOD, "late", "wrong", "hang", "internal", "misnamed")
"""Allowed are ``equal`` (the same numbers as one process) and ``refused`` (an error of raytrain_het's own that names
what the program does).

Not allowed are ``late`` (replicas differed, and only steps later the check of them raised an error with names),
``wrong`` (other numbers than one process without an error, or with one long after), ``hang`` (the run did not end in
time), ``internal`` (any other error), and ``misnamed`` (an error of raytrain_het's own for a program that it should
run, or one that names something else than the program does)."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The judgement on a program's run."""

    kind: str
    detail: str = ""

    @property
    def good(self) -> bool:
        """Whether the run is right."""
        return self.kind in GOOD

    @property
    def key(self) -> str:
        """A text that is the same for failures that look alike."""
        text = re.sub(r"\d+(\.\d+)?(e-?\d+)?", "#", self.detail.split("\n")[0])
        return f"{self.kind}: {text[:160]}"


def verdict_of(ran: Ran) -> Verdict:
    """Judge one run."""
    verdict = _verdict_of(ran)
    if verdict.kind in ("wrong", "late") and ran.program.loss in UNDECLARED:
        return Verdict(kind=verdict.kind, detail=f"undeclared loss {ran.program.loss}: {verdict.detail}")
    return verdict


def _verdict_of(ran: Ran) -> Verdict:
    program = ran.program
    if ran.hang:
        return Verdict(kind="hang", detail=ran.hang)
    if ran.plain.error == "the reference did not end":
        return Verdict(kind="internal", detail="the reference did not end")
    errors = {slot: o for slot, o in ran.outcomes.items() if o.kind == "error"}
    wrong = next(_differences_of_steps(ran), None)
    if not errors:
        if ran.failure:
            return Verdict(kind="internal", detail=f"the hub: {ran.failure}")
        return _of_results(ran, wrong)
    # The workers that did not raise learn of the error from the hub.
    if ran.plain.kind == "error" and any(ran.plain.error_class in (o.error_class + o.error) for o in errors.values()):
        return Verdict(kind="equal", detail=f"both raise {ran.plain.error}")
    own = {slot: o for slot, o in errors.items() if not o.refused}
    if own:
        slot, outcome = next(iter(own.items()))
        if program.odd in ("raise_on_one", "evaluate_raises") and outcome.error_class == "OwnError":
            return Verdict(kind="equal", detail="one raises, all hear of it")
        return Verdict(kind="internal", detail=f"{_line(outcome.error)} (worker {slot})\n{outcome.traceback}")
    first = next((o for o in errors.values() if o.error_class != "RunFailedError"), next(iter(errors.values())))
    text = _line(first.error)
    if wrong is not None and first.error_class == "ReplicaMismatchError":
        return Verdict(kind="late", detail=f"{wrong}; then {text}")
    if wrong is not None and not program.random_passes:
        return Verdict(kind="wrong", detail=f"{wrong}; then it was refused: {text}")
    if ran.plain.kind == "error":
        return Verdict(kind="refused", detail=f"{text}; torch alone raises {_line(ran.plain.error)}")
    if not any(re.search(pattern, first.error, re.I) for pattern in refusals_of(program)):
        return Verdict(kind="misnamed", detail=f"{text}\n{first.traceback}")
    return Verdict(kind="refused", detail=text)


def _line(error: str) -> str:
    return " ".join(error.split())[:300]


def _of_results(ran: Ran, wrong: str | None) -> Verdict:
    program, plain = ran.program, ran.plain
    results = {slot: o for slot, o in ran.outcomes.items() if o.kind == "result"}
    if program.odd == "return_on_one":  # The others go on without it.
        results.pop(program.workers - 1, None)
    if not results:
        return Verdict(kind="internal", detail=f"nobody came to the end: {[o.error for o in ran.outcomes.values()]}")
    if plain.kind == "error":
        if program.random_passes:
            return Verdict(kind="equal")
        return Verdict(
            kind="wrong", detail=f"torch alone raises {_line(plain.error)}, the run does not\n{plain.traceback}"
        )
    problems = [
        *([wrong] if wrong is not None else []),
        *_steps(ran),
        *_orders(ran),
        *_replicas(ran),
        *_ends(ran, results),
        *_values(ran, results),
        *_reports(ran),
    ]
    return Verdict(kind="wrong", detail="\n".join(problems)) if problems else Verdict(kind="equal")


def _counting(ran: Ran) -> dict[int, list[Any]]:
    """The notes of each step, of the generation that counts."""
    steps: dict[int, list[Any]] = {}
    for note in ran.notes:
        there = steps.setdefault(note.step, [])
        if there and there[0].generation < note.generation:
            there.clear()
        there.append(note)
    return steps


def _differences_of_steps(ran: Ran) -> Iterator[str]:
    """Where a worker's state after a step is not that of one process."""
    if ran.program.random_passes:
        for step, notes in _counting(ran).items():
            for note in notes:
                numbers = {n: v for n, v in note.state.items() if isinstance(v, torch.Tensor)}
                bad = [n for n, v in numbers.items() if n != "buffer absent" and v.isnan().any()]  # One that began so.
                if bad:
                    yield f"step {step}, worker {note.slot}: {bad[0]} is not a number"
        return
    expected: dict[int, Any] = {}
    for note in ran.plain.notes:
        expected.setdefault(note.step, note)  # The first, where a program makes several of one batch.
    for step, notes in sorted(_counting(ran).items()):
        if step not in expected:
            continue
        for note in notes:
            for name, text in differences(note.state, expected[step].state):
                yield f"step {step}, worker {note.slot}: {name} {text}"


def _steps(ran: Ran) -> Iterator[str]:
    made, due = sorted(_counting(ran)), [note.step for note in ran.plain.notes]
    if made != due and not ran.program.random_passes:
        yield f"steps {made[:12]} were made, with torch alone {due[:12]}"


def _orders(ran: Ran) -> Iterator[str]:
    program = ran.program
    yield from ran.plain.complaints[:1]
    for step, notes in _counting(ran).items():
        for note in notes:
            start, stop = (k - note.offset for k in note.slices[note.uid])
            if note.batch != notes[0].batch or note.own != note.batch[start:stop]:
                yield f"step {step}: worker {note.slot} trained on {note.own}, no part of {notes[0].batch}"
    whole = program.early == "none" and program.odd == "none"
    if program.sampler in ("shuffle", "plain") and whole:
        plan = DataPlan(
            dataset_size=program.samples,
            global_batch_size=program.batch,
            shuffle=program.sampler == "shuffle",
            drop_last=program.drop_last,
            seed=0,
        )
        try:
            check_exactly_once(ran.ledger, plan, epochs=program.epochs)
        except LedgerError as error:
            yield str(error)
    by_epoch: dict[int, list[int]] = {}
    for _, used in sorted(ran.used.items()):
        by_epoch.setdefault(used.epoch, []).extend(index for part in used.parts for index in part)
    for epoch, indices in by_epoch.items():
        if text := _order(program, epoch, indices):
            yield f"epoch {epoch}: the order {indices} {text}"


def _order(program: Program, epoch: int, indices: list[int]) -> str:
    """What is wrong with an epoch's order of samples; nothing if it may be that of the program's sampler."""
    n, whole = program.samples, program.early == "none" and program.odd == "none" and not program.drop_last
    exact = {
        "reversed": list(range(n))[::-1],
        "own": list(range(n - 1, 1, -1)),
        "own_subclass": sorted(range(n), key=lambda k: (k % 5, k)),
        "set_epoch": [(k + 5 * epoch) % n for k in range(n)],
        "batches": list(range(n)),
        "set_by_hand": [(k + 3 * epoch) % n for k in range(n)],
        "longer": list(range(min(n, 13 + 8 * epoch))),
        "own_batches": [k for start in range(4) for k in range(start, n, 4)],
    }.get(program.sampler)
    if exact is not None and indices != exact[: len(indices)]:
        return f"is not the sampler's {exact}"
    if program.sampler == "weighted" and any(k % 3 == 0 for k in indices):
        return "has samples of weight 0"
    if program.sampler == "subset_random" and any(k % 2 for k in indices):
        return "has samples that are not in the subset"
    distinct = program.sampler not in ("weighted", "replacement")
    if distinct and len(set(indices)) < len(indices):
        return "has samples twice"
    count = {"weighted": n - 3, "replacement": n - 3, "fewer": n - 3, "subset_random": -(-n // 2), "own": n - 2}
    count["longer"] = min(n, 13 + 8 * epoch)
    if whole and len(indices) != count.get(program.sampler, n):
        return f"has not the length {count.get(program.sampler, n)}"
    return ""


def _replicas(ran: Ran) -> Iterator[str]:
    for step, notes in sorted(_counting(ran).items()):
        for note in notes[1:]:
            if note.bits == notes[0].bits:
                continue
            names = [n for n, v in notes[0].state.items() if not same_bits(v, note.state.get(n))]
            yield f"step {step}: {names[:1] or note.state.keys()} not the same on workers {notes[0].slot}, {note.slot}"
            return


def _ends(ran: Ran, results: dict[int, Outcome]) -> Iterator[str]:
    if ran.program.random_passes:
        return
    for slot, outcome in results.items():
        for name, text in differences(outcome.final, ran.plain.final):
            yield f"at the end, worker {slot}: {name} {text}"
            break


def _values(ran: Ran, results: dict[int, Outcome]) -> Iterator[str]:
    if ran.program.random_passes or (ran.fault_happened and ran.program.keep != "none"):
        return
    for slot, outcome in results.items():
        expected = ran.plain.value
        if not isinstance(outcome.value, dict) or not isinstance(expected, dict):
            yield f"worker {slot} returned {outcome.value!r}, with torch alone {expected!r}"
            continue
        for key, value in expected.items():
            if key not in outcome.value:
                if not ran.fault_happened:  # A refilled worker has not seen what was before it came.
                    yield f"worker {slot} did not see {key}"
            elif not (error := error_of(outcome.value[key], value)) < TOLERANCE:
                yield f"worker {slot} saw {key} = {outcome.value[key]}, with torch alone {value}: off by {error:.2g}"


def _reports(ran: Ran) -> Iterator[str]:
    program = ran.program
    if program.random_passes or program.report == "none":
        return
    got = [r["metrics"] for r in sorted(ran.reports, key=lambda r: (r["step"], r["seq"]))]
    expected = [r["metrics"] for r in ran.plain.reports]
    if ran.fault_happened and (len(got) != len(expected) or program.report == "sum"):
        return  # All may have begun again from a checkpoint; and a step done again counts twice in the body's sums.
    if len(got) != len(expected):
        yield f"{len(got)} reports, with torch alone {len(expected)}"
        return
    for ours, theirs in zip(got, expected, strict=True):
        for name, value in theirs.items():
            if not error_of(ours.get(name), value) < TOLERANCE:
                yield f"the report says {name} = {ours.get(name)}, with torch alone {value}"
                return
