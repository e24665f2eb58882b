"""Evaluations on the hub's side: chunks are handed out, results are added up, and an error is everybody's."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

from raytrain_het.membership.merging import exact_sum
from raytrain_het.membership.message_parts import Raise
from raytrain_het.membership.protocol import Evaluate, Reply

MAX_EVALUATIONS = 4096
"""So many of the last evaluations are remembered, for workers that ask late; of those that are over, the sums."""


@dataclass
class _Evaluation:
    num_chunks: int
    free: list[int]
    """Chunks that nobody computes, a heap."""
    results: dict[int, dict[str, float]] = field(default_factory=dict)
    """By chunk, sums over its samples."""
    given: dict[str, int] = field(default_factory=dict)
    """By uid of the worker that computes it, a chunk."""
    waiting: dict[str, int] = field(default_factory=dict)
    """By uid of a worker that has asked in vain, the number of its request."""
    away: dict[str, int] = field(default_factory=dict)
    """The same for workers that are suspended: they are answered when they are back."""
    sums: dict[str, float] = field(default_factory=dict)
    """Once all chunks are done."""
    is_over: bool = False
    error: Raise | None = None

    def answer(self, uid: str, number: int) -> Reply | None:
        """What there is to say to a worker; None if that is nothing yet."""
        if self.error is not None:
            return Reply(id=number, error=self.error)
        if not self.is_over and len(self.results) >= self.num_chunks:
            chunks = [self.results[c] for c in range(self.num_chunks)]
            self.sums = {name: exact_sum(c[name] for c in chunks) for name in chunks[0]}
            self.is_over, self.free = True, []
            self.results.clear()
        if self.is_over:
            return Reply(id=number, sums=self.sums)
        while self.free:
            chunk = heapq.heappop(self.free)
            if chunk not in self.results:
                self.given[uid] = chunk
                return Reply(id=number, chunk=chunk)
        return None


class ChunkDealer:
    """Hands the chunks of an evaluation out to whoever is free, and adds up the results exactly.

    Who asks when there is nothing to say is answered when there is. A chunk given to a worker that dies is given out
    again. Sums are taken over chunks in their order and exactly, so the result depends neither on who computed what nor
    on when. The first chunk that raises ends the evaluation: all that take part are told the same error.
    """

    def __init__(self) -> None:
        self._evaluations: dict[str, _Evaluation] = {}

    def hear(self, key: str, uid: str, question: Evaluate) -> list[tuple[str, Reply]]:
        """Take what a worker has found in a chunk, or what it raised, and see what there is to say to whom.

        Args:
            key: names the evaluation, in all of the run's lives.
            uid: the worker's.
            question: its message.

        Returns:
            By uid: a chunk, the sums once all chunks are done, or the error that has ended the evaluation.
        """
        if key not in self._evaluations:
            for old in list(self._evaluations)[: -MAX_EVALUATIONS + 1]:
                del self._evaluations[old]
            size = question.num_chunks
            self._evaluations[key] = _Evaluation(size, list(range(size)))
        now = self._evaluations[key]
        if question.result is not None and not now.is_over:
            chunk, sums = question.result
            now.results.setdefault(chunk, sums)
            now.error = now.error or _other_names(now.results, chunk)
        now.error = now.error or question.error
        replies = self.forget(uid)  # A worker that asks is at no chunk any more, even if an answer to it was lost.
        now.waiting[uid] = question.id
        return replies + _replies(now)

    def suspend(self, uid: str) -> list[tuple[str, Reply]]:
        """A worker does not answer: its chunks are free again, and what it waits for it gets when it is back."""
        for evaluation in self._evaluations.values():
            if (number := evaluation.waiting.pop(uid, None)) is not None:
                evaluation.away[uid] = number
        return self._free(uid)

    def came_back(self, uid: str) -> list[tuple[str, Reply]]:
        """A suspended worker is heard again: it may still wait for what it has asked."""
        replies = []
        for evaluation in self._evaluations.values():
            if (number := evaluation.away.pop(uid, None)) is not None:
                evaluation.waiting[uid] = number
                replies += _replies(evaluation)
        return replies

    def forget(self, uid: str) -> list[tuple[str, Reply]]:
        """A worker is at nothing, or gone: its chunks are free again, and given to those that wait for one."""
        for evaluation in self._evaluations.values():
            evaluation.waiting.pop(uid, None)
            evaluation.away.pop(uid, None)
        return self._free(uid)

    def _free(self, uid: str) -> list[tuple[str, Reply]]:
        replies = []
        for evaluation in self._evaluations.values():
            chunk = evaluation.given.pop(uid, None)
            if chunk is not None and chunk not in evaluation.results and not evaluation.is_over:
                heapq.heappush(evaluation.free, chunk)
                replies += _replies(evaluation)
        return replies


def _replies(now: _Evaluation) -> list[tuple[str, Reply]]:
    """Answers to all that wait, as far as there is something to say."""
    replies = []
    for uid, number in list(now.waiting.items()):
        reply = now.answer(uid, number)
        if reply is None:
            break
        del now.waiting[uid]
        replies.append((uid, reply))
    return replies


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
