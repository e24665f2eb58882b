"""What crosses process borders (wire, records, errors), and what a wrong setting says."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import pickle
import socket
import threading
from typing import Any

import numpy as np
import pytest
import torch
from collectives_fakes import record_of

from raytrain_het import errors
from raytrain_het.config import HetConfig
from raytrain_het.membership.protocol import Claim, FromMember, Meet, Ping, Pong
from raytrain_het.membership.record import Record
from raytrain_het.membership.wire import Connection, decoded, encode, tune

# ---------------------------------------------------------------- wire and record


def test_messages_arrive_whole_and_in_order_whatever_the_pieces() -> None:
    texts = [{"text": "line\nbreak", "number": float("inf"), "pad": "ü" * 70_000}] * 3
    sent = [Meet(group="g", key=str(k), value=json.dumps(text)) for k, text in enumerate(texts)]
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            peer, _ = server.accept()
            data = b"".join(encode(m) for m in sent)
            with peer:
                for start in range(0, len(data), 10_007):
                    peer.sendall(data[start : start + 10_007])

        thread = threading.Thread(target=serve)
        thread.start()
        connection = Connection(socket.create_connection(server.getsockname()))
        assert list(connection.messages()) == sent
        thread.join()
        connection.close()
        connection.close()
        with pytest.raises(OSError, match=".*"):
            connection.send(Pong(position=0))


def test_numbers_that_are_not_finite_arrive_and_what_is_no_message_is_an_error() -> None:
    claim = Claim(step=0, name="x", value={"worst": float("inf"), "none": float("nan")})
    again = decoded(json.loads(encode(claim)), FromMember)
    assert again.value["worst"] == float("inf") and math.isnan(again.value["none"])
    value = {"x": np.float64(1.5), "y": type("Text", (str,), {})("z")}
    own = decoded(json.loads(encode(Claim(step=0, name="x", value=value))), FromMember)
    assert own.value == {"x": 1.5, "y": "z"}
    for wrong in ({"type": "odd"}, {"type": "pong"}, {"type": "pong", "position": "x"}, []):
        with pytest.raises(ValueError, match=".+"):
            decoded(wrong, FromMember)


def test_a_hub_that_takes_nothing_costs_its_connection_and_not_the_senders_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        connection = Connection(socket.create_connection(server.getsockname()), send_timeout_s=0.05)
        peer, _ = server.accept()
        with pytest.raises(OSError, match=".*"):
            connection.send(Claim(step=0, name="x", value="x" * 2**26))
        with pytest.raises(OSError, match=".*"):
            connection.send(Pong(position=0))
        assert list(connection.messages()) == [], "the reader's thread goes on to a new one"
        peer.close()


def test_a_message_that_breaks_off_is_the_end_of_the_connection() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        connection = Connection(socket.create_connection(server.getsockname()))
        peer, _ = server.accept()
        peer.sendall(encode(Ping()) + b'{"type": "wa')
        peer.close()
        assert list(connection.messages()) == [Ping()]
        connection.close()


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="an option of Linux")
def test_the_kernel_looks_whether_a_silent_machine_is_still_there() -> None:
    with socket.socket() as sock:
        tune(sock)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        options = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT, socket.TCP_USER_TIMEOUT)
        idle, interval, probes, user_ms = (sock.getsockopt(socket.IPPROTO_TCP, option) for option in options)
    assert idle + interval * probes <= 20
    assert user_ms <= 20_000


def test_messages_of_several_threads_are_not_mixed() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        connection = Connection(socket.create_connection(server.getsockname()))
        peer, _ = server.accept()
        threads = [
            threading.Thread(target=lambda k=k: [connection.send({"from": k, "pad": "x" * 5000}) for _ in range(50)])
            for k in range(4)
        ]
        for thread in threads:
            thread.start()
        with peer.makefile("rb") as lines:
            got = [json.loads(lines.readline())["from"] for _ in range(200)]
        for thread in threads:
            thread.join()
        assert sorted(got) == sorted([0, 1, 2, 3] * 50)
        connection.close()
        peer.close()


def test_a_record_survives_json() -> None:
    record = record_of([1.0, 0.5, 0.0], behind=("1-a",), unhealed=("2-a",), reset=True, checkpoint="path", source=None)
    again = Record.from_json(json.loads(json.dumps(record.to_json())))
    assert again == record
    assert (again.base, again.rank_of("2-a"), again.rank_of("9-a"), again.member("1-a").slot) == (4, 2, None, 11)


# ---------------------------------------------------------------- errors

ERRORS = [cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, errors.HetError)]


@pytest.mark.parametrize("cls", ERRORS, ids=lambda c: c.__name__)
def test_errors_survive_pickling_with_message_and_type(cls: type[errors.HetError]) -> None:
    again = pickle.loads(pickle.dumps(cls("worker 3: what, and the fix")))
    assert type(again) is cls
    assert str(again) == "worker 3: what, and the fix"


def test_the_poisonous_step_survives_pickling() -> None:
    again = pickle.loads(pickle.dumps(errors.RunFailedError("why", {"step": 8, "slots": [1]})))
    assert (str(again), again.poison) == ("why", {"step": 8, "slots": [1]})


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("values", "allowed"),
    [
        ({"shares": [1, -1]}, "'auto', None, or non-negative numbers, at least one above 0"),
        ({"shares": [0, 0]}, "'auto', None, or non-negative numbers, at least one above 0"),
        ({"shares": []}, "'auto', None, or non-negative numbers, at least one above 0"),
        ({"shares": [1, math.inf]}, "'auto', None, or non-negative numbers, at least one above 0"),
        ({"alpha": math.nan}, "a finite number"),
        ({"lr_scale_normalisation": "sum"}, "'mean' or 'none'"),
        (
            {"score_policy": "speed"},
            "'train_step', 'flops', 'memory_bandwidth', or a function from a Profile to a number",
        ),
        ({"warm_spares": 1}, "true or false, and true with shares='auto' only"),
        (
            {"compression": "zip"},
            "none, bf16, fp16, int8, int4, sign, topk, randomk, lowrank, auto, or one of them with options",
        ),
        ({"micro_batch_size": 0}, "a whole number from 1, or None"),
        ({"micro_batch_size": 1.5}, "a whole number from 1, or None"),
        ({"bucket_mib": 0.0}, "a number above 0"),
        ({"silence_s": -1.0}, "a number above 0"),
        ({"hang_limit_s": math.nan}, "a number above 0"),
        ({"start_timeout_s": math.inf}, "a number above 0"),
        ({"replica_check_steps": -1}, "a whole number from 0"),
        ({"max_skipped_steps": 1.5}, "a whole number from 0"),
        ({"seed": True}, "a whole number from 0"),
    ],
)
def test_a_wrong_setting_names_itself_its_value_what_is_allowed_and_the_fix(
    values: dict[str, Any], allowed: str
) -> None:
    (name,) = values
    with pytest.raises(errors.ConfigError) as caught:
        HetConfig(**values)
    message = str(caught.value)
    assert message.startswith(f"{name}=")
    assert f"is not valid: allowed is {allowed}. " in message
    assert message.endswith(".")


@pytest.mark.parametrize("values", [{"shares": "31"}, {"shares": 3}, {"silence_s": "1"}])
def test_a_setting_of_another_type_is_a_config_error_too(values: dict[str, Any]) -> None:
    with pytest.raises(errors.ConfigError, match=next(iter(values))):
        HetConfig(**values)


def test_warm_spares_need_shares_that_follow_the_speeds() -> None:
    with pytest.raises(errors.ConfigError, match="warm_spares=True.*true with shares='auto' only"):
        HetConfig(shares=[3, 1], warm_spares=True)  # type: ignore[arg-type]


def test_shares_become_a_tuple_of_floats() -> None:
    assert HetConfig(shares=[3, 1]).shares == (3.0, 1.0)  # type: ignore[arg-type]


def test_numbers_of_numpy_and_torch_are_pythons_own() -> None:
    config = HetConfig(
        shares=np.array([3, 1]),
        alpha=np.float32(0.5),
        seed=np.int64(3),
        micro_batch_size=torch.tensor(4),
        warm_spares=np.bool_(False),
        clip={"norm": np.float64(1.0)},
        bucket_mib=torch.tensor(2.0),
        compression=np.str_("bf16"),
        schedule={"step": {"every_epochs": np.int64(2)}},
        silence_s=np.int32(1),
    )
    assert config.shares == (3.0, 1.0)
    values = [getattr(config, f.name) for f in dataclasses.fields(config)]
    assert json.loads(json.dumps(values))[0] == [3.0, 1.0]
    assert HetConfig(shares=torch.tensor([3.0, 1.0])) == HetConfig(shares=(3, 1))
    assert HetConfig(shares=[np.float32(3), torch.tensor(1)]) == HetConfig(shares=(3, 1))
    assert HetConfig(compression={"topk": {"density": np.float64(0.1)}}).compression == "topk(density=0.1)"


@pytest.mark.parametrize("shares", [{0: 3, 1: 1}, {3, 1}, np.array([[3, 1]]), np.array(3.0)])
def test_shares_without_an_order_of_workers_are_refused(shares: Any) -> None:
    with pytest.raises(errors.ConfigError, match="shares="):
        HetConfig(shares=shares)


def test_settings_are_frozen_named_and_picklable() -> None:
    config = HetConfig(compression="bf16")
    with pytest.raises(AttributeError):
        config.compression = "none"  # type: ignore[misc]
    with pytest.raises(TypeError):
        HetConfig((1.0,))  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(config)) == config
