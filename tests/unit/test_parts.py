"""The files of a checkpoint: what a reader that runs no code gets, and what comes back in full."""

from __future__ import annotations

import enum
import random
import threading
from collections import Counter, OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raytrain_het.errors import CheckpointError
from raytrain_het.worker.state import parts


class Mode(enum.Enum):
    WARM = 1


class Pair(tuple):
    """A class of somebody's own."""


PLAIN: dict[Any, Any] = {
    "plain": [None, True, 3, 1.5, float("inf"), "text", b"\x00\xff", (1, (2, []))],
    "ordered": OrderedDict(b=1, a={"deep": [torch.arange(3)]}),
    ("a", 1): torch.Size([2, 3]),
    7: torch.float32,
    "python's random state": random.getstate(),
    "parameter": torch.nn.Parameter(torch.ones(2), requires_grad=False),
    "strides": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
    "expanded": torch.ones(3, 1).expand(3, 5),
    "kinds": [torch.empty(0, 3), torch.tensor(1.5), torch.ones(2).bfloat16(), torch.ones(2).to(torch.float8_e5m2)],
    "more": [torch.ones(2, dtype=torch.complex64), torch.ones(2).bool(), torch.eye(2).to_sparse()],
}
CODE: dict[Any, Any] = {
    "numpy's random state": np.random.RandomState(3).get_state(),
    "number": np.float64(2.5),
    "set": {1, 2},
    "enum": Mode.WARM,
    "large": 2**3000,
    "own": Pair((1, 2)),
    "counter": Counter("aab"),
    "default": defaultdict(list, a=[1]),
}


def test_plain_values_and_tensors_make_one_file_that_is_read_without_running_code(tmp_path: Path) -> None:
    assert parts.save(tmp_path, "x", PLAIN) == ["x.pt"]
    got = torch.load(tmp_path / "x.pt", weights_only=True)
    assert list(got) == list(PLAIN)
    assert type(got["ordered"]) is OrderedDict
    assert got["plain"] == PLAIN["plain"]
    assert got["python's random state"] == PLAIN["python's random state"]
    assert got["strides"].stride() == PLAIN["strides"].stride()
    assert got["expanded"].stride() == (1, 0)
    for one, other in zip(got["kinds"], PLAIN["kinds"], strict=True):
        assert one.dtype == other.dtype and torch.equal(one.float(), other.float())


@pytest.mark.parametrize("name", CODE)
def test_what_needs_code_is_in_a_file_of_its_own_and_comes_back_in_its_place(tmp_path: Path, name: str) -> None:
    weight = torch.randn(3)
    value = {"first": weight, "here": {name: CODE[name], "last": [1, (CODE[name], weight)]}}
    assert parts.save(tmp_path, "x", value) == ["x.pt", "x.pkl"]
    safe = torch.load(tmp_path / "x.pt", weights_only=True)
    assert torch.equal(safe["first"], weight)
    assert torch.equal(safe["here"]["last"][1][1], weight)  # Tensors are never in the other file.
    got = parts.load(tmp_path, "x")
    assert list(got["here"]) == [name, "last"]
    for back in (got["here"][name], got["here"]["last"][1][0]):
        assert type(back) is type(CODE[name])
        assert repr(back) == repr(CODE[name])


def test_keys_that_need_code_and_a_value_that_contains_itself_survive(tmp_path: Path) -> None:
    loop: list[Any] = [1]
    loop.append(loop)
    parts.save(tmp_path, "x", {"modes": {Mode.WARM: 3}, "loop": loop})
    got = parts.load(tmp_path, "x")
    assert got["modes"] == {Mode.WARM: 3}
    assert got["loop"][1] is got["loop"]


def test_the_versions_of_a_models_modules_are_kept(tmp_path: Path) -> None:
    state = torch.nn.BatchNorm1d(2).state_dict()
    parts.save(tmp_path, "x", state)
    assert parts.load(tmp_path, "x")._metadata == state._metadata


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (threading.Lock(), r"x\['a'\]\['b'\] is a lock that cannot be stored.*module that can be imported"),
        (torch.ones(1, device="meta"), r"x\['a'\]\['b'\] is a tensor without data"),
        (torch.ones(1, dtype=torch.uint8).view(torch.int4), r"x\['a'\]\['b'\] is a tensor of dtype torch.int4"),
    ],
)
def test_what_cannot_be_stored_is_named(tmp_path: Path, value: Any, says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        parts.save(tmp_path, "x", {"a": {"b": value}})


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    parts.save(tmp_path, "x", {"t": torch.ones(1000)})
    whole = (tmp_path / "x.pt").read_bytes()
    (tmp_path / "x.pt").write_bytes(whole[:1000])
    with pytest.raises(CheckpointError, match="x.pt can't be read.*damaged"):
        parts.load(tmp_path, "x")
