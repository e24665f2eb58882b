"""Values from peer to peer: whole, whatever is in them, and without holding up the threads that answer pings."""

from __future__ import annotations

import pickle
import socket
import sys
import threading
import types
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from raytrain_het.errors import CheckpointError, EvictedError
from raytrain_het.membership.agent import RunOver
from raytrain_het.worker.data import strides
from raytrain_het.worker.state import state_server
from raytrain_het.worker.state.state_server import StateServer, ask


@pytest.fixture
def server() -> Iterator[StateServer]:
    server = StateServer("127.0.0.1", lambda: "token")
    yield server
    server.close()


def never() -> bool:
    return False


def through(server: StateServer, value: Any) -> Any:
    server.offer("value", lambda _: value)
    return ask("127.0.0.1", server.port, "token", "value", give_up=never)


@pytest.mark.parametrize(
    "t",
    [
        torch.randn(3, 4),
        torch.randn(3, 4, dtype=torch.bfloat16),
        torch.randn(5, dtype=torch.float16),
        torch.randn(2, 2, dtype=torch.float64),
        torch.randn(3, dtype=torch.complex64),
        torch.randn(3, dtype=torch.complex64).conj(),
        torch.tensor(7),
        torch.tensor(1.5, dtype=torch.bfloat16),
        torch.tensor([True, False]),
        torch.zeros(0),
        torch.zeros(3, 0, 2, dtype=torch.bfloat16),
        torch.randn(4, 6).t(),
        torch.randn(10)[1::3],
        torch.randn(()).expand(4, 3),
        torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)[1:],
        torch.randn(5, 1).expand(5, 3).t(),
        torch.randn(6).unfold(0, 3, 1),
        torch.randn(4).to(torch.float8_e4m3fn),
        torch.randn(3, 3).to_sparse(),
        torch.randn(2, requires_grad=True),
        torch.nn.Parameter(torch.randn(2)),
    ],
    ids=lambda t: f"{type(t).__name__}-{t.dtype}-{tuple(t.shape)}",
)
def test_a_tensor_of_any_kind_arrives_bit_by_bit(server: StateServer, t: torch.Tensor) -> None:
    got = through(server, {"t": t})["t"]
    assert type(got) is type(t)
    assert got.requires_grad == t.requires_grad
    if t.dtype == torch.float8_e4m3fn:
        got, t = got.view(torch.uint8), t.view(torch.uint8)
    torch.testing.assert_close(got, t, rtol=0, atol=0)
    if strides.is_plain(t) and strides.memory(t) is not None:
        assert got.stride() == t.stride()
        assert got.untyped_storage().nbytes() <= t.nbytes


def test_structure_arrives_with_what_is_not_a_tensor(server: StateServer) -> None:
    t = torch.arange(3.0)
    value = OrderedDict(a=[t, (t, None)], b={1: "text", "n": np.arange(4)}, c=torch.get_rng_state())
    got = through(server, value)
    assert list(got) == ["a", "b", "c"]
    assert type(got) is OrderedDict
    assert got["a"][0] is got["a"][1][0]
    assert got["b"][1] == "text"
    assert np.array_equal(got["b"]["n"], np.arange(4))
    assert torch.equal(got["c"], value["c"])


@pytest.mark.parametrize("over", [RunOver(), EvictedError("dropped"), OSError("gone")])
def test_a_request_when_the_run_is_over_gets_no_answer_and_leaves_no_traceback(
    server: StateServer, over: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", seen.append)

    def make(_: dict[str, Any]) -> Any:
        raise over

    server.offer("value", make)
    assert ask("127.0.0.1", server.port, "token", "value", give_up=never) is None
    for thread in threading.enumerate():
        if thread.name == "het-state-serve":
            thread.join(timeout=5)
    assert seen == []


def test_what_cannot_be_sent_is_an_error_of_the_one_who_asks(server: StateServer) -> None:
    """Without an answer it would ask again and again."""
    with pytest.raises(CheckpointError, match="cannot send its state.*pickle '_thread.lock'.*state_dict"):
        through(server, {"lock": threading.Lock()})


def test_what_cannot_be_read_is_an_error_of_the_one_who_asks(
    server: StateServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("only_there")
    module.Mode = type("Mode", (), {"__module__": "only_there"})  # type: ignore[attr-defined]
    with monkeypatch.context() as there:
        there.setitem(sys.modules, "only_there", module)
        packed = state_server._pack(module.Mode())
    monkeypatch.setattr(state_server, "_made", lambda make, request: packed)
    with pytest.raises(CheckpointError, match="only_there.*importable"):
        through(server, None)


def test_a_peer_that_closes_in_the_middle_of_a_tensor_is_a_lost_connection() -> None:
    ours, theirs = socket.socketpair()
    ours.settimeout(0.05)
    head = threading.Thread(target=state_server.send, args=(theirs, torch.zeros(1000)))
    head.start()
    head.join()
    theirs.close()
    got = state_server.receive(ours, never)
    assert got.shape == (1000,)
    with pytest.raises(EOFError, match="closed"):
        state_server.receive(ours, never)


def test_the_bytes_of_a_tensor_pass_through_no_pickle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pickling copies them while it holds Python's lock, and the threads that answer pings wait for it."""
    pickled: list[int] = []
    loads = pickle.loads
    monkeypatch.setattr(pickle, "loads", lambda data: pickled.append(len(data)) or loads(data))
    ours, theirs = socket.socketpair()
    ours.settimeout(0.05)
    value = {"t": torch.ones(2**20), "strided": torch.ones(2**10, 2**10).t(), "half": torch.ones(2**20).bfloat16()}
    sender = threading.Thread(target=state_server.send, args=(theirs, value))
    sender.start()
    got = state_server.receive(ours, never)
    sender.join()
    torch.testing.assert_close(got, value, rtol=0, atol=0)
    assert sum(pickled) < 10_000
