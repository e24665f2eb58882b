"""The ledger: which worker used which samples in which step, and a check that every sample was used exactly once.

Each member writes a line for each committed step into a file of its own. The check reads the files of all members, dead
ones included. Offsets are positions in the epoch's permutation (see `raytrain_het.worker.data.data_plan`).
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from raytrain_het.membership.cursor import Cursor
from raytrain_het.worker.data.data_plan import DataPlan


@dataclass(frozen=True, kw_only=True)
class LedgerEntry:
    """One member's account of one committed step."""

    step: int
    """The cursor's step when the step was opened: the first step is 0."""

    generation: int
    """The generation that committed it. A step that was done again has entries of several generations; the highest
    counts."""

    epoch: int
    offset: int
    """Where the global batch begins in the epoch's permutation."""

    batch_size: int
    """Samples in the global batch: below the plan's in an epoch's last step."""

    slices: Mapping[str, Sequence[int]]
    """Every member's part of the global batch, as (start, stop) offsets in the epoch's permutation, by uid."""

    writer: str
    """The uid of the member that wrote this entry."""

    own_samples: Sequence[int] | None = None
    """Dataset indices that the writer trained on, in order, if it noted them."""

    def __post_init__(self) -> None:
        # Lists and numpy's integers are converted: an entry is equal to the one that is read back.
        slices = {uid: (int(start), int(stop)) for uid, (start, stop) in self.slices.items()}
        object.__setattr__(self, "slices", slices)
        if self.own_samples is not None:
            object.__setattr__(self, "own_samples", tuple(int(index) for index in self.own_samples))

    def to_json(self) -> str:
        """One line, without its end."""
        return json.dumps(dataclasses.asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, line: str) -> LedgerEntry:
        """The entry that `to_json` wrote.

        Raises:
            ValueError: this is not such a line.
        """
        fields = json.loads(line)
        try:
            return cls(**fields)
        except (TypeError, AttributeError) as error:
            raise ValueError(f"not a ledger entry ({error!r}): {line[:80]!r}") from error


class LedgerWriter:
    """Appends entries to a file as JSON lines. A line is whole or absent, even if the process is killed right after.

    Args:
        path: the file, named ``*.jsonl``; its folder is made. One writer per file; a file of an earlier process is
            continued, without what that may have left of a torn last line.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            contents = path.read_bytes()
            os.truncate(path, contents.rfind(b"\n") + 1)
        # Unbuffered: a line is one system call, which a kill comes before or after.
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115

    def append(self, entry: LedgerEntry) -> None:
        """Write one entry; it is in the file when this returns."""
        self._file.write(entry.to_json().encode() + b"\n")

    def close(self) -> None:
        """Close the file. May be called twice."""
        self._file.close()


def read_ledgers(directory: str | os.PathLike[str]) -> list[LedgerEntry]:
    """All entries in a folder's ``*.jsonl`` files, by file name, then as written. A torn last line is left out.

    Raises:
        ValueError: a line is not an entry; the message names file and line.
        FileNotFoundError: the folder does not exist.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"no ledger folder at {directory}")
    entries = []
    for path in sorted(directory.glob("*.jsonl")):
        *lines, _torn = path.read_text().split("\n")
        for number, line in enumerate(lines, start=1):
            try:
                entries.append(LedgerEntry.from_json(line))
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}") from error
    return entries


@dataclass(frozen=True, kw_only=True)
class LedgerReport:
    """The figures of a run in which `check_exactly_once` found nothing wrong."""

    num_steps: int
    """Steps, each counted once however often it was done."""

    num_samples: int
    """Samples used in those steps, over all epochs."""

    num_redone_steps: int
    """Steps that more than one generation committed to a ledger."""


class LedgerError(AssertionError):
    """A run lost samples or used some twice, or its members disagree.

    Attributes:
        violations: Pairs (step, what is wrong); the step is -1 for a whole epoch.
    """

    def __init__(self, violations: list[tuple[int, str]]) -> None:
        super().__init__(violations)
        self.violations = violations

    def __str__(self) -> str:
        lines = [f"step {step}: {what}" if step >= 0 else what for step, what in self.violations[:5]]
        if len(self.violations) > 5:
            lines.append(f"and {len(self.violations) - 5} more")
        return f"the ledger has {len(self.violations)} violation(s):\n  " + "\n  ".join(lines)


