"""The codecs under torch's plain DistributedDataParallel, over gloo."""

import gc
import threading
import weakref

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from raytrain_het.allreduce.ddp_hook import CompressedState, compressed_hook

SIZE, STEPS = 3, 12
FED = "(error_feedback=true)"


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 60), nn.Tanh(), nn.Linear(60, 50), nn.Tanh(), nn.Linear(50, 40))


def train(rank, directory, codecs):
    torch.set_num_threads(1)
    models = {codec: net().double() if codec == "none" else net() for codec, _ in codecs}
    # Frameworks are handed a state before they make the process group.
    early = {codec: CompressedState(model, codec) for codec, model in models.items() if codec in ("none", "sign")}
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=SIZE)
    found = {}
    for codec, bucket_mb in codecs:
        model = models[codec]
        ddp = DistributedDataParallel(model, bucket_cap_mb=bucket_mb)
        state = early.get(codec) or CompressedState(model, codec)
        assert state.bytes_sent == 0
        assert state.state_dict() == {}
        ddp.register_comm_hook(state, compressed_hook)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        generator = torch.Generator().manual_seed(rank)
        for step in range(STEPS):
            samples = 2 + rank + step % 2
            x = torch.randn(samples, 40, generator=generator).to(next(model.parameters()).dtype)
            state.weight, state.loss_scale = samples, 2.0**step if codec == "bf16" else 1.0
            optimizer.zero_grad()
            loss = (ddp(x) - x).square().mean() * state.loss_scale
            before = {name: v["residual"].clone() for name, v in state.state_dict().items()}
            (loss * float("nan") if (step, rank) == (5, 1) and codec == "int8" + FED else loss).backward()
            for p in model.parameters():
                p.grad /= state.loss_scale
            if all(p.grad.isfinite().all() for p in model.parameters()):
                optimizer.step()
            else:
                found[f"{codec} skipped"] = step
                assert all(torch.equal(v["residual"], before[name]) for name, v in state.state_dict().items())
        found[codec] = torch.cat([p.detach().view(-1) for p in model.parameters()])
        found[f"{codec} bytes"] = state.bytes_sent
        found[f"{codec} state"] = {name: float(v["residual"].norm()) for name, v in state.state_dict().items()}
    torch.save(found, f"{directory}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def reference():
    """One process with all samples."""
    model = net().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    generators = [torch.Generator().manual_seed(rank) for rank in range(SIZE)]
    for step in range(STEPS):
        x = torch.cat([torch.randn(2 + rank + step % 2, 40, generator=g).double() for rank, g in enumerate(generators)])
        optimizer.zero_grad()
        (model(x) - x).square().mean().backward()
        optimizer.step()
    return torch.cat([p.detach().view(-1) for p in model.parameters()])


def test_codecs_under_ddp_give_the_weighted_mean_and_identical_replicas(tmp_path):
    many, one = 0.001, 25
    codecs = {"none": many, "bf16": one, "int8" + FED: many, "topk(density=0.2)": many, "sign": one, "lowrank": many}
    codecs |= {"int8": one, "topk(density=0.1)": one}
    mp.start_processes(train, (str(tmp_path), list(codecs.items())), nprocs=SIZE, start_method="forkserver")
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(SIZE)]
    expected = reference()
    for codec in codecs:
        assert all(torch.equal(found[0][codec], other[codec]) for other in found[1:]), codec
    torch.testing.assert_close(found[0]["none"], expected, rtol=1e-12, atol=1e-14)
    moved = (expected - torch.cat([p.detach().view(-1) for p in net().double().parameters()])).norm()
    for codec, part in (("bf16", 0.02), ("topk(density=0.2)", 0.5), ("sign", 0.6), ("lowrank", 0.5)):
        assert (found[0][codec] - expected).norm() < part * moved, codec
    assert found[0][f"int8{FED} skipped"] == found[2][f"int8{FED} skipped"] == 5, "a NaN on one process reaches all"
    assert found[0]["bf16 bytes"] > 1.6 * found[0]["int8 bytes"] > 1.6 * 2 * found[0]["topk(density=0.1) bytes"]
    assert set(found[0]["topk(density=0.2) state"]) == {"0.weight", "2.weight", "4.weight"}, "biases travel dense"
    assert all(norm > 0 for norm in found[0]["topk(density=0.2) state"].values())


def test_what_is_remembered_follows_parameters_when_they_are_dealt_out_anew(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = nn.ParameterDict({name: nn.Parameter(torch.zeros(40, 50)) for name in "abcd"})
        state = CompressedState(model, "sign")

        def step(state, *buckets):
            for names in buckets:
                flat = torch.randn(2000 * len(names))
                gradients = [part.view(40, 50) for part in flat.split(2000)]
                state.reduce(0, [model[name] for name in names], flat, gradients).wait()

        def remembered(state):
            return {name: values["residual"] for name, values in state.state_dict().items()}

        step(state, "dc", "ba")
        before = remembered(state)
        state._make_bucket(tuple("cb"), [model[name] for name in "cb"])
        assert set(remembered(state)) == set("abcd")
        assert all(torch.equal(remembered(state)[name], before[name]) for name in "abcd")
        step(state, "cb", "da")
        assert all(not torch.equal(remembered(state)[name], before[name]) for name in "abcd"), "gone on with"
        saved = remembered(state)
        other = CompressedState(model, "sign")
        other.load_state_dict(state.state_dict())
        other._make_bucket(tuple("ad"), [model[name] for name in "ad"])
        loaded = {name: values["residual"] for name, values in other.state_dict().items()}
        assert all(torch.equal(loaded[name], saved[name]) for name in "abcd")
        thread = next(t for t in threading.enumerate() if t.name == "het-ddp-hook")
        weakly = weakref.ref(state)
        del state, other
        gc.collect()
        assert weakly() is None
        thread.join(10)
        assert not thread.is_alive()
    finally:
        dist.destroy_process_group()


def test_a_parameter_that_nobody_used_keeps_what_is_left_of_it_and_a_wrong_weight_is_told(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = nn.ParameterDict({name: nn.Parameter(torch.zeros(40, 50)) for name in "ab"})
        state = CompressedState(model, "sign")

        def step(*scales):
            gradients = [torch.full((40, 50), float(scale)).cumsum(0) for scale in scales]
            state.reduce(0, list(model.values()), torch.zeros(1), gradients).wait()
            return gradients

        step(1, 1)
        before = state.state_dict()
        a, b = step(1, 0)
        after = state.state_dict()
        assert not b.any()
        assert a.any()
        assert torch.equal(after["b"]["residual"], before["b"]["residual"])
        assert not torch.equal(after["a"]["residual"], before["a"]["residual"])
        for weight in (float("nan"), -1, float("inf")):
            state.weight = weight
            with pytest.raises(ValueError, match="allowed is a finite weight"):
                step(1, 1)
    finally:
        dist.destroy_process_group()
