"""A worker's part in evaluations: chunks are taken by whoever is free, and every worker gets the same sums."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from raytrain_het.errors import ConfigError, ForeignError
from raytrain_het.membership.agent import MemberAgent
from raytrain_het.membership.message_parts import Raise
from raytrain_het.membership.protocol import Evaluate
from raytrain_het.worker.checks.call_site import call_site
from raytrain_het.worker.state.last_words import packed, traceback_of, unpacked


class Evaluations:
    """Tells the evaluations that one worker makes after one step apart.

    By the line that asks for it, and by its size: one that only some workers ask for is done by these alone.
    """

    def __init__(self) -> None:
        self._made: dict[str, int] = {}

    @property
    def any(self) -> bool:
        """Whether one was made since the last step."""
        return bool(self._made)

    def sums(
        self,
        agent: MemberAgent,
        step: int,
        name: str,
        num_chunks: int,
        run_chunk: Callable[[int], dict[str, float]],
        under: str = "",
    ) -> dict[str, float]:
        """Sums over all chunks, those that other workers computed included.

        ``under`` is the generation of a step that is open, which may be done again.

        Raises:
            Exception: what a chunk has raised, on whichever worker: the same on all that take part.
        """
        site = call_site()
        base = f"{step}/{under}/{name}/{site.key}/{num_chunks}"
        self._made = {k: v for k, v in self._made.items() if k.startswith(f"{step}/")}
        ordinal = self._made[base] = self._made.get(base, -1) + 1
        # What tells functions and data apart follows the user's name, in brackets.
        key, where = f"{base}/{ordinal}", f"evaluate({name.partition(' (')[0]!r}) at {site.where}, step {step}"
        result: tuple[int, dict[str, float]] | None = None
        raised: Exception | None = None
        with agent.doing.call("evaluate", f"in {where}"):
            while True:
                error = None if raised is None else _told(agent, raised)
                answer = agent.request(Evaluate(key=key, num_chunks=num_chunks, result=result, error=error))
                if answer is None:
                    continue  # The hub was restarted: offer the same result to the new one.
                result = None
                if answer.error is not None:
                    raise self._error(answer.error, agent, raised, where)
                if answer.sums is not None:
                    return answer.sums
                if answer.chunk is not None:
                    chunk = answer.chunk
                    with agent.doing.call("evaluate", f"in {where}, computing chunk {chunk + 1} of {num_chunks}"):
                        try:
                            result = (chunk, run_chunk(chunk))
                        except Exception as problem:
                            raised = problem

    @staticmethod
    def _error(told: Raise, agent: MemberAgent, own: Exception | None, where: str) -> BaseException:
        """What all raise: the exception itself where it can be sent, so that one ``except`` does for all."""
        if told.uid is None:
            return ConfigError(told.text)
        mine = own is not None and told.uid == agent.uid
        if mine and told.pickled is not None:
            assert own is not None
            return own
        cause = ForeignError(f"{where} raised on worker {told.slot}, and so it raises on all:\n{told.text}")
        error = unpacked(told.pickled) or cause
        if error is not cause or mine:
            error.__cause__ = own if mine else cause
        return error


def _told(agent: MemberAgent, error: Exception) -> Raise:
    return Raise(uid=agent.uid, slot=agent.member.slot, text=traceback_of(error), pickled=packed(error))


def describe(fn: Any) -> str:
    """Tells the functions of evaluations apart, the same on every worker: name and line."""
    code = getattr(fn, "__code__", None)
    where = f" in line {code.co_firstlineno}" if code is not None else ""
    return f"{getattr(fn, '__qualname__', type(fn).__qualname__)}{where}"
