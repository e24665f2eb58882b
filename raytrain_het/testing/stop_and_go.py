"""Makes processes slow without root, by SIGSTOP and SIGCONT. A script: :mod:`raytrain_het.testing.throttle` runs it.

There are two processes: one stops and continues the slow processes, the other guards it. If one of the two dies, the
other lets the slow processes run. Both end with the process that has started them. So no single death leaves anything
stopped.

The slow processes have a credit of CPU seconds. It grows by ``cores`` in each second, shrinks by the CPU time that they
use, and they are stopped while it is empty. So neither many threads nor a busy machine changes what they get.

This file needs only the standard library, and runs with ``-I -S``: it starts in 20 ms.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import time
from collections.abc import Iterable

STOP_S = 0.01
"""Seconds of a stop, if the processes have used no more than their credit."""
MIN_RUN_S = 0.002
MAX_RUN_S = 0.05
"""Their CPU time is read at least this often while they run."""
SAVED_S = 0.1
"""Their credit is at most that of so many seconds: on a busy machine they, and this process, run late."""


class Target:
    """A slow process, by its file descriptor: another process that gets the same id later is safe."""

    def __init__(self, pid: int) -> None:
        self.pid, self.fd = pid, os.pidfd_open(pid)
        self._used_s = self._clock()

    def used_s(self) -> float:
        """CPU time of all its threads since the last call."""
        before, self._used_s = self._used_s, self._clock()
        return self._used_s - before

    def send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.fd, number)

    def _clock(self) -> float:
        # The kernel's name for the CPU clock of a process: clock_getcpuclockid(3).
        return time.clock_gettime((~self.pid << 3) | 2)


def targets_of(lines: Iterable[bytes]) -> list[Target]:
    """The processes of these ids that still exist."""
    targets = []
    for line in lines:
        with contextlib.suppress(OSError):
            targets.append(Target(int(line)))
    return targets


def guard(source: int) -> None:
    """Read process ids to the end of the pipe, which is the end of the other process. Then let the processes run."""
    targets: list[Target] = []
    with os.fdopen(source, "rb") as lines:
        for line in lines:
            targets += targets_of([line])
    for target in targets:
        target.send(signal.SIGCONT)


def alternate(owner: int, orders: int, to_guard: int) -> None:
    """Stop and continue the slow processes, until the owner or the guard is gone.

    Args:
        owner: The id of the process that has started this one.
        orders: A pipe from the owner, with lines ``cores X`` and ``add PID``.
        to_guard: A pipe to the guard.
    """
    ends = os.pidfd_open(owner)
    poll = select.poll()
    poll.register(ends, select.POLLIN)
    poll.register(orders, select.POLLIN)
    poll.register(to_guard, 0)  # Only that it is closed.
    targets: list[Target] = []
    cores, credit_s, rest, stopped = 1.0, 0.0, b"", False
    last, wait_s = time.monotonic(), MAX_RUN_S
    try:
        while True:
            ready = dict(poll.poll(max(1, round(1000 * wait_s))))
            if ends in ready or to_guard in ready:
                return
            if orders in ready:
                received = os.read(orders, 4096)
                if not received:
                    return
                *lines, rest = (rest + received).split(b"\n")
                for order, value in (line.split() for line in lines):
                    if order == b"cores":
                        cores = float(value)
                    elif added := targets_of([value]):
                        os.write(to_guard, value + b"\n")
                        targets += added
                        if stopped:
                            added[0].send(signal.SIGSTOP)
            now, used_s = time.monotonic(), 0.0
            for target in list(targets):
                try:
                    used_s += target.used_s()
                except OSError:
                    targets.remove(target)
                    os.close(target.fd)
            enough_s, elapsed_s = cores * STOP_S, now - last
            credit_s, last = min(credit_s + cores * elapsed_s, cores * SAVED_S) - used_s, now
            if credit_s <= 0 or (stopped and credit_s < 0.9 * enough_s):
                if not stopped:
                    for target in targets:
                        target.send(signal.SIGSTOP)
                stopped, wait_s = True, (enough_s - credit_s) / cores
            else:
                if stopped:
                    for target in targets:
                        target.send(signal.SIGCONT)
                drain = max(used_s / elapsed_s if elapsed_s else 0.0, 1.0) - cores
                stopped, wait_s = False, min(max(credit_s / max(drain, 1e-3), MIN_RUN_S), MAX_RUN_S)
            wait_s = min(wait_s, 1.0)
    except BrokenPipeError:
        return
    finally:
        for target in targets:
            target.send(signal.SIGCONT)


def main() -> None:
    orders = sys.stdin.fileno()
    for_guard, to_guard = os.pipe()
    if os.fork() == 0:
        os.close(to_guard)
        os.close(orders)
        guard(for_guard)
    else:
        os.close(for_guard)
        alternate(int(sys.argv[1]), orders, to_guard)
        os.close(to_guard)
        os.wait()


if __name__ == "__main__":
    main()
