"""What a worker tells of its steps, and what it keeps of them."""

from __future__ import annotations

from typing import Any

import pytest

from raytrain_het.training import timings
from raytrain_het.training.timings import NUM_FIRST, NUM_WORTH_KEEPING, Timings


class Agent:
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.steps: list[list[Any]] = []

    def tell(self, kind: str, *, global_batch_size: int, steps: list[Any]) -> None:
        self.steps += steps


def test_a_stand_in_is_told_of_and_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timings, "INTERVAL_S", 0.0)
    agent = Agent()
    worker = Timings(agent, 100)  # type: ignore[arg-type]
    for _ in range(NUM_FIRST + NUM_WORTH_KEEPING):
        worker.step_done(2, 0.5, 1.5, stand_in=True)
    assert agent.steps == [(2, 1.0, 1.5)] * NUM_WORTH_KEEPING
    assert worker.learnt(None) is None
    for _ in range(NUM_WORTH_KEEPING):
        worker.step_done(10, 0.5, 1.5)
    learnt = worker.learnt(None)
    assert learnt is not None
    assert learnt.step_s(10) == pytest.approx(1.0)
