"""Snapshots from peer to peer: a small server in every worker, asked by those that heal."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from raytrain_het.errors import CheckpointError, HetError
from raytrain_het.membership import handshake
from raytrain_het.membership.agent import RunOver
from raytrain_het.membership.encryption import Socket, secured
from raytrain_het.membership.wire import tune
from raytrain_het.worker.data import strides

_LENGTH = struct.Struct("<Q")
_CHUNK_BYTES = 4 * 2**20
WAIT_S = 600.0
MAX_REQUEST_BYTES = 64 * 1024
_OF_NO_CONCERN = (OSError, ValueError, KeyError, RunOver, HetError)

Packed = tuple[bytes, list[torch.Tensor]]


class StateServer:
    """Serves what its worker offers. Values are made when asked for, in the server's threads.

    Args:
        host: the address on which it listens.
        token: what a peer has to show; values are pickled, so nobody else may ask or be asked.
    """

    def __init__(self, host: str, token: Callable[[], str]) -> None:
        self._sock = socket.create_server((host, 0), backlog=64)
        self.port = int(self._sock.getsockname()[1])
        self._token = token
        self._offers: dict[str, Callable[[dict[str, Any]], Any]] = {}
        self._strangers = threading.BoundedSemaphore(handshake.MAX_STRANGERS)
        """Callers that have yet to prove themselves, each with a thread of its own."""
        self._changed = threading.Condition()
        self._closed = False
        threading.Thread(target=self._accept, name="het-state", daemon=True).start()

    def offer(self, name: str, make: Callable[[dict[str, Any]], Any]) -> None:
        """Serve ``make(request)`` under this name. A request that came earlier is answered now."""
        with self._changed:
            self._offers[name] = make
            self._changed.notify_all()

    def ask(self, host: str, port: int, name: str, *, give_up: Callable[[], bool], **values: Any) -> Any | None:
        """Ask a peer's server for what it offers under a name; see :func:`ask`."""
        return ask(host, port, self._token(), name, give_up=give_up, **values)

    def withdraw(self, prefix: str) -> None:
        """Serve names with this prefix no longer."""
        with self._changed:
            for name in [n for n in self._offers if n.startswith(prefix)]:
                del self._offers[name]

    def close(self) -> None:
        """Stop serving."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()

    def _accept(self) -> None:
        while not self._closed:
            try:
                connection, _ = self._sock.accept()
            except OSError:
                return
            if not self._strangers.acquire(blocking=False):
                connection.close()
                continue
            threading.Thread(target=self._serve, args=(connection,), name="het-state-serve", daemon=True).start()

    def _serve(self, plain: socket.socket) -> None:
        # What is asked for when the run is over, or goes on without this worker, is for nobody.
        with contextlib.ExitStack() as stack, contextlib.suppress(*_OF_NO_CONCERN):
            stack.callback(plain.close)
            try:
                connection = secured(plain, serves=True)
                stack.callback(connection.close)
                tune(connection)
                connection.settimeout(handshake.LIMIT_S)
                handshake.serve(connection, self._token())
                with connection.makefile("rb") as lines:
                    request = json.loads(lines.readline(MAX_REQUEST_BYTES))
            finally:
                self._strangers.release()
            connection.settimeout(None)
            name = request["name"]
            with self._changed:
                self._changed.wait_for(lambda: self._closed or name in self._offers, timeout=WAIT_S)
                make = self._offers.get(name)
            if make is None or self._closed:
                return
            _send(connection, _made(make, request))


@dataclass(frozen=True)
class _Failure:
    """Sent in the place of a value: whoever asks would else ask for ever."""

    text: str


def _made(make: Callable[[dict[str, Any]], Any], request: dict[str, Any]) -> Packed:
    try:
        return _pack(make(request))
    except CheckpointError as error:
        return _pack(_Failure(str(error)))
    except (OSError, HetError):  # It is no part of the run any more.
        raise
    except Exception as error:
        return _pack(_Failure(f"{type(error).__name__}: {error}"))


def ask(host: str, port: int, token: str, name: str, *, give_up: Callable[[], bool], **values: Any) -> Any | None:
    """Ask a peer's state server; None if the peer is gone or ``give_up()`` became true meanwhile.

    Raises:
        CheckpointError: the peer has it, and cannot send it, or this process cannot read it.
    """
    try:
        with secured(socket.create_connection((host, port), timeout=10), serves=False) as sock:
            tune(sock)
            handshake.call(sock, token)
            sock.sendall(json.dumps({"name": name, **values}).encode() + b"\n")
            sock.settimeout(0.05)
            value = receive(sock, give_up)
    except (OSError, EOFError):
        return None
    except Exception as error:
        raise CheckpointError(
            f"what a worker sent cannot be read here ({type(error).__name__}: {error}). Classes of registered state "
            "must be importable on every worker."
        ) from error
    if isinstance(value, _Failure):
        raise CheckpointError(
            f"a worker cannot send its state ({value.text}). Return tensors and plain values from the state_dict() of "
            "what is registered, or objects of classes of a module that can be imported."
        )
    return value


# ---------------------------------------------------------------- values on a socket

# torch.save and torch.load hold Python's lock while they copy a tensor, for longer than a worker may be silent. Here
# the structure is pickled with places in it for tensors, whose bytes go from and to their own memory by system calls.


def send(sock: Socket, value: Any) -> None:
    """Send a value of plain Python objects and tensors.

    Raises:
        OSError: the connection is lost.
    """
    _send(sock, _pack(value))


def _send(sock: Socket, packed: Packed) -> None:
    body, tensors = packed
    head = pickle.dumps((body, [(t.dtype, tuple(t.shape), t.stride()) for t in tensors]))
    sock.sendall(_LENGTH.pack(len(head)) + head)
    for t in tensors:
        flat = strides.memory(t)
        assert flat is not None
        sock.sendall(_bytes_of(flat.cpu()))


def _pack(value: Any) -> Packed:
    """A pickle with places for tensors, and the tensors, without gaps in their memory."""
    body = io.BytesIO()
    pickler = _Pickler(body)
    pickler.dump(value)
    return body.getvalue(), [t if strides.memory(t) is not None else t.contiguous() for t in pickler.tensors]


def receive(sock: Socket, give_up: Callable[[], bool]) -> Any:
    """What the peer has sent; all tensors are on the CPU. The socket has a time-out, after which ``give_up`` is asked.

    Raises:
        OSError: the connection is lost.
        EOFError: the peer has closed it, or ``give_up()`` became true.
    """
    length = bytearray(_LENGTH.size)
    _receive(sock, memoryview(length), give_up)
    head = bytearray(_LENGTH.unpack(length)[0])
    _receive(sock, memoryview(head), give_up)
    body, forms = pickle.loads(head)
    unpickler = _Unpickler(io.BytesIO(body))
    for dtype, shape, stride in forms:
        flat = torch.empty(strides.span(shape, stride), dtype=dtype)
        _receive(sock, _bytes_of(flat), give_up)
        unpickler.tensors.append(flat.as_strided(shape, stride))
    return unpickler.load()


class _Pickler(pickle.Pickler):
    """Leaves out tensors, and keeps them in ``tensors``. Others than plain ones (sparse, say) stay in the pickle."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=5)
        self.tensors: list[torch.Tensor] = []
        self._places: dict[int, int] = {}

    def persistent_id(self, obj: Any) -> int | None:
        if type(obj) is not torch.Tensor or obj.requires_grad or vars(obj) or not strides.is_plain(obj):
            return None
        place = self._places.setdefault(id(obj), len(self.tensors))
        if place == len(self.tensors):
            self.tensors.append(obj)
        return place


class _Unpickler(pickle.Unpickler):
    """Puts ``tensors`` back into their places."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.tensors: list[torch.Tensor] = []

    def persistent_load(self, pid: int) -> torch.Tensor:
        return self.tensors[pid]


def _bytes_of(t: torch.Tensor) -> memoryview:
    """A flat tensor's memory, whatever its dtype."""
    return t.view(torch.uint8).numpy().data


def _receive(sock: Socket, view: memoryview, give_up: Callable[[], bool]) -> None:
    done = 0
    while done < len(view):
        try:
            count = sock.recv_into(view[done:], min(len(view) - done, _CHUNK_BYTES))
        except TimeoutError:
            if give_up():
                raise EOFError("no longer wanted") from None
            continue
        if count == 0:
            raise EOFError("the peer closed the connection")
        done += count
