"""A worker's watchman: a small process beside it that says how it is, whatever holds up its threads.

Run as a script, with the interpreter's own modules alone, so that it starts in some 10 ms and takes little memory. When
its worker has ended it says so to the first that asks, and ends half a second later at the latest. See
:mod:`raytrain_het.membership.watchman`.

It reads the run's token from its standard input, a line each time that it changes, and writes the port that it listens
on to its standard output. Whoever connects sends a line of at most 64 characters, its nonce. The answer is a line: the
letter by which ``/proc`` tells the worker's state (``-`` if it is gone), and the HMAC-SHA256 of nonce and letter under
the token.
"""

import _hashlib
import _socket
import math
import os
import select
import sys
import time

MAX_ASKING = 32
"""So many may be connected at once; others are turned away."""
PATIENCE_S = 2.0
"""Whoever has sent no whole line by then is turned away."""
MAX_LINE_BYTES = 64
EXITING = 0x4
"""The kernel's flag (``PF_EXITING``) of a process that is being taken down: it has no connections any more."""
LAST_WORD_S = 0.5
"""So long it waits, after its worker's end, for somebody to ask."""
LOOK_S = 1.0
"""Where the kernel does not tell of a process's end, it is looked for so often."""


def state_of(pid: int) -> str:
    """The letter of a process's state: R running, S or D waiting, T or t stopped, Z or X dead, - gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            fields = stat.read().rpartition(b")")[2].split()
            return "X" if int(fields[6]) & EXITING else fields[0].decode()
    except FileNotFoundError:
        if os.path.exists("/proc/self/stat"):
            return "-"
    return "S" if os.getppid() == pid else "-"


def watch(pid: int, host: str) -> None:
    """Answer until the process has ended, and somebody knows it."""
    family = _socket.AF_INET6 if ":" in host else _socket.AF_INET
    listener = _socket.socket(family, _socket.SOCK_STREAM)
    listener.bind((host, 0))
    listener.listen(MAX_ASKING)
    listener.setblocking(False)
    os.write(1, b"%d\n" % listener.getsockname()[1])
    os.close(1)
    token, typed = b"", b""
    asking: dict[int, tuple[_socket.socket, bytes, float]] = {}
    poll = select.poll()
    poll.register(listener.fileno(), select.POLLIN)
    poll.register(0, select.POLLIN)
    its_end = os.pidfd_open(pid) if hasattr(os, "pidfd_open") else -1
    if its_end >= 0:
        poll.register(its_end, select.POLLIN)

    def turn_away(fd: int) -> None:
        poll.unregister(fd)
        asking.pop(fd)[0].close()

    until = math.inf
    while time.monotonic() < until:
        if os.getppid() != pid and until == math.inf:
            until = time.monotonic() + LAST_WORD_S
            if its_end >= 0:
                poll.unregister(its_end)
        waits_s = LAST_WORD_S if until < math.inf else LOOK_S if its_end < 0 or asking else None
        for fd, _ in poll.poll(None if waits_s is None else waits_s * 1000):
            if fd == its_end:
                continue
            if fd == 0:
                said = os.read(0, 4096)
                typed += said
                *lines, typed = typed.split(b"\n")
                token = lines[-1] if lines else token
                if not said:
                    poll.unregister(0)
            elif fd == listener.fileno():
                new, _ = listener._accept()  # type: ignore[attr-defined]  # What socket.accept() calls.
                connection = _socket.socket(fileno=new)
                connection.setblocking(False)
                if len(asking) >= MAX_ASKING:
                    connection.close()
                    continue
                asking[new] = connection, b"", time.monotonic() + PATIENCE_S
                poll.register(new, select.POLLIN)
            elif fd in asking:
                connection, line, its_limit = asking[fd]
                try:
                    said = connection.recv(MAX_LINE_BYTES)
                    line += said
                    if line.endswith(b"\n"):
                        letter = state_of(pid).encode()
                        proof = _hashlib.hmac_digest(token, line.strip() + letter, "sha256")
                        connection.send(letter + b" " + proof.hex().encode() + b"\n")
                        said = b""
                        if until < math.inf:
                            connection.close()
                            return
                except OSError:
                    said = b""
                if not said or len(line) > MAX_LINE_BYTES:
                    turn_away(fd)
                else:
                    asking[fd] = connection, line, its_limit
        now = time.monotonic()
        for fd in [fd for fd, (_, _, its_limit) in asking.items() if now > its_limit]:
            turn_away(fd)


if __name__ == "__main__":
    watch(int(sys.argv[1]), sys.argv[2])
