"""The end of a sweep that has had its time, with a stand-in for Tune's handler."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from raytrain_het.errors import ConfigError
from raytrain_het.sweeps.time_budget import TimeBudget


@pytest.fixture
def interrupts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Makes the handler, which counts; what was before comes back."""
    before = signal.getsignal(signal.SIGINT)
    heard: list[int] = []
    yield lambda: (signal.signal(signal.SIGINT, lambda number, frame: heard.append(number)), heard)[1]
    signal.signal(signal.SIGINT, before)


def test_it_interrupts_when_the_time_is_used_up(interrupts: Any) -> None:
    with TimeBudget(0.05) as budget:
        heard = interrupts()
        budget._thread.join(10)
    assert heard == [signal.SIGINT] and budget.is_used_up


def test_it_waits_until_somebody_listens(interrupts: Any) -> None:
    with TimeBudget(0.001) as budget:
        budget._thread.join(0.1)
        assert budget._thread.is_alive(), "an interrupt now would break off what comes before the first trial"
        heard = interrupts()
        budget._thread.join(10)
    assert heard == [signal.SIGINT]


def test_after_an_interrupt_by_hand_there_is_no_second_one(interrupts: Any) -> None:
    own = signal.getsignal(signal.SIGINT)
    with TimeBudget(0.05) as budget:
        heard = interrupts()
        signal.signal(signal.SIGINT, own)  # As Tune does when it has been interrupted.
        budget._thread.join(0.5)
        assert budget._thread.is_alive() and not heard
    assert not budget.is_used_up


def test_no_budget_and_time_to_spare_interrupt_nothing(interrupts: Any) -> None:
    for seconds in (None, 100):
        with TimeBudget(seconds) as budget:
            heard = interrupts()
        assert not heard and not budget.is_used_up


def test_outside_the_main_thread_a_budget_is_refused() -> None:
    said: list[str] = []

    def make() -> None:
        TimeBudget(None)
        try:
            TimeBudget(5)
        except ConfigError as error:
            said.append(str(error))

    thread = threading.Thread(target=make)
    thread.start()
    thread.join(10)
    assert "time_budget_s=5 is not valid in a thread" in said[0]
