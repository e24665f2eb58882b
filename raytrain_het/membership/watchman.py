"""Whether a worker's process runs, is stopped or has ended: told by a watchman beside it, asked by the hub.

A connection that is reset says nothing of the process behind it, and a process that is silent may be busy: a call into
C or a collection of garbage holds the interpreter's lock for seconds, and no thread of Python's answers. The watchman
is another process (:mod:`~raytrain_het.membership.watchman_main`), so it answers then, and what it says is what the
worker's kernel knows.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import hmac
import logging
import os
import secrets
import select
import subprocess
import sys

from raytrain_het.membership import watchman_main
from raytrain_het.membership.record import Member

logger = logging.getLogger("raytrain_het")

START_LIMIT_S = 20.0


class Life(enum.Enum):
    """What is known of a process."""

    RUNS = "runs"
    STOPPED = "stopped"
    ENDED = "ended"
    REFUSED = "refused"
    """Nobody listens any more where its watchman and its state server did: it has ended, if the refusal is its own
    machine's."""
    LISTENS = "listens"
    """Somebody listens at its ports, and no more is known."""
    UNKNOWN = "unknown"
    """Its machine does not answer."""


_LETTERS = {"T": Life.STOPPED, "t": Life.STOPPED, "Z": Life.ENDED, "X": Life.ENDED, "x": Life.ENDED, "-": Life.ENDED}


class Watchman:
    """A worker's own: started with it, and ends with it at the latest.

    Args:
        host: the address at which it listens.

    Attributes:
        port: where it listens; 0 if it could not be started, which costs the certainty that a silent worker is alive.
    """

    def __init__(self, host: str) -> None:
        self.port = 0
        self._process: subprocess.Popen[bytes] | None = None
        command = [sys.executable, "-I", "-S", watchman_main.__file__, str(os.getpid()), host]
        try:
            # A session of its own: neither Ctrl-C nor Ctrl-Z in the terminal concerns it.
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
            )
            assert self._process.stdout is not None
            with self._process.stdout as said:
                ready, _, _ = select.select([said], [], [], START_LIMIT_S)
                self.port = int(said.readline()) if ready else 0
        except (OSError, ValueError) as error:
            logger.warning("no process can be started that answers for this worker while it is busy: %s", error)
            return
        if not self.port:
            logger.warning("the process that is to answer for this worker while it is busy has said nothing")

    def learn(self, token: str) -> None:
        """The run's token, by which the hub knows the watchman's answers."""
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.write(token.encode() + b"\n")
                self._process.stdin.flush()

    def close(self) -> None:
        """End it."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            if self._process.stdin is not None:
                with contextlib.suppress(OSError):
                    self._process.stdin.close()


async def life_of(member: Member, token: str, timeout_s: float) -> Life:
    """Ask a member's machine what has become of its process.

    Args:
        member: the member.
        token: the run's.
        timeout_s: after so long without an answer nothing is known.
    """
    try:
        return await asyncio.wait_for(_ask(member, token), timeout_s)
    except ConnectionRefusedError:
        return await _listens(member.host, member.state_port, timeout_s)
    except ConnectionError:  # It may just be ending with its worker.
        return Life.LISTENS
    except (OSError, asyncio.TimeoutError, ValueError):  # Two kinds of time-out before Python 3.11.
        return Life.UNKNOWN


async def _ask(member: Member, token: str) -> Life:
    if not member.watch_port:
        raise ConnectionRefusedError
    reader, writer = await asyncio.open_connection(member.host, member.watch_port, limit=256)
    try:
        nonce = secrets.token_hex(watchman_main.NONCE_BYTES // 2)
        writer.write(f"{nonce} {_signed(token, f'asks{nonce}')}\n".encode())
        letter, _, proof = (await reader.readline()).decode().strip().partition(" ")
    finally:
        writer.close()
    if not letter or not hmac.compare_digest(proof, _signed(token, f"watches{nonce}{letter}")):
        return Life.LISTENS
    return _LETTERS.get(letter, Life.RUNS)


def _signed(token: str, what: str) -> str:
    return hmac.new(token.encode(), what.encode(), "sha256").hexdigest()


async def _listens(host: str, port: int, timeout_s: float) -> Life:
    try:
        _, writer = await asyncio.wait_for(asyncio.open_connection(host, port), timeout_s)
        writer.close()
    except ConnectionRefusedError:
        return Life.REFUSED
    except (OSError, asyncio.TimeoutError):
        return Life.UNKNOWN
    return Life.LISTENS
