"""Both ends of a connection prove that they know the run's token, before anything else is said on it.

1. Who serves sends a nonce ``s`` of 16 bytes.
2. Who calls sends a nonce ``c`` of 16 bytes, and HMAC-SHA256(token, "calls" + s + c).
3. Who serves sends HMAC-SHA256(token, "serves" + s + c).

The token itself is never sent. What follows is encrypted only where Ray's settings say so (:mod:`.encryption`).
"""

from __future__ import annotations

import hmac
import math
import os
import time

from raytrain_het.membership.encryption import Socket

NONCE_BYTES = 16
PROOF_BYTES = 32
REPLY_BYTES = NONCE_BYTES + PROOF_BYTES
LIMIT_S = 5.0
"""A caller that has not proved itself by then is turned away."""
MAX_STRANGERS = 256
"""So many callers may be about to prove themselves at once; others are turned away."""


class Challenge:
    """The side of whoever serves, for one connection."""

    def __init__(self) -> None:
        self.nonce = os.urandom(NONCE_BYTES)
        """What is sent first."""

    def answer(self, reply: bytes, token: str) -> bytes | None:
        """What is sent last, for a caller's reply; None if the caller does not know the token."""
        theirs, proof = reply[:NONCE_BYTES], reply[NONCE_BYTES:]
        if not hmac.compare_digest(proof, _proof(token, b"calls", self.nonce, theirs)):
            return None
        return _proof(token, b"serves", self.nonce, theirs)


class Call:
    """The side of whoever calls, for one connection.

    Args:
        serves: the nonce that the other end has sent first.
        token: the run's.
    """

    def __init__(self, serves: bytes, token: str) -> None:
        self._serves, self._mine, self._token = serves, os.urandom(NONCE_BYTES), token
        self.reply = self._mine + _proof(token, b"calls", serves, self._mine)
        """What is sent to it."""

    def is_proved_by(self, answer: bytes) -> bool:
        """Whether the other end knows the token too."""
        return hmac.compare_digest(answer, _proof(self._token, b"serves", self._serves, self._mine))


def call(sock: Socket, token: str) -> None:
    """The side of whoever calls. The socket has a time-out.

    Raises:
        OSError: the connection is lost, or the other end does not know the token.
    """
    made = Call(receive_exactly(sock, NONCE_BYTES), token)
    sock.sendall(made.reply)
    if not made.is_proved_by(receive_exactly(sock, PROOF_BYTES)):
        raise ConnectionError("the other end of the connection does not know the run's token")


def serve(sock: Socket, token: str) -> None:
    """The side of whoever serves, on a socket with a time-out; the whole greeting takes no longer than that.

    Raises:
        OSError: the connection is lost, or the caller does not know the token.
    """
    challenge = Challenge()
    sock.sendall(challenge.nonce)
    answer = challenge.answer(receive_exactly(sock, REPLY_BYTES), token)
    if answer is None:
        raise ConnectionError("a caller does not know the run's token")
    sock.sendall(answer)


def receive_exactly(sock: Socket, size: int) -> bytes:
    """So many bytes. All of them take no longer than the socket's time-out.

    Raises:
        OSError: the connection ends before, or the time is over.
    """
    data, limit_s = b"", sock.gettimeout()
    until = time.monotonic() + (limit_s if limit_s is not None else math.inf)
    while len(data) < size:
        if time.monotonic() > until:
            raise TimeoutError("the greeting takes too long")
        part = sock.recv(size - len(data))
        if not part:
            raise ConnectionError("the connection has ended in the middle of its greeting")
        data += part
    return data


def _proof(token: str, role: bytes, serves: bytes, calls: bytes) -> bytes:
    return hmac.digest(token.encode(), role + serves + calls, "sha256")
