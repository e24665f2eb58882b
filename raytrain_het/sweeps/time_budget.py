"""The end of a sweep that has had its time."""

from __future__ import annotations

import os
import signal
import threading

from raytrain_het.errors import ConfigError


class TimeBudget:
    """Sends this process what Ctrl-C sends, when the block has taken so many seconds: whatever ends a sweep by hand
    ends it then, and leaves it so that it can go on.

    Args:
        seconds: None is no limit.

    Attributes:
        is_used_up: whether it has.

    Raises:
        ConfigError: this is not the main thread, which alone is told of signals.
    """

    def __init__(self, seconds: float | None) -> None:
        if seconds is not None and threading.current_thread() is not threading.main_thread():
            raise ConfigError(
                f"time_budget_s={seconds:g} is not valid in a thread: only a process's main thread can be interrupted. "
                "Call run_sweep there, or leave it out"
            )
        self.seconds = seconds
        self.is_used_up = False
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._wait, daemon=True)

    def _wait(self) -> None:
        if self._is_over.wait(self.seconds):
            return
        # Tune has a handler of its own until it has been interrupted: once by hand, and a second time would break off
        # its tidying; before it has begun, it would not be its handler that is called.
        while signal.getsignal(signal.SIGINT) is self._before:
            if self._is_over.wait(0.2):
                return
        self.is_used_up = True
        os.kill(os.getpid(), signal.SIGINT)

    def __enter__(self) -> TimeBudget:
        self._before = signal.getsignal(signal.SIGINT)
        if self.seconds is not None:
            self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._is_over.set()
        if self.seconds is not None:
            self._thread.join()  # What it has sent comes now or not at all.
