"""What codecs leave out is sent later: nothing of any gradient is lost, whoever owns what, and however steps end."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from collectives_fakes import Reduction, record_of

from raytrain_het.allreduce.codecs import codec_of
from raytrain_het.allreduce.codecs.base import RESIDUAL
from raytrain_het.allreduce.error_feedback import ErrorFeedback
from raytrain_het.allreduce.header import HeaderFormat
from raytrain_het.allreduce.layout import Layout
from raytrain_het.errors import ProtocolError

pytestmark = pytest.mark.usefixtures("shards_of_any_size")

LAYOUT = Layout([("a", torch.zeros(30, 50)), ("b", torch.zeros(700)), ("c", torch.zeros(9))], [], 4000)
NUMEL = sum(bucket.numel for bucket in LAYOUT.buckets)
FED_BACK = [
    "sign",
    "topk(density=0.05)",
    "randomk(density=0.1)",
    "int4(error_feedback=true)",
    "lowrank",
    "topk(density=0.05, all_gather=true)",
]


def residual(states: ErrorFeedback) -> torch.Tensor:
    """(NUMEL,) in the layout's order."""
    by_name = states.by_parameter()
    parts = [by_name.get(s.name, {}).get(RESIDUAL, torch.zeros(s.numel)) for b in LAYOUT.buckets for s in b.segments]
    return torch.cat(parts).double()


class Fleet:
    """Four workers over generations: what they wanted to add up, what they did, and what they still hold."""

    def __init__(self, seed: int, normalised: bool = True) -> None:
        self.rng, self.torch_rng = random.Random(seed), torch.Generator().manual_seed(seed)
        self.states = [ErrorFeedback(LAYOUT) for _ in range(4)]
        self.wanted, self.applied = torch.zeros(NUMEL).double(), torch.zeros(NUMEL).double()
        self.normalised, self.step = normalised, 0

    def generation(self, codecs: list[str]) -> Reduction:
        """Other shares and owners; some workers send nothing, some own nothing."""
        shares = [float(self.rng.choice([0, 1, 2, 5])) for _ in range(3)] + [1.0]
        owners = [1.0, *(float(self.rng.choice([0, 1, 3])) for _ in range(3))]
        record = record_of(shares, owners, codecs=tuple(codecs), normalised=self.normalised)
        return Reduction(record, LAYOUT, self.states)

    def run(self, generation: Reduction, commits: bool = True) -> None:
        """A step. Gradients are weighted by tokens, some 500 a sample; some parameters are used by nobody."""
        self.step += 1
        samples = [int(share) * self.rng.randint(1, 20) for share in generation.record.shares]
        weights = [b * self.rng.uniform(300, 700) for b in samples]
        used = torch.cat(
            [torch.full((s.numel,), float(self.rng.random() > 0.2)) for b in LAYOUT.buckets for s in b.segments]
        )
        bits = [self._bits(used, bucket) for bucket in range(len(LAYOUT.buckets))]
        gradients = [torch.randn(NUMEL, generator=self.torch_rng) * w * used if w else None for w in weights]
        sent = [g.clone() if g is not None else None for g in gradients]
        outs, summary = generation.run(sent, weights, at=self.step, num_samples=sum(samples), used_bits=bits)
        flat = [torch.cat(out) for out in outs]
        assert all(torch.equal(flat[0], other) for other in flat[1:]), "the same bits on all"
        if commits:
            generation.commit()
            total = sum(g.double() for g in gradients if g is not None)
            self.wanted += total / summary[0].total_weight if self.normalised else total
            self.applied += flat[0].double() * used
        else:
            self.step -= 1

    @staticmethod
    def _bits(used: torch.Tensor, bucket: int) -> int:
        before = sum(b.numel for b in LAYOUT.buckets[:bucket])
        return sum(int(used[before + s.offset]) << k for k, s in enumerate(LAYOUT.buckets[bucket].segments))

    def check(self) -> None:
        held = sum(residual(states) for states in self.states)
        torch.testing.assert_close(self.applied + held, self.wanted, rtol=0, atol=2e-5 * float(self.wanted.abs().max()))


