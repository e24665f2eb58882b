"""Evaluations on the hub's side: chunks are handed out, results are added up, and an error is everybody's."""

from __future__ import annotations

from typing import Any

from raytrain_het.membership.merging import exact_sum
from raytrain_het.membership.message_parts import Raise

MAX_EVALUATIONS = 16
"""So many of the last evaluations are remembered, for workers that ask late."""


class EvaluationBook:
    """Hands the chunks of an evaluation out to whoever is free, and adds up the results exactly.

    A chunk given to a worker that dies is given out again. Sums are taken over chunks in their order and exactly, so
    the result depends neither on who computed what nor on when. The first chunk that raises ends the evaluation: all
    that take part are told the same error.
    """

    def __init__(self) -> None:
        self._runs: dict[str, dict[str, Any]] = {}

    def next(
        self,
        key: str,
        num_chunks: int,
        uid: str,
        result: tuple[int, dict[str, float]] | None,
        error: Raise | None = None,
    ) -> dict[str, Any]:
        """Take a finished chunk's result, or what it raised, and give what is to be replied: ``chunk``, ``sums`` or
        ``error``, or nothing yet."""
        if key not in self._runs:
            for old in list(self._runs)[: -MAX_EVALUATIONS + 1]:
                del self._runs[old]
        run = self._runs.setdefault(key, {"results": {}, "given": {}, "num_chunks": num_chunks, "error": None})
        if result is not None:
            chunk, sums = result
            run["results"].setdefault(chunk, sums)
            run["error"] = run["error"] or _other_names(run["results"], chunk)
        run["error"] = run["error"] or error
        self.forget(uid)  # Whoever asks is at no chunk any more, even if an answer to it was lost.
        if run["error"] is not None:
            return {"error": run["error"]}
        if len(run["results"]) >= run["num_chunks"]:
            chunks = [run["results"][c] for c in range(run["num_chunks"])]
            return {"sums": {n: exact_sum(c[n] for c in chunks) for n in chunks[0]}}
        for chunk in range(run["num_chunks"]):
            if chunk not in run["results"] and chunk not in run["given"]:
                run["given"][chunk] = uid
                return {"chunk": chunk}
        return {}

    def forget(self, uid: str) -> None:
        """A worker is at nothing, or gone: its chunks are free again."""
        for run in self._runs.values():
            run["given"] = {c: u for c, u in run["given"].items() if u != uid}


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
