"""What of a replica is looked at when, and that everything is."""

import pytest
import torch
from torch import nn

from raytrain_het.worker.state import replica_check
from raytrain_het.worker.state.replica import Replica
from raytrain_het.worker.state.replica_check import ReplicaCheck


def replica(seed=0, width=40):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(7, width), nn.BatchNorm1d(width), nn.Linear(width, 1))
    made = Replica(model, torch.optim.Adam(model.parameters(), lr=0.1))
    average = nn.Linear(3, 3)
    made.registered.add("average", average)
    made.registered.add("scheduler", torch.optim.lr_scheduler.StepLR(made.optimizer, 3))
    made.model(torch.randn(4, 7)).sum().backward()
    made.optimizer.step()
    return made


def look(check, of, step=0):
    found = check.look(step, of.light(), {})
    return found.digest(), found.numbers


def everything(of):
    """All tensors that must be looked at, with something that changes them."""
    model, optimizer = of.model, of.optimizer
    yield from ((name, p.data) for name, p in model.named_parameters())
    yield from ((f"buffer {name}", b) for name, b in model.named_buffers())
    names = {id(p): name for name, p in model.named_parameters()}
    for p, state in optimizer.state.items():
        yield from ((f"{key} of {names[id(p)]}", value) for key, value in state.items())
    yield from (
        (f"registered average.{name}", p.data) for name, p in of.registered.objects["average"].named_parameters()
    )


NAMES = [name for name, _ in everything(replica())]


@pytest.mark.parametrize("name", NAMES)
def test_one_changed_element_of_anything_is_seen_and_named(name):
    of, other = replica(), replica()
    check, its = (ReplicaCheck(r, every=50, everything=False) for r in (of, other))
    assert look(check, of) == look(its, other)
    tensor = dict(everything(other))[name]
    with torch.no_grad():
        tensor.view(-1)[-1] += 1
    one, two = check.look(1, of.light(), {}), its.look(1, other.light(), {})
    assert one.digest() != two.digest()
    differing = [a for a, b in zip(check.audit(one)["tensors"], its.audit(two)["tensors"], strict=True) if a != b]
    assert [n for n, _ in differing] == [name]


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda r: r.optimizer.param_groups[0].update(lr=0.2), "lr of parameter group 0"),
        (lambda r: r.optimizer.param_groups[0].update(betas=(0.9, 0.9)), "betas.1 of parameter group 0"),
        (lambda r: r.model[0].weight.requires_grad_(False), "which parameters have requires_grad"),
        (lambda r: r.model[1].eval(), "which modules are in training mode"),
        (lambda r: setattr(r.registered.objects["scheduler"], "last_epoch", 7), "registered scheduler.last_epoch"),
    ],
)
def test_a_changed_number_is_seen_at_once_and_named(change, name):
    of, other = replica(), replica()
    check, its = (ReplicaCheck(r, every=50, everything=False) for r in (of, other))
    change(other)
    one, two = check.look(0, of.light(), {}), its.look(0, other.light(), {})
    assert one.numbers != two.numbers
    differing = [a for a, b in zip(check.audit(one)["numbers"], its.audit(two)["numbers"], strict=True) if a != b]
    assert name in [n for n, _ in differing]


@pytest.mark.parametrize("every", [1, 7, 50])
def test_every_byte_is_looked_at_within_a_period(every, monkeypatch):
    of = replica(width=900)
    check = ReplicaCheck(of, every=every, everything=False)
    for step in range(replica_check.EAGER_STEPS):
        check.look(step, of.light(), {})
    while check._at < len(check._tensors):
        check.look(0, of.light(), {})
    seen: dict[str, int] = {}
    digest = replica_check._digest

    def counted(piece):
        seen["bytes"] = seen.get("bytes", 0) + len(piece)
        return digest(piece)

    monkeypatch.setattr(replica_check, "_digest", counted)
    for step in range(every):
        check.look(step, of.light(), {})
    total = sum(t.numel() * t.element_size() for _, t in everything(of))
    assert total * 0.99 <= seen["bytes"] and total < every * replica_check.STEADY_BYTES


def test_a_step_looks_at_no_more_than_it_may():
    of = replica(width=120_000)
    check = ReplicaCheck(of, every=1, everything=False)
    read = []
    for step in range(8):
        found = check.look(step, of.light(), {})
        read.append(len(found.pieces))
    total = sum(t.numel() * t.element_size() for _, t in everything(of))
    assert total > 3 * replica_check.EAGER_BYTES and len(read) == 8 and max(read) < len(NAMES)


def test_restarted_ones_look_at_the_same_however_far_one_was():
    of, other = replica(), replica()
    check, its = (ReplicaCheck(r, every=50, everything=False) for r in (of, other))
    for step in range(33):
        check.look(step, of.light(), {})
    check.restart()
    its.restart()
    assert [look(check, of, k) for k in range(5)] == [look(its, other, k) for k in range(5)]


def test_memory_formats_and_scalers_make_no_difference():
    both = []
    for memory_format, scale in ((torch.contiguous_format, 2.0), (torch.channels_last, 8.0)):
        torch.manual_seed(0)
        model = nn.Conv2d(3, 4, 2).to(memory_format=memory_format)
        both.append(Replica(model, torch.optim.SGD(model.parameters(), lr=0.1)))
        both[-1].registered.add("scaler", torch.amp.GradScaler("cpu", init_scale=scale))
    of, other = both
    check, its = (ReplicaCheck(r, every=50, everything=False) for r in (of, other))
    assert look(check, of) == look(its, other)
