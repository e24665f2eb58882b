"""Ctrl-C and SIGTERM: one exception for every way in which a signal ends a run."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Interrupted(Exception):
    """The run was ended by a signal.

    Args:
        exit_code: The exit status of the process: 128 plus the signal's number.

    Attributes:
        hint: How to resume the run, if it has a checkpoint.
    """

    hint: str = ""

    def __init__(self, exit_code: int) -> None:
        super().__init__(exit_code)
        self.exit_code = exit_code


_terminated = threading.Event()


def restore_sigterm() -> None:
    """Replace the SIGTERM handler of Ray's C++ code by Python's own, which was there before.

    Ray's handler prints the stack of every thread, and aborts the process three seconds later even if it is still
    cleaning up.
    """
    before = signal.getsignal(signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread() or before is None:
        return

    def handler(number: int, frame: Any) -> None:
        _terminated.set()
        if callable(before):
            before(number, frame)
        sys.exit(number)

    signal.signal(signal.SIGTERM, handler)


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise ``Interrupted`` for every way in which a signal ends the block.

    While Ray Train runs, its own handler aborts the controller and calls ``sys.exit(0)``; Ray's handler for SIGTERM
    calls ``sys.exit(15)``.
    """
    _terminated.clear()
    in_main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT) if in_main else None
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(128 + signal.SIGINT) from None
    except SystemExit as leave:
        # Ray's handler for Ctrl-C, and `ray.get`, exit with 0 or 1, which says nothing about the signal.
        by_sigterm = leave.code == signal.SIGTERM or _terminated.is_set()
        raise Interrupted(128 + (signal.SIGTERM if by_sigterm else signal.SIGINT)) from None
    finally:
        if in_main:
            signal.signal(signal.SIGINT, before)
