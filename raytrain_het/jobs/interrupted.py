"""Ctrl-C and SIGTERM: how a run that a signal ends is told from others."""

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
        exit_code: What the process should end with: 128 and the signal's number.

    Attributes:
        hint: How to go on, where there is a checkpoint.
    """

    hint: str = ""

    def __init__(self, exit_code: int) -> None:
        super().__init__(exit_code)
        self.exit_code = exit_code


_terminated = threading.Event()


def take_back_sigterm() -> None:
    """Undo what Ray's C++ code does on SIGTERM: it prints where the process was, a paragraph for each thread, and has
    the process aborted three seconds later, whatever it still tidies up. What Python does with it stays."""
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
    """Turn every way in which a signal ends a run into ``Interrupted``.

    Ray Train puts a handler of its own in place while it runs, which aborts the controller and then
    leaves by ``sys.exit(0)``; Ray's for SIGTERM leaves by ``sys.exit(15)``.
    """
    _terminated.clear()
    in_main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT) if in_main else None
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(128 + signal.SIGINT) from None
    except SystemExit as leave:
        # By way of Ray's Ctrl-C handler, or out of `ray.get`, the status is 0 or 1, and says nothing.
        by_sigterm = leave.code == signal.SIGTERM or _terminated.is_set()
        raise Interrupted(128 + (signal.SIGTERM if by_sigterm else signal.SIGINT)) from None
    finally:
        if in_main:
            signal.signal(signal.SIGINT, before)
