"""A sweep's time budget: it interrupts the sweep as Ctrl-C does."""

from __future__ import annotations

import os
import signal
import threading

from raytrain_het.errors import ConfigError


class TimeBudget:
    """Sends SIGINT to this process when the block has taken so many seconds, as Ctrl-C does. The sweep can be resumed.

    Args:
        seconds: The budget; None is no limit.

    Attributes:
        is_used_up: Whether the signal was sent.

    Raises:
        ConfigError: This is not the main thread, the only one that receives signals.
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
        # Tune installs its own handler, and removes it at the first Ctrl-C. Before Tune has begun, the signal would
        # reach another handler; after a Ctrl-C by hand, a second signal would break off Tune's clean-up.
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
            self._thread.join()  # Its signal arrives before this returns, or is never sent.
