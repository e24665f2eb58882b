"""A worker that cannot be started again costs the others nothing, whatever the reason."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from ray.exceptions import OutOfMemoryError, RaySystemError, RuntimeEnvSetupError

from raytrain_het.ray_train.slots import Slot, SlotState
from raytrain_het.ray_train.worker_group import HetWorkerGroup

WHY = [RuntimeEnvSetupError("pip install has failed"), RaySystemError("GCS"), OutOfMemoryError("full"), OSError("gone")]


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses before each start that was begun."""
    delays: list[float] = []

    def begin(slot: Slot, plan: Any, *, delay_s: float = 0.0) -> None:
        slot.state = SlotState.STARTING
        delays.append(delay_s)

    monkeypatch.setattr(Slot, "begin", begin)
    return delays


def group(*states: SlotState) -> Any:
    group = HetWorkerGroup.__new__(HetWorkerGroup)
    group.slots = [Slot(k, Mock(), state=state) for k, state in enumerate(states)]
    group._errors, group._failing_since, group._plan = {}, None, Mock()
    group._hub = Mock(status={})
    return group


def failed(slot: Slot, error: BaseException) -> None:
    """Its start has failed."""
    slot.start = SimpleNamespace(done=True, worker=None, error=error, placed=True)  # type: ignore[assignment]


@pytest.mark.parametrize("error", WHY, ids=lambda e: type(e).__name__)
def test_a_refill_that_fails_is_tried_again_later_and_later_while_others_train(
    error: Exception, begun: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    its_group = group(SlotState.LIVE, SlotState.STARTING)
    for _ in range(8):
        failed(its_group.slots[1], error)
        its_group._collect_starts()
    assert begun == [2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0, 60.0]
    assert its_group._errors_to_raise() == {}
    (slot, reason), _ = its_group._hub.slot_vacant.call_args
    assert slot == 1 and type(error).__name__ in reason
    assert "The next try is in 2 s; the run goes on without it until then." in caplog.text


def test_where_nobody_trains_yet_a_start_that_fails_ends_the_run_with_its_error(begun: list[float]) -> None:
    its_group = group(SlotState.STARTING, SlotState.STARTING)
    failed(its_group.slots[1], WHY[0])
    its_group._collect_starts()
    assert its_group._errors == {1: WHY[0]} and begun == []