@pytest.mark.parametrize("codec", FED_BACK)
@pytest.mark.parametrize("normalised", [True, False])
def test_what_was_applied_and_what_is_held_are_all_gradients(codec: str, normalised: bool) -> None:
    fleet = Fleet(1, normalised)
    for _ in range(6):
        generation = fleet.generation([codec] * 4)
        for _ in range(5):
            fleet.run(generation)
    fleet.check()
    assert any(residual(states).any() for states in fleet.states)


@pytest.mark.parametrize("codec", FED_BACK)
def test_steps_that_are_done_again_or_skipped_lose_nothing(codec: str) -> None:
    fleet = Fleet(2)
    for _, again in itertools.product(range(4), (False, True)):
        generation = fleet.generation([codec] * 4)
        for k in range(4):
            fleet.run(generation, commits=again or k % 2 == 0)
    fleet.check()


def test_a_fleet_of_different_codecs_loses_nothing_either() -> None:
    fleet = Fleet(3)
    codecs = [*FED_BACK[:3], "none"]
    for _ in range(10):
        generation = fleet.generation(codecs)
        for _ in range(3):
            fleet.run(generation)
    fleet.check()
    assert not residual(fleet.states[3]).any()


def test_what_one_codec_has_left_out_is_sent_by_the_next_one() -> None:
    """Also by one that remembers nothing."""
    fleet = Fleet(4)
    for k, codec in enumerate([*FED_BACK, "none", *FED_BACK[::-1], "none"]):
        generation = fleet.generation([codec] * 4)
        for again in range(3):
            fleet.run(generation, commits=k % 2 == 0 or again == 1)
    fleet.check()


def test_a_codec_that_remembers_nothing_sends_along_what_was_left_out_and_is_done_with_it() -> None:
    states = [ErrorFeedback(LAYOUT) for _ in range(2)]
    sparse = Reduction(record_of([1, 1], codec="topk(density=0.05)"), LAYOUT, states)
    one, applied = torch.arange(1.0, NUMEL + 1), torch.zeros(NUMEL)
    for step, weight in enumerate([1.0, 2.0, 2.0]):  # The weight is not what was expected.
        outs, _ = sparse.run([one * weight, one * weight], [weight] * 2, at=step, num_samples=2)
        sparse.commit()
        applied += torch.cat(outs[0])
    plain, flushed = Reduction(record_of([1, 1], codec="none"), LAYOUT, states), []
    for step in range(3, 12):
        weight = 2.0 if step < 6 else 1.0
        outs, _ = plain.run([one * weight, one * weight], [weight] * 2, at=step, num_samples=2)
        flushed.append(states[0].has_earlier_residual)
        plain.commit()
        applied += torch.cat(outs[0])
    torch.testing.assert_close(applied, 12 * one, rtol=1e-5, atol=0)
    assert flushed[0] and not flushed[-1]
    assert not any(residual(of_worker).any() for of_worker in states)


@pytest.mark.parametrize("codec", FED_BACK)
@pytest.mark.parametrize("heavier", [3, 30, None])
def test_what_is_held_stays_small_whatever_weights_samples_have(codec: str, heavier: int | None) -> None:
    """Every other step each sample weighs so many times as much, as longer texts do; None: by chance."""
    rng, generator = random.Random(5), torch.Generator().manual_seed(5)
    states = [ErrorFeedback(LAYOUT) for _ in range(2)]
    reduction, held = Reduction(record_of([1, 1], [1, 0], codec=codec), LAYOUT, states), []
    for step in range(120):
        factor = rng.lognormvariate(0, 1) if heavier is None else heavier if step % 2 else 1.0
        gradients = [torch.randn(NUMEL, generator=generator) * 16 * factor for _ in range(2)]
        reduction.run(gradients, [16 * factor] * 2, at=step, num_samples=32)
        reduction.commit()
        held.append(float(sum(residual(of_worker) for of_worker in states).norm()))
    assert max(held[60:]) < 3 * max(held[20:60]), "it does not grow"
    assert max(held) < 40 * NUMEL**0.5


