"""What heals and is checkpointed: the whole of it, and the light part that a step done again starts from."""

from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn

from raytrain_het.errors import CheckpointError, ConfigError, LoopOrderError
from raytrain_het.worker.state.registered import RegisteredState
from raytrain_het.worker.state.replica import ROW, Replica


def replica_of(seed: int = 0, *, dtype: torch.dtype = torch.float32, register: bool = True) -> Replica:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)).to(dtype)
    replica = Replica(model, torch.optim.Adam(model.parameters(), lr=0.1))
    if register:
        replica.registered.add("schedule", torch.optim.lr_scheduler.StepLR(replica.optimizer, 1, gamma=0.5))
    return replica


def train(replica: Replica, steps: int = 2, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(8, 4, generator=generator).to(next(replica.model.parameters()).dtype)
        replica.optimizer.zero_grad()
        replica.model(x).square().mean().backward()
        replica.optimizer.step()
        for schedule in replica.registered.objects.values():
            schedule.step()


def test_a_snapshot_makes_another_replica_equal_and_it_trains_on_alike() -> None:
    one, other = replica_of(0), replica_of(1)
    train(one)
    other.load(one.snapshot())
    assert other.digest(optimizer=True) == one.digest(optimizer=True)
    assert other.registered.objects["schedule"].state_dict() == one.registered.objects["schedule"].state_dict()
    for replica in (one, other):
        train(replica, 3, seed=5)
    assert other.digest(optimizer=True) == one.digest(optimizer=True)


def test_a_snapshot_does_not_move_with_the_model_unless_asked_to_share() -> None:
    replica = replica_of()
    train(replica)
    kept, shared = replica.snapshot(), replica.snapshot(copy_tensors=False)
    before = copy.deepcopy(kept)
    train(replica)
    for part in ("model", "optimizer", "registered"):
        torch.testing.assert_close(kept[part], before[part], rtol=0, atol=0)
    assert not torch.equal(shared["model"]["0.weight"], before["model"]["0.weight"])


class Elsewhere(torch.Tensor):
    """A tensor that becomes a plain one when it is brought to the CPU: a stand-in for one on a GPU."""

    def to(self, *args: object, **kwargs: object) -> torch.Tensor:  # type: ignore[override]
        assert args == ("cpu",)
        return self.as_subclass(torch.Tensor).to("cpu", copy=True)


def test_a_snapshot_holds_all_tensors_of_registered_objects_on_the_cpu() -> None:
    class Average:
        def state_dict(self) -> dict[str, object]:
            t = torch.ones(2).as_subclass(Elsewhere)
            return {"shadow": OrderedDict(a=t, b=[t, ("text", {"c": torch.ones(1).as_subclass(Elsewhere)})])}

        def load_state_dict(self, state: dict[str, object]) -> None:
            pass

    replica = replica_of()
    replica.registered.add("average", Average())
    shadow = replica.snapshot()["registered"]["average"]["shadow"]
    assert type(shadow) is OrderedDict
    assert type(shadow["a"]) is torch.Tensor
    assert type(shadow["b"][1][1]["c"]) is torch.Tensor
    assert shadow["b"][0] is shadow["a"]


def test_registered_tensors_are_copied_as_what_they_are() -> None:
    class Kinds:
        def __init__(self) -> None:
            self.state = {
                "plain": torch.ones(2),
                "parameters": [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2), requires_grad=False)],
                "leaf": (torch.ones(2, requires_grad=True), torch.arange(3)),
            }

        def state_dict(self) -> dict[str, object]:
            return self.state

        def load_state_dict(self, state: dict[str, object]) -> None:
            self.state = state

    replica, kinds = replica_of(), Kinds()
    replica.registered.add("kinds", kinds)
    live = kinds.state
    flat = [live["plain"], *live["parameters"], *live["leaf"]]
    light, snapshot = replica.light(), replica.snapshot()
    for take_over in (lambda: replica.restore_light(light), lambda: replica.load(snapshot)):
        take_over()
        got = [kinds.state["plain"], *kinds.state["parameters"], *kinds.state["leaf"]]
        for old, new in zip(flat, got, strict=True):
            assert type(new) is type(old)
            assert new.requires_grad == old.requires_grad
            assert torch.equal(new, old)
            assert new.data_ptr() != old.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_digest_knows_every_bit_of_every_parameter(dtype: torch.dtype) -> None:
    replica = replica_of(dtype=dtype)
    digest = replica.digest()
    for parameter in replica.model.parameters():
        bits = (
            parameter.detach().view(-1).view({2: torch.int16, 4: torch.int32, 8: torch.int64}[parameter.element_size()])
        )
        bits[0] += 1
        assert replica.digest() != digest
        bits[0] -= 1
    assert replica.digest() == digest
    assert 0 < digest < 2**63


def test_the_digest_knows_which_parameter_holds_what() -> None:
    model = nn.ParameterList([torch.zeros(3), torch.ones(3)])
    replica = Replica(model, torch.optim.SGD(model.parameters()))
    digest = replica.digest()
    replica.model[0].data, replica.model[1].data = replica.model[1].data, replica.model[0].data
    assert replica.digest() != digest