def check_exactly_once(entries: Iterable[LedgerEntry], plan: DataPlan, *, epochs: int) -> LedgerReport:
    """Check that a run of ``epochs`` whole epochs from step 0 used every sample exactly once an epoch.

    Of a step with several generations the highest counts. The checks:

    - steps are consecutive from 0 and are those of the plan: none is lost, none is beyond the end;
    - all writers of one (step, generation) have written the same global batch and slices;
    - the slices that count tile their global batch, without gap and overlap;
    - a writer has trained on the samples of its slice;
    - in an epoch every sample is used once; with ``drop_last`` the remainder is not used.

    Args:
        entries: The entries of all members, in any order.
        plan: The run's order of samples.
        epochs: How many epochs the run was to do.

    Raises:
        LedgerError: A check fails; the message has up to 5 places.
    """
    by_step: dict[int, dict[int, list[LedgerEntry]]] = defaultdict(lambda: defaultdict(list))
    for entry in entries:
        by_step[entry.step][entry.generation].append(entry)
    num_redone = sum(len(generations) > 1 for generations in by_step.values())
    violations: list[tuple[int, str]] = []
    num_samples = 0

    cursor = Cursor()
    for epoch in range(epochs):
        num_uses = np.zeros(plan.dataset_size, dtype=np.int64)
        while not plan.is_epoch_end(cursor):
            generations = by_step.pop(cursor.step, None)
            if generations is None:
                violations.append((cursor.step, f"lost: nobody wrote it (epoch {epoch}, offset {cursor.offset})"))
            else:
                violations += _check_step(generations, plan, cursor)
                for start, stop in generations[max(generations)][0].slices.values():
                    np.add.at(num_uses, plan.permutation(epoch)[max(start, 0) : stop], 1)
            cursor = plan.advance(cursor)
        violations += _check_uses(num_uses, plan, epoch, cursor.offset)
        num_samples += int(num_uses.sum())
        cursor = plan.next_epoch(cursor)
    violations += [(step, f"beyond the end of the run, which has {cursor.step} steps") for step in sorted(by_step)]
    if violations:
        raise LedgerError(violations)
    return LedgerReport(num_steps=cursor.step, num_samples=num_samples, num_redone_steps=num_redone)


def _check_step(
    generations: Mapping[int, list[LedgerEntry]], plan: DataPlan, cursor: Cursor
) -> Iterator[tuple[int, str]]:
    step = cursor.step
    for generation, accounts in sorted(generations.items()):
        first = accounts[0]
        for other in accounts[1:]:
            if _shared_part(other) != _shared_part(first):
                yield step, f"generation {generation}: {first.writer} and {other.writer} tell different things"

    counting = generations[max(generations)]
    entry, batch = counting[0], plan.batch_at(cursor)
    told, expected = (entry.epoch, entry.offset, entry.batch_size), (cursor.epoch, batch.start, len(batch))
    if told != expected:
        yield step, f"(epoch, offset, batch_size) is {told}, by the plan {expected}"
    position = entry.offset
    for uid, (start, stop) in sorted(entry.slices.items(), key=lambda item: tuple(item[1])):
        if start != position or stop < start:
            yield step, f"the slice [{start}, {stop}) of {uid} does not follow on {position}"
        position = stop
    if position != entry.offset + entry.batch_size:
        yield step, f"the slices end at {position}, the global batch at {entry.offset + entry.batch_size}"

    for account in counting:
        if account.writer not in account.slices:
            yield step, f"{account.writer} wrote an entry but has no slice"
        elif account.own_samples is not None:
            start, stop = account.slices[account.writer]
            expected_samples = plan.permutation(cursor.epoch)[max(start, 0) : stop].tolist()
            if list(account.own_samples) != expected_samples:
                yield (
                    step,
                    (
                        f"{account.writer} trained on {_some(account.own_samples)}, "
                        f"its slice [{start}, {stop}) is {_some(expected_samples)}"
                    ),
                )


def _shared_part(entry: LedgerEntry) -> tuple[object, ...]:
    return entry.epoch, entry.offset, entry.batch_size, entry.slices


def _check_uses(num_uses: np.ndarray, plan: DataPlan, epoch: int, num_used: int) -> Iterator[tuple[int, str]]:
    due = np.zeros_like(num_uses)
    np.add.at(due, plan.permutation(epoch)[:num_used], 1)  # A sampler may give a sample several times.
    for what, wrong in (("never", num_uses < due), ("too often", num_uses > due)):
        if wrong.any():
            samples = np.flatnonzero(wrong).tolist()
            yield -1, f"epoch {epoch}: {len(samples)} sample(s) were used {what}: {_some(samples)}"


def _some(samples: Sequence[int]) -> str:
    return f"{list(samples)}" if len(samples) <= 8 else f"[{', '.join(map(str, samples[:8]))}, ...]"
