"""A worker's part in evaluations: chunks are taken by whoever is free, and every worker gets the same sums."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from raytrain_het.errors import ConfigError
from raytrain_het.membership.agent import Impatience, MemberAgent


class Evaluations:
    """Tells the evaluations that one worker makes after one step apart."""

    def __init__(self) -> None:
        self._made: dict[str, int] = {}

    def sums(
        self, agent: MemberAgent, step: int, name: str, num_chunks: int,
        run_chunk: Callable[[int], dict[str, float]],
    ) -> dict[str, float]:  # fmt: skip
        """Sums over all chunks, those that other workers computed included."""
        base = f"{step}/{name}"
        self._made = {k: v for k, v in self._made.items() if k.startswith(f"{step}/")}
        ordinal = self._made[base] = self._made.get(base, -1) + 1
        result: list[Any] | None = None
        impatience = Impatience(agent)
        while True:
            answer = agent.request("evaluate", key=f"{base}/{ordinal}", num_chunks=num_chunks, result=result)
            if answer is None:
                continue  # The hub was restarted: offer the same result to the new one.
            result = None
            if "sums" in answer:
                return answer["sums"]
            if "chunk" in answer:
                result = [answer["chunk"], run_chunk(answer["chunk"])]
                impatience = Impatience(agent)
            else:
                impatience.tell()
                agent.wait_for(lambda: False, timeout=0.005)


def checked_sums(value: Any) -> dict[str, float]:
    """What the function of an evaluation returned for a chunk, as plain numbers.

    Raises:
        ConfigError: it is no dictionary of single numbers.
    """
    try:
        return {str(name): float(number) for name, number in value.items()}
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise ConfigError(
            f"evaluate(fn, ...): fn returned {value!r:.200} for a batch: allowed is a dictionary of single numbers, "
            "each the sum over the batch's samples. Return {'loss': loss.sum()}, for example."
        ) from error


def describe(fn: Any) -> str:
    """Tells the functions of evaluations apart, the same on every worker: name and line."""
    code = getattr(fn, "__code__", None)
    where = f" in line {code.co_firstlineno}" if code is not None else ""
    return f"{getattr(fn, '__qualname__', type(fn).__qualname__)}{where}"