def wide(dtype: torch.dtype = torch.float32) -> Replica:
    torch.manual_seed(0)
    model = nn.Linear(50, 20).to(dtype)
    return Replica(model, torch.optim.SGD(model.parameters()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_digest_knows_any_set_of_last_bits_that_differ(dtype: torch.dtype) -> None:
    """Roundings that differ here and there, up and down: their plain sum is often 0."""
    replica = wide(dtype)
    size = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    bits = replica.model.weight.detach().view(-1).view(size)
    before, generator, seen = bits.clone(), torch.Generator().manual_seed(0), {replica.digest()}
    for _ in range(2000):
        bits.copy_(before + torch.randint(-1, 2, bits.shape, generator=generator).to(size))
        seen.add(replica.digest())
    assert len(seen) == 2001


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_digest_knows_places_and_signs(dtype: torch.dtype) -> None:
    replica = wide(dtype)
    weight = replica.model.weight.detach()
    before, seen, changes = weight.clone(), {replica.digest()}, 1
    for i in range(20):
        for k in range(i):
            weight.copy_(before)
            weight[[i, k]] = before[[k, i]]  # Rows in other places.
            seen.add(replica.digest())
            weight.copy_(before)
            weight[[i, k], 1] *= -1  # Two signs.
            seen.add(replica.digest())
            changes += 2
    assert len(seen) == changes


def test_the_digest_knows_rows_beyond_the_first_and_their_order() -> None:
    values = torch.randn(2 * ROW * 3 + 5, generator=torch.Generator().manual_seed(0))
    model = nn.ParameterList([values])
    replica = Replica(model, torch.optim.SGD(model.parameters()))
    weight, seen = replica.model[0].detach(), {replica.digest()}
    for place in (2 * ROW - 1, 2 * ROW, 5 * ROW, len(values) - 1):
        weight[place] *= 1 + 2**-20
        seen.add(replica.digest())
    weight[: 4 * ROW] = weight[: 4 * ROW].roll(2 * ROW)
    seen.add(replica.digest())
    assert len(seen) == 6


def test_the_digest_depends_on_values_alone_not_on_where_they_lie_in_memory() -> None:
    plain, strided = wide(), wide()
    weight = plain.model.weight.detach()
    strided.model.weight.data = weight.t().contiguous().t()
    strided.model.bias.data = torch.cat([torch.zeros(1), plain.model.bias.detach()])[1:]
    assert strided.digest() == plain.digest()


def test_buffers_are_no_part_of_the_digest() -> None:
    replica = replica_of()
    digest = replica.digest(optimizer=True)
    replica.model[1].running_mean += 1
    assert replica.digest(optimizer=True) == digest


def test_the_digest_knows_the_optimizers_state_if_asked() -> None:
    replica = replica_of()
    train(replica)
    plain, full = replica.digest(), replica.digest(optimizer=True)
    next(iter(replica.optimizer.state.values()))["exp_avg"].view(-1)[0] += 1
    assert replica.digest() == plain
    assert replica.digest(optimizer=True) != full


def test_the_light_part_takes_back_buffers_schedules_and_settings_but_no_parameters() -> None:
    replica = replica_of()
    train(replica)
    light = replica.light()
    rate, mean = replica.optimizer.param_groups[0]["lr"], replica.model[1].running_mean.clone()
    train(replica)
    moved = replica.digest()
    for _ in range(2):  # What it goes back to must not move either.
        replica.restore_light(light)
        assert replica.optimizer.param_groups[0]["lr"] == rate
        assert torch.equal(replica.model[1].running_mean, mean)
        assert replica.registered.objects["schedule"].last_epoch == 2
        assert replica.digest() == moved
        replica.registered.objects["schedule"].step()
        replica.model[1].running_mean += 1


def test_tensor_settings_are_restored_in_place() -> None:
    replica = replica_of(register=False)
    rate = torch.tensor(0.1)
    replica.optimizer.param_groups[0]["lr"] = rate
    kept = replica.hyperparameters()
    rate.fill_(7.0)
    replica.set_hyperparameters(kept)
    assert replica.optimizer.param_groups[0]["lr"] is rate
    assert float(rate) == pytest.approx(0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_parameters_come_back_with_the_drift(dtype: torch.dtype) -> None:
    one, other = replica_of(0, dtype=dtype), replica_of(0, dtype=dtype)
    with torch.no_grad():
        other.model[0].bias[1] += 0.5
    data = one.pack_parameters()
    assert data.numel() == one.parameter_bytes()
    assert other.unpack_parameters(data) == pytest.approx(0.5, abs=0.01)
    assert other.digest() == one.digest()
    assert other.unpack_parameters(data) == 0.0


def test_what_has_no_state_dict_cannot_be_registered() -> None:
    with pytest.raises(ConfigError, match=r"register_state\('ema', ...\) got a list"):
        RegisteredState().add("ema", [1])


def test_a_name_is_for_one_object() -> None:
    replica = replica_of()
    replica.registered.add("schedule", replica.registered.objects["schedule"])
    with pytest.raises(ConfigError, match="the name is taken"):
        replica.registered.add("schedule", nn.Linear(1, 1))


def test_state_registered_after_the_first_step_is_refused() -> None:
    replica = replica_of()
    light = replica.light()
    replica.registered.add("late", nn.Linear(1, 1))
    with pytest.raises(LoopOrderError, match="'late' was registered after the first step"):
        replica.restore_light(light)


@pytest.mark.parametrize(("there", "here"), [(["ema"], []), ([], ["ema"]), (["ema"], ["average"])])
def test_a_state_with_other_registered_objects_is_refused_and_changes_nothing(
    there: list[str], here: list[str]
) -> None:
    one, other = replica_of(0), replica_of(1)
    for replica, names in ((one, there), (other, here)):
        for name in names:
            replica.registered.add(name, nn.Linear(1, 1))
    before = other.digest()
    with pytest.raises(CheckpointError, match=r"\['average', 'ema'\]|\['ema'\] would not be restored.*same names"):
        other.load(one.snapshot())
    assert other.digest() == before
