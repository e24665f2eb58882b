"""A replica that takes over a snapshot is the one it is from, in memory too, or says by name why it cannot be."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from raytrain_het.errors import CheckpointError
from raytrain_het.worker.state.replica import Replica


def replica_of(
    model: nn.Module, make: Callable[..., torch.optim.Optimizer] = torch.optim.Adam, **options: Any
) -> Replica:
    return Replica(model, make(model.parameters(), lr=0.1, **options))


def conv(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3)).to(memory_format=torch.channels_last)


def train(replica: Replica, steps: int = 3) -> None:
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).to(memory_format=torch.channels_last)
    for _ in range(steps):
        replica.optimizer.zero_grad()
        replica.model(x).square().mean().backward()
        replica.optimizer.step()


def contiguous(snapshot: dict[str, Any]) -> dict[str, Any]:
    """The same state as it lies in memory after a way that knows no strides."""
    state = {
        k: {n: v.contiguous() if isinstance(v, torch.Tensor) else v for n, v in values.items()}
        for k, values in snapshot["optimizer"]["state"].items()
    }
    return {**snapshot, "optimizer": {**snapshot["optimizer"], "state": state}}


@pytest.mark.parametrize("change", [lambda s: s, contiguous], ids=["as it was", "contiguous"])
def test_a_fused_optimizers_state_has_its_parameters_strides_after_a_load(change: Callable[..., Any]) -> None:
    one, other = replica_of(conv(0), fused=True), replica_of(conv(1), fused=True)
    train(one)
    other.load(change(one.snapshot()))
    assert other.optimizer is not None
    for p, state in other.optimizer.state.items():
        assert {v.stride() for v in state.values() if v.shape == p.shape} == {p.stride()}
    train(one)
    train(other)
    assert other.digest(optimizer=True) == one.digest(optimizer=True)


def test_a_snapshot_can_be_loaded_by_several_and_stays_what_it_is() -> None:
    one, two, three = (replica_of(conv(seed)) for seed in range(3))
    train(one)
    snapshot = one.snapshot()
    two.load(snapshot)
    train(two)
    three.load(snapshot)
    assert three.digest(optimizer=True) == one.digest(optimizer=True)


class Master(torch.optim.SGD):
    """Keeps an average in fp32 of parameters in bf16, a mask, a count and a word."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p].setdefault("average", torch.full_like(p, 1 / 3, dtype=torch.float32))
                self.state[p].setdefault("mask", torch.tensor([True, False]))
                self.state[p].setdefault("count", torch.tensor(2**40 + 1))
                self.state[p].setdefault("inner", {"mode": "warm", "t": [torch.tensor(1e-9, dtype=torch.float64)]})


def test_a_state_of_another_type_than_its_parameter_keeps_it() -> None:
    one, other = (replica_of(nn.Linear(2, 2).bfloat16(), Master) for _ in range(2))
    assert one.optimizer is not None and other.optimizer is not None
    one.optimizer.step()
    other.load(one.snapshot())
    for mine, theirs in zip(other.optimizer.state.values(), one.optimizer.state.values(), strict=True):
        for name in ("average", "mask", "count"):
            assert mine[name].dtype == theirs[name].dtype
            assert torch.equal(mine[name], theirs[name])
        assert mine["inner"]["mode"] == "warm"
        assert torch.equal(mine["inner"]["t"][0], theirs["inner"]["t"][0])


class Buffers(nn.Module):
    """Buffers that the state dictionary leaves out, and ones whose elements share memory."""

    def __init__(self, value: float, *, size: int = 2, empty: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((2,), value))
        self.register_buffer("saved", torch.full((size,), value))
        self.register_buffer("unsaved", None if empty else torch.full((size,), value), persistent=False)
        self.register_buffer("expanded", torch.full((1,), value).expand(3))
        self.register_buffer("unsaved_expanded", torch.full((2, 1), value).expand(2, 5), persistent=False)
        self.register_buffer("windows", torch.arange(4.0).mul(value).unfold(0, 2, 1))


def test_buffers_that_are_not_in_the_state_dictionary_and_expanded_ones_come_back() -> None:
    one, other = replica_of(Buffers(3.0)), replica_of(Buffers(1.0))
    other.load(one.snapshot())
    assert one.model is not None and other.model is not None
    mine, theirs = dict(other.model.named_buffers()), dict(one.model.named_buffers())
    assert list(mine) == list(theirs)
    for name, buffer in mine.items():
        assert torch.equal(buffer, theirs[name]), name
    assert other.model.expanded.stride() == (0,)
    assert other.model.unsaved_expanded.stride() == (1, 0)


def test_a_snapshot_without_unsaved_buffers_leaves_them() -> None:
    one, other = replica_of(Buffers(3.0)), replica_of(Buffers(1.0))
    snapshot = one.snapshot()
    for name in ("buffers", "groups", "optimizer_class"):  # As in checkpoints of format 1.
        del snapshot[name]
    other.load(snapshot)
    assert torch.equal(other.model.saved, torch.full((2,), 3.0))
    assert torch.equal(other.model.unsaved, torch.full((2,), 1.0))


