"""A worker's watchman: a small process beside it that says how it is, whatever holds up its threads.

Run as a script, with the interpreter's own modules alone, so that it starts in some 10 ms and takes little memory. When
its worker has ended it says so to the first that asks, and ends half a second later at the latest. See
:mod:`raytrain_het.membership.watchman`.

It reads the run's token from its standard input, a line each time that it changes, and writes the port that it listens
on to its standard output. Whoever connects sends a line: a nonce of 32 hexadecimal digits, a space, and the HMAC-SHA256
of ``"asks"`` and the nonce under the token. The answer is a line: the letter by which ``/proc`` tells how the worker is
(``-`` if it is gone), and the HMAC-SHA256 of ``"watches"``, the nonce and the letter. Whoever does not know the token
gets no answer: so nobody can have it sign what would prove something elsewhere.
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
NONCE_BYTES = 32
LINE_BYTES = NONCE_BYTES + 1 + 64 + 1
EXITING = 0x4
"""The kernel's flag (``PF_EXITING``) of a process that is being taken down: it has no connections any more."""
LAST_WORD_S = 1.5
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


class Watch:
    """Looks after one process.

    Args:
        pid: the process's; it is this one's parent.
        host: where to listen.
    """

    def __init__(self, pid: int, host: str) -> None:
        self.pid = pid
        self._token, self._typed = b"", b""
        self._asking: dict[int, tuple[_socket.socket, bytes, float]] = {}
        """By descriptor, who asks: the connection, what it has sent, and when it is turned away."""
        self._until = math.inf
        """When to end."""
        self._listener = _socket.socket(_socket.AF_INET6 if ":" in host else _socket.AF_INET, _socket.SOCK_STREAM)
        self._listener.bind((host, 0))
        self._listener.listen(MAX_ASKING)
        self._listener.setblocking(False)
        self._poll = select.poll()
        self._poll.register(self._listener.fileno(), select.POLLIN)
        self._poll.register(0, select.POLLIN)
        try:
            self._its_end = os.pidfd_open(pid)
        except (AttributeError, OSError):  # An old kernel, or a sandbox that forbids it.
            self._its_end = -1
        if self._its_end >= 0:
            self._poll.register(self._its_end, select.POLLIN)

    def run(self) -> None:
        """Say the port, and answer until the process has ended and somebody knows it."""
        os.write(1, b"%d\n" % self._listener.getsockname()[1])
        os.close(1)
        while time.monotonic() < self._until:
            if os.getppid() != self.pid and self._until == math.inf:
                self._until = time.monotonic() + LAST_WORD_S
                if self._its_end >= 0:
                    self._poll.unregister(self._its_end)
            for fd, _ in self._poll.poll(self._pause_ms()):
                if fd == 0:
                    self._learn()
                elif fd == self._listener.fileno():
                    self._accept()
                elif fd in self._asking:
                    self._hear(fd)
            now = time.monotonic()
            for fd in [fd for fd, (_, _, limit) in self._asking.items() if now > limit]:
                self._turn_away(fd)

    def _pause_ms(self) -> float | None:
        if self._until < math.inf:
            return LAST_WORD_S * 1000
        return LOOK_S * 1000 if self._its_end < 0 or self._asking else None

    def _learn(self) -> None:
        """A token has come."""
        said = os.read(0, 4096)
        *lines, self._typed = (self._typed + said).split(b"\n")
        self._token = lines[-1] if lines else self._token
        if not said:
            self._poll.unregister(0)

    def _accept(self) -> None:
        try:
            fd, _ = self._listener._accept()  # type: ignore[attr-defined]  # What socket.accept() calls.
        except OSError:
            return
        connection = _socket.socket(fileno=fd)
        connection.setblocking(False)
        if len(self._asking) >= MAX_ASKING:
            connection.close()
            return
        self._asking[fd] = connection, b"", time.monotonic() + PATIENCE_S
        self._poll.register(fd, select.POLLIN)

    def _hear(self, fd: int) -> None:
        """Somebody who asks has sent something."""
        connection, line, limit = self._asking[fd]
        try:
            said = connection.recv(LINE_BYTES)
            line += said
            if len(line) == LINE_BYTES:
                self._answer(connection, line)
        except OSError:
            said = b""
        if not said or len(line) >= LINE_BYTES:
            self._turn_away(fd)
        else:
            self._asking[fd] = connection, line, limit

    def _answer(self, connection: _socket.socket, line: bytes) -> None:
        nonce, proof = line[:NONCE_BYTES], line[NONCE_BYTES + 1 : -1]
        if not self._token or not _hashlib.compare_digest(proof, self._signed(b"asks" + nonce)):
            return
        letter = state_of(self.pid).encode()
        connection.send(letter + b" " + self._signed(b"watches" + nonce + letter) + b"\n")
        if self._until < math.inf:
            self._until = 0.0  # Somebody knows it now.

    def _signed(self, what: bytes) -> bytes:
        return bytes(_hashlib.hmac_digest(self._token, what, "sha256").hex().encode())

    def _turn_away(self, fd: int) -> None:
        self._poll.unregister(fd)
        self._asking.pop(fd)[0].close()


if __name__ == "__main__":
    Watch(int(sys.argv[1]), sys.argv[2]).run()
