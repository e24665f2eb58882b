"""Evaluations on the hub's side: chunks are handed out, results are added up, and an error is everybody's."""

from __future__ import annotations

from dataclasses import dataclass, field

from raytrain_het.membership.merging import exact_sum
from raytrain_het.membership.message_parts import Raise
from raytrain_het.membership.protocol import Evaluate, Reply

MAX_EVALUATIONS = 16
"""So many of the last evaluations are remembered, for workers that ask late."""


@dataclass
class _Evaluation:
    num_chunks: int
    results: dict[int, dict[str, float]] = field(default_factory=dict)
    """By chunk, sums over its samples."""
    given: dict[int, str] = field(default_factory=dict)
    """By chunk, the uid of the worker that computes it."""
    error: Raise | None = None


class ChunkDealer:
    """Hands the chunks of an evaluation out to whoever is free, and adds up the results exactly.

    A chunk given to a worker that dies is given out again. Sums are taken over chunks in their order and exactly, so
    the result depends neither on who computed what nor on when. The first chunk that raises ends the evaluation: all
    that take part are told the same error.
    """

    def __init__(self) -> None:
        self._evaluations: dict[str, _Evaluation] = {}

    def next(self, key: str, uid: str, question: Evaluate) -> Reply:
        """Take what a worker has found in a chunk, or what it raised, and give it the next chunk to compute.

        Args:
            key: names the evaluation, in all of the run's lives.
            uid: the worker's.
            question: its message.

        Returns:
            A chunk, the sums once all chunks are done, the error that has ended the evaluation, or nothing yet.
        """
        if key not in self._evaluations:
            for old in list(self._evaluations)[: -MAX_EVALUATIONS + 1]:
                del self._evaluations[old]
        now = self._evaluations.setdefault(key, _Evaluation(question.num_chunks))
        if question.result is not None:
            chunk, sums = question.result
            now.results.setdefault(chunk, sums)
            now.error = now.error or _other_names(now.results, chunk)
        now.error = now.error or question.error
        self.forget(uid)  # A worker that asks is at no chunk any more, even if an answer to it was lost.
        if now.error is not None:
            return Reply(id=question.id, error=now.error)
        if len(now.results) >= now.num_chunks:
            chunks = [now.results[c] for c in range(now.num_chunks)]
            return Reply(id=question.id, sums={n: exact_sum(c[n] for c in chunks) for n in chunks[0]})
        for chunk in range(now.num_chunks):
            if chunk not in now.results and chunk not in now.given:
                now.given[chunk] = uid
                return Reply(id=question.id, chunk=chunk)
        return Reply(id=question.id)

    def forget(self, uid: str) -> None:
        """A worker is at nothing, or gone: its chunks are free again."""
        for evaluation in self._evaluations.values():
            evaluation.given = {c: u for c, u in evaluation.given.items() if u != uid}


def _other_names(results: dict[int, dict[str, float]], chunk: int) -> Raise | None:
    """An error where a chunk has other metrics than those before it: a sum over some chunks is no sum."""
    first = next(iter(results))
    if results[first].keys() == results[chunk].keys():
        return None
    text = (
        f"evaluate(): fn returned the metrics {sorted(results[chunk])} for chunk {chunk}, and {sorted(results[first])} "
        f"for chunk {first}. Return the same names for every batch, with 0.0 where there is nothing to add."
    )
    return Raise(uid=None, text=text)