def grouped(*sizes: int) -> Replica:
    replica = replica_of(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    left = list(replica.model.parameters())
    groups = [{"params": [left.pop(0) for _ in range(size)]} for size in sizes]
    replica.optimizer = torch.optim.Adam(groups)
    return replica


def reversed_order() -> Replica:
    replica = grouped(4)
    replica.optimizer = torch.optim.Adam(list(replica.model.parameters())[::-1])
    return replica


@pytest.mark.parametrize(
    ("there", "here", "says"),
    [
        (
            Buffers(1.0),
            nn.Linear(2, 2),
            "it has no 'bias'; 'weight' .*it has a 'saved' that the model lacks.*and 4 more",
        ),
        (Buffers(1.0, size=4), Buffers(1.0), r"'saved' has shape \[4\] there and \[2\] here; 'unsaved' has shape"),
        (Buffers(1.0), Buffers(1.0, empty=True), r"buffer 'unsaved' is None here and of shape \[2\] there"),
        (Buffers(1.0, empty=True), Buffers(1.0), r"buffer 'unsaved' is None there and of shape \[2\] here"),
    ],
)
def test_a_state_of_another_model_is_refused_by_name_and_changes_nothing(
    there: nn.Module, here: nn.Module, says: str
) -> None:
    one, other = replica_of(there), replica_of(here)
    before = {name: t.clone() for name, t in here.state_dict().items()}
    with pytest.raises(CheckpointError, match=f"from another program: .*{says}.*Build the same model"):
        other.load(one.snapshot())
    assert all(torch.equal(before[name], t) for name, t in here.state_dict().items())


@pytest.mark.parametrize(
    ("there", "here", "says"),
    [
        (grouped(4), grouped(1, 3), r"parameter groups of \[4\] parameters, here they have \[1, 3\]"),
        (grouped(2, 2), reversed_order(), r"parameter groups of \[2, 2\] parameters, here they have \[4\]"),
        (grouped(4), reversed_order(), "group 0 of its optimizer has '0.weight' where there is '1.bias' here"),
        (grouped(4), replica_of(grouped(4).model, torch.optim.SGD), "its optimizer is Adam, here it is SGD"),  # type: ignore[arg-type]
        (grouped(4), replica_of(grouped(4).model, torch.optim.AdamW), "its optimizer is Adam, here it is AdamW"),  # type: ignore[arg-type]
    ],
)
def test_a_state_of_another_optimizer_is_refused_by_name(there: Replica, here: Replica, says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        here.load(there.snapshot())


def test_an_older_state_of_another_optimizer_is_refused_by_its_settings() -> None:
    snapshot = grouped(4).snapshot()
    del snapshot["optimizer_class"], snapshot["groups"]
    other = replica_of(grouped(4).model, torch.optim.SGD, momentum=0.9)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="another one, without dampening, momentum, nesterov"):
        other.load(snapshot)


class Holder:
    """A registered object whose state is what it is given."""

    def __init__(self, state: dict[str, Any]) -> None:
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


def test_registered_tensors_of_every_kind_keep_type_and_strides() -> None:
    kinds = {
        "strides": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "expanded": torch.ones(3, 1).expand(3, 4),
        "zero": torch.tensor(2.0),
        "empty": torch.empty(0, 2),
        "bf16": torch.ones(2).bfloat16(),
        "fp8": torch.ones(2).to(torch.float8_e4m3fn),
        "complex": torch.ones(2, dtype=torch.complex64).conj(),
        "bool": torch.tensor([True, False]),
        "sparse": torch.eye(2).to_sparse(),
    }
    one, other = replica_of(nn.Linear(1, 1)), replica_of(nn.Linear(1, 1))
    one.registered.add("kinds", Holder(kinds))
    other.registered.add("kinds", Holder({}))
    one.check_storable()
    other.load(one.snapshot())
    for name, t in other.registered.objects["kinds"].state.items():
        assert t.dtype == kinds[name].dtype
        if name != "sparse":
            assert t.stride() == kinds[name].stride(), name
            assert torch.equal(t.to(torch.complex64), kinds[name].to(torch.complex64))
    other.registered.objects["kinds"].state["strides"] += 1  # It is a copy.
    assert not torch.equal(other.registered.objects["kinds"].state["strides"], kinds["strides"])


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (threading.Lock(), "the state of 'mine' cannot be copied.*plain values from its state_dict"),
        (
            torch.ones(1, device="meta"),
            r"registered state 'mine': it\['deep'\]\[0\] is a tensor without data|cannot be",
        ),
        (lambda: None, r"registered state 'mine': it\['deep'\]\[0\] is a function that cannot be stored"),
    ],
)
def test_registered_state_that_cannot_be_stored_is_named_at_the_beginning(value: Any, says: str) -> None:
    replica = replica_of(nn.Linear(1, 1))
    replica.registered.add("mine", Holder({"deep": [value]}))
    with pytest.raises(CheckpointError, match=says):
        replica.check_storable()
