"""Batches of the user's own classes on their way to the device. Torch's "meta" device stands for a GPU."""

import collections
import types
from collections import UserDict, defaultdict, namedtuple
from dataclasses import dataclass, field
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from raytrain_het.errors import ConfigError
from raytrain_het.worker.data.batches import to_device
from raytrain_het.worker.data.whole_numbers import whole_number

META, CPU = torch.device("meta"), torch.device("cpu")
Pair = namedtuple("Pair", "x y")


@dataclass
class Graph:
    x: torch.Tensor
    names: list[Any]
    more: Any = None


@dataclass(frozen=True, slots=True)
class Frozen:
    x: torch.Tensor
    made: int = field(init=False, default=3)


@attrs.define
class WithAttrs:
    x: torch.Tensor
    _hidden: torch.Tensor = attrs.field(factory=lambda: torch.ones(2))


class Encoding(UserDict):
    """As those of tokenizers: a mapping with attributes and a method ``to``."""

    def __init__(self, data, encodings=None):
        super().__init__(data)
        self.encodings = encodings

    def __getattr__(self, name):
        if name in self.__dict__.get("data", {}):
            return self.data[name]
        raise AttributeError(name)

    def to(self, device):
        self.data = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in self.data.items()}
        return self


class MovesInPlace:
    def __init__(self):
        self.x = torch.ones(2)

    def to(self, device):
        self.x = self.x.to(device)


class Names(list):
    origin = None


class Triple(tuple):
    def __new__(cls, a, b, c):
        return super().__new__(cls, (a, b, c))


class Output(collections.OrderedDict):
    """Items and attributes are the same."""

    def __setitem__(self, key, value):
        super().__setitem__(key, value)
        self.__dict__[key] = value


class ReadOnly(collections.abc.Mapping):
    def __init__(self, *, items):
        self._items = items

    def __getitem__(self, key):
        return self._items[key]

    def __iter__(self):
        return iter(self._items)

    def __len__(self):
        return len(self._items)


def one():
    return torch.ones(2)


def names():
    made = Names([one(), "a"])
    made.origin = "here"
    return made


def counts():
    made = defaultdict(int)
    made["x"] = one()
    return made


def output():
    made = Output()
    made["loss"] = one()
    return made


BATCHES = {
    "tensor": (one, lambda b: b),
    "scalar tensor": (lambda: [torch.tensor(1.0), one()], lambda b: b[0]),
    "tuple": (lambda: (one(), 3, None, "a"), lambda b: b[0]),
    "namedtuple": (lambda: Pair(one(), [one()]), lambda b: b.y[0]),
    "tuple of its own class": (lambda: Triple(one(), 2, "c"), lambda b: b[0]),
    "list of its own class": (names, lambda b: b[0]),
    "dict": (lambda: {"a": {"b": one()}, "n": 1}, lambda b: b["a"]["b"]),
    "defaultdict": (counts, lambda b: b["x"]),
    "attributes and items": (output, lambda b: b.loss),
    "mapping proxy": (lambda: types.MappingProxyType({"x": one()}), lambda b: b["x"]),
    "dataclass": (lambda: Graph(one(), ["a", one(), np.ones(2)], torch.tensor(2)), lambda b: b.names[1]),
    "frozen dataclass": (lambda: Frozen(one()), lambda b: b.x),
    "attrs": (lambda: WithAttrs(one()), lambda b: b._hidden),
    "packed sequence": (lambda: [pack_sequence([one(), one()[:1]])], lambda b: b[0].data),
    "tokenizer's": (lambda: {"text": Encoding({"ids": one(), "raw": "a"}, ["e"])}, lambda b: b["text"].ids),
    "moves in place": (MovesInPlace, lambda b: b.x),
}


@pytest.mark.parametrize("name", BATCHES)
def test_a_batch_is_moved_and_keeps_its_class_and_what_else_it_holds(name):
    make, inner = BATCHES[name]
    moved = to_device(make(), META)
    assert type(moved) is type(make()) and inner(moved).device.type == "meta"


@pytest.mark.parametrize("name", BATCHES)
def test_a_batch_that_is_there_already_is_the_same_object(name):
    batch = BATCHES[name][0]()
    assert to_device(batch, CPU) is batch


def test_what_is_no_tensor_stays_and_what_a_batch_was_made_of_is_not_changed():
    for thing in (3, "a", b"b", None, 1.5, np.ones(2), object, range(3), {1, 2}, types.SimpleNamespace(x=1)):
        assert to_device([thing], META)[0] is thing
    batch = Graph(one(), [one()])
    moved = to_device(batch, META)
    assert batch.x.device.type == batch.names[0].device.type == "cpu" and moved.more is None
    assert to_device(names(), META).origin == "here"
    assert to_device(counts(), META)["other"] == 0
    assert to_device(Encoding({"ids": one()}, ["e"]), META).encodings == ["e"]
    assert isinstance(to_device(pack_sequence([one()]), META), PackedSequence)


def test_a_class_that_cannot_be_made_with_other_items_is_named():
    with pytest.raises(ConfigError, match=r"class ReadOnly .*method to\(self, device\)"):
        to_device(ReadOnly(items={"x": one()}), META)


@pytest.mark.parametrize("value", [4, np.int64(4), np.uint8(4), torch.tensor(4), torch.tensor([4])])
def test_whole_numbers_of_all_kinds_are_plain_ones(value):
    number = whole_number(value, "size={}")
    assert number == 4 and type(number) is int


@pytest.mark.parametrize(
    "value", [0, -1, 4.0, "4", None, True, np.float32(4), torch.tensor(4.0), np.bool_(True), torch.tensor([1, 2])]
)
def test_what_is_no_whole_number_is_named(value):
    with pytest.raises(ConfigError, match=r"size=.* is not valid: allowed is a whole number from 1"):
        whole_number(value, "size={}")
