"""Makes processes slow without root, by SIGSTOP and SIGCONT. A script: :mod:`raytrain_het.testing.throttle` runs it.

Two processes, each of which lets the slow ones go when the other is gone: one that stops and continues them, and a
guard. Both end with the process that asked for them. So no single death leaves anything stopped.

Time is counted in CPU seconds: ``cores`` for each second is what the processes are given, what they use is taken off,
and they are stopped while nothing is left. So many threads, or a busy machine, are no way to get more, or less.

Standard library only, and run with ``-I -S``, so that it is there in 20 ms.
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
"""So long a stop is, if the processes have used no more than they were given."""
MIN_RUN_S = 0.002
MAX_RUN_S = 0.05
"""How often it is looked what they have used."""
SAVED_S = 0.1
"""What they were given in so long is kept for them: on a busy machine they, and this one, run late."""


class Target:
    """A process by its file descriptor: another one that comes to have its id is safe."""

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
    """Those that are still there."""
    targets = []
    for line in lines:
        with contextlib.suppress(OSError):
            targets.append(Target(int(line)))
    return targets


def guard(source: int) -> None:
    """Read process ids up to the end of the pipe, which is the end of the other process. Then let them go."""
    targets: list[Target] = []
    with os.fdopen(source, "rb") as lines:
        for line in lines:
            targets += targets_of([line])
    for target in targets:
        target.send(signal.SIGCONT)


def alternate(owner: int, orders: int, to_guard: int) -> None:
    """Stop and go, until the owner, its end of the pipe or the guard is gone.

    Args:
        owner: process id.
        orders: a pipe with lines ``cores X`` and ``add PID``.
        to_guard: a pipe to it.
    """
    ends = os.pidfd_open(owner)
    poll = select.poll()
    poll.register(ends, select.POLLIN)
    poll.register(orders, select.POLLIN)
    poll.register(to_guard, 0)  # Only its closing is told.
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