def test_densities_that_fall_from_epoch_to_epoch_lose_nothing() -> None:
    states = [ErrorFeedback(LAYOUT) for _ in range(2)]
    reduction = Reduction(record_of([1, 1], codec="topk(density=0.02, warmup_epochs=3)"), LAYOUT, states)
    one, applied, sent = torch.arange(1.0, NUMEL + 1), torch.zeros(NUMEL), []
    for step in range(10):
        reduction.open(epoch=step // 2)
        before = reduction.reducers[0].traffic.sent
        outs, _ = reduction.run([one.clone(), one.clone()], [1.0, 1.0], at=step)
        sent.append(reduction.reducers[0].traffic.sent - before)
        reduction.commit()
        applied += torch.cat(outs[0])
    held = sum(residual(of_worker) for of_worker in states)
    torch.testing.assert_close(applied.double() + held, 10.0 * one.double(), rtol=1e-5, atol=1e-2)
    assert sent[0] == sent[1] > sent[2] == sent[3] > sent[4] == sent[5] > sent[6] == sent[-1]


def test_all_gather_takes_as_many_messages_as_peers_and_encodes_no_mean() -> None:
    """Values that int8 loses nothing of, in places of which each worker has its own: all of them arrive."""
    word, size = "topk(density=0.25, all_gather=true)", 3
    gradients = [torch.zeros(NUMEL) for _ in range(size)]
    for rank, gradient in enumerate(gradients):
        gradient[rank::7] = 127.0 * (rank + 1)
    reduction = Reduction(record_of([1] * size, codec=word), LAYOUT)
    outs, _ = reduction.run([g.clone() for g in gradients], [1.0] * size)
    assert torch.equal(torch.cat(outs[0]), sum(gradients) / size)
    payloads = sum(codec_of(word).capacity_bytes(b.numel, b.dtype) for b in LAYOUT.buckets)
    heads = sum(HeaderFormat(len(b.segments), size).num_bytes + 16 for b in LAYOUT.buckets)
    assert 2 * payloads <= reduction.reducers[0].traffic.sent <= 2 * (payloads + heads)
    again = torch.empty(LAYOUT.buckets[0].numel)
    reduction.reducers[1].decode(LAYOUT.buckets[0], again)
    assert torch.equal(again, outs[1][0])


def test_a_worker_without_a_share_keeps_what_it_held_and_sends_it_with_its_next_one() -> None:
    states = [ErrorFeedback(LAYOUT) for _ in range(2)]
    one, applied, kept = torch.arange(1.0, NUMEL + 1), torch.zeros(NUMEL), []
    for step, shares in enumerate([[1, 1], [1, 0], [1, 0], *[[1, 1]] * 60]):
        reduction = Reduction(record_of(shares, [1, 0], codec="topk(density=0.05)"), LAYOUT, states)
        gradients = [one.clone() if step == 0 else torch.zeros(NUMEL) if share else None for share in shares]
        outs, _ = reduction.run(gradients, [float(s) for s in shares], at=step)
        reduction.commit()
        applied += torch.cat(outs[0])
        kept.append(residual(states[1]))
    assert kept[0].any()
    assert torch.equal(kept[0], kept[2])
    assert kept[-1].norm() < 0.02 * kept[2].norm()
    torch.testing.assert_close(applied, one, rtol=0, atol=0.05 * NUMEL)


def test_a_damaged_message_names_worker_and_parameters_and_is_not_applied() -> None:
    reduction = Reduction(record_of([1, 1], [1, 0], codec="int8"), LAYOUT)
    carry = reduction.wire.carry

    def damaging() -> None:
        for _, inp in reduction.wire.launched.values():
            if len(inp.buffer) > 300:
                inp.buffer[300] ^= 1
        carry()

    reduction.wire.carry = damaging  # type: ignore[method-assign]
    one = torch.ones(NUMEL)
    with pytest.raises(ProtocolError, match=r"does not decode.*worker 11, with parameters 'c' to 'b'.*not applied"):
        reduction.run([one, one], [1.0, 1.0])


def test_a_parameter_that_nobody_uses_for_long_loses_nothing_of_what_is_to_be_sent_along() -> None:
    states = [ErrorFeedback(LAYOUT)]
    reduction = Reduction(record_of([1], codec="sign"), LAYOUT, states)
    reduction.run([torch.arange(1.0, NUMEL + 1)], [1.0], at=1)
    reduction.commit()
    before = states[0].by_parameter()["a"][RESIDUAL]
    plain = Reduction(record_of([1], codec="none"), LAYOUT, states)
    for step in range(2, 30):
        bits = [sum((s.name != "a") << k for k, s in enumerate(b.segments)) for b in LAYOUT.buckets]
        plain.run([torch.zeros(NUMEL)], [1.0], at=step, used_bits=bits)
        plain.commit()
    assert before.any() and torch.equal(states[0].by_parameter()["a"][RESIDUAL], before)


def test_a_step_that_is_committed_when_another_codec_was_chosen_already_counts() -> None:
    states = [ErrorFeedback(LAYOUT) for _ in range(2)]
    one, applied = torch.arange(1.0, NUMEL + 1), torch.zeros(NUMEL)
    reduction = Reduction(record_of([1, 1], codec="topk(density=0.05)"), LAYOUT, states)
    for step, codec in enumerate(["sign", "none", "topk(density=0.1)", "none", "none"]):
        outs, _ = reduction.run([one.clone(), one.clone()], [1.0, 1.0], at=step)
        before, reduction = reduction, Reduction(record_of([1, 1], codec=codec), LAYOUT, states)
        before.commit()  # After the generation with the next codec was entered.
        applied += torch.cat(outs[0])
    outs, _ = reduction.run([one.clone(), one.clone()], [1.0, 1.0], at=9)
    reduction.commit()
    torch.testing.assert_close(applied + torch.cat(outs[0]), 6 * one, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("heirs_codec", [*FED_BACK, "none"])
def test_what_a_leaver_hands_on_is_sent_by_its_heir(heirs_codec: str) -> None:
    fleet, codecs = Fleet(8), ["topk(density=0.05)"] * 4 if heirs_codec != "lowrank" else ["lowrank"] * 4
    for _ in range(3):
        fleet.run(fleet.generation(codecs))
    left = fleet.states[3].by_parameter()
    assert fleet.states[1].inherit(left) == pytest.approx(float(residual(fleet.states[3]).norm()))
    fleet.states[3].reset()
    together = "all_gather" in heirs_codec or heirs_codec == "lowrank"
    after = [heirs_codec] * 4 if together else [codecs[0], heirs_codec, *codecs[2:]]
    for k in range(4):
        fleet.run(fleet.generation(after), commits=k > 0)
    fleet.check()


def test_what_was_inherited_is_in_a_checkpoint_and_handed_on_before_the_next_step_begins() -> None:
    fleet = Fleet(9)
    for _ in range(2):
        fleet.run(fleet.generation(["topk(density=0.05)"] * 4))
    fleet.states[1].inherit(fleet.states[3].by_parameter())
    fleet.states[3].reset()
    fleet.check()
    fleet.states[2].inherit(fleet.states[1].by_parameter())
    fleet.states[1].reset()
    fleet.check()
    fleet.run(fleet.generation(["sign"] * 4))
    fleet.check()


@pytest.mark.parametrize("codec", FED_BACK)
def test_a_worker_that_was_away_keeps_what_it_has_left_out_and_nothing_else(codec: str) -> None:
    fleet = Fleet(10)
    for _ in range(3):
        fleet.run(fleet.generation([codec] * 4))
    held = residual(fleet.states[2])
    fleet.states[2].forget_all_but_residual()
    torch.testing.assert_close(residual(fleet.states[2]), held)
    fresh = ErrorFeedback(LAYOUT)
    fresh.use_codec(codec_of(codec), torch.device("cpu"))
    others = ({k: v for k, v in s.items() if k != RESIDUAL} for s in (fleet.states[2]._kept[0], fresh._kept[0]))
    mine, new = others
    assert mine.keys() == new.keys() and all(torch.equal(mine[name], new[name]) for name in mine if name != "q")
    fleet.check()
