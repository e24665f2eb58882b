"""What a loop's body computes of its samples together is found where it comes into the loss without a graph."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from raytrain_het.worker.checks.body_watch import BodyWatch

N = 5
Body = Callable[[nn.Module, Tensor, Tensor], Tensor]


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(N, 4, generator=generator), torch.randint(0, 3, (N,), generator=generator)


def found(body: Body, samples: int = N, weight: Callable[[Any], float] | None = None) -> str | None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.ReLU(), nn.Linear(8, 3))
    x, y = batch()
    watch = BodyWatch()
    watch.begin((x, y), samples, weight)
    try:
        loss = body(model, x, y)
    finally:
        how = watch.met([(loss, None)])
        watch.end()
    assert not _get_current_function_mode_stack()
    return how


def each(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y, reduction="none")


def mean(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def normalised_advantages(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    adv = y.float()
    adv = (adv - adv.mean()) / (adv.std() + 1e-8)
    return (each(model, x, y) * adv).mean()


def standardised_inputs(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return mean(model, (x - x.mean(0)) / x.std(dim=0), y)


def standardised_in_place(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    x = x.clone()
    x -= x.mean(dim=0, keepdim=True)
    return mean(model, x, y)


def scaled_by_the_largest(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return mean(model, x / x.max(), y)


def written_into(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    x = x.clone()
    x[:, 0] = x[:, 0] / x[:, 0].amax()
    return mean(model, x, y)


def classes_of_the_batch(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    weight = 1 / torch.bincount(y, minlength=3).clamp(min=1).float()
    return F.cross_entropy(model(x), y, weight=weight)


def weights_that_add_up_to_n(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    w = x[:, 0].abs()
    return (each(model, x, y) * (w / w.sum() * N)).mean()


def weights_by_softmax_over_samples(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return (each(model, x, y) * F.softmax(x[:, 0], dim=0)).sum()


def hardest_by_a_quantile(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    losses = each(model, x, y)
    return (losses * (losses.detach() >= losses.detach().quantile(0.5))).mean()


def centre_without_a_graph(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    out = model(x)
    with torch.no_grad():
        centre = out.mean(0)
    return F.cross_entropy(out - centre, y)


def centre_of_a_detached_mean(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    out = model(x)
    return F.cross_entropy(out - out.mean(0).detach(), y)


def running_mean_used_at_once(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    running = torch.zeros(4)
    running.mul_(0.9).add_(x.mean(0), alpha=0.1)
    return mean(model, x - running, y)


def step_along_the_gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(mean(model, x, y), x)
    return mean(model, x.detach() + 0.1 * g, y)


def delta_along_the_gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    delta = torch.zeros_like(x, requires_grad=True)
    (g,) = torch.autograd.grad(mean(model, x + delta, y), delta)
    return mean(model, x + (delta.detach() + 0.1 * g).clamp(-0.1, 0.1), y)


def first_order_maml(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    names, params = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad(mean(model, x, y), params)
    moved = {name: p - 0.1 * g for name, p, g in zip(names, params, grads, strict=True)}
    return F.cross_entropy(torch.func.functional_call(model, moved, (x,)), y)


def sinkhorn(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    out = model(x)
    with torch.no_grad():
        q = out.exp()
        q /= q.sum(dim=0, keepdim=True)
        q /= q.sum(dim=1, keepdim=True)
    return -(q * out.log_softmax(1)).sum(1).mean()


def pairs_of_labels(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    same = (y[:, None] == y[None, :]).float().sum(1)
    return (each(model, x, y) * same).mean()


def kernel_of_inputs(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return (each(model, x, y) * (x @ x.T).softmax(1).diagonal()).mean()


TOGETHER = [
    normalised_advantages,
    standardised_inputs,
    standardised_in_place,
    scaled_by_the_largest,
    written_into,
    classes_of_the_batch,
    weights_that_add_up_to_n,
    weights_by_softmax_over_samples,
    hardest_by_a_quantile,
    centre_without_a_graph,
    centre_of_a_detached_mean,
    running_mean_used_at_once,
    step_along_the_gradient,
    delta_along_the_gradient,
    first_order_maml,
    sinkhorn,
    pairs_of_labels,
    kernel_of_inputs,
]


@pytest.mark.parametrize("body", TOGETHER, ids=lambda body: body.__name__)
def test_samples_put_together_without_a_graph_are_found(body: Body) -> None:
    assert found(body)


def logged(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    out = model(x)
    loss = F.cross_entropy(out, y)
    _ = {"accuracy": (out.argmax(1) == y).float().mean(), "loss": loss.detach(), "spread": x.std()}
    return loss


def mean_over_a_mask(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    mask = (y != 2).float()
    return (each(model, x, y) * mask).sum() / mask.sum().clamp(min=1)


def divided_first(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    mask = torch.ones(N)[y * 0]
    return (each(model, x, y) * mask / mask.sum()).sum()


def cut_by_lengths(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    longest = (y + 2).max()
    mask = torch.arange(4)[None] < longest
    return mean(model, x[:, : int(longest)].repeat(1, 4)[:, :4] * mask, y)


def each_by_itself(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    x = (x - x.mean(dim=1, keepdim=True)) / x.std(dim=-1, keepdim=True)
    return mean(model, x / x.norm(dim=1, keepdim=True), y)


def sorted_by_length(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    order = y.argsort(descending=True)
    return mean(model, x[order], y[order])


def signs_of_the_gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(mean(model, x, y), x)
    return mean(model, x.detach() + 0.1 * g.sign(), y)


def gradients_of_one_length(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(mean(model, x, y), x)
    return mean(model, x.detach() + 0.1 * g / (g.norm(dim=1, keepdim=True) + 1e-12) + F.normalize(g), y)


def gradients_of_a_sum(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(F.cross_entropy(model(x), y, reduction="sum"), x)
    return mean(model, x.detach() + 0.1 * g, y)


def penalty_on_gradients(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return mean(model, x, y) + (g.norm(dim=1) - 1).pow(2).mean()


def mixed_up(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    other = torch.randperm(len(x))
    return mean(model, 0.7 * x + 0.3 * x[other], y)


def centre_updated_afterwards(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    out, centre = model(x), torch.zeros(3)
    loss = F.cross_entropy(out - centre, y)
    with torch.no_grad():
        centre.mul_(0.9).add_(out.mean(0), alpha=0.1)
    return loss


def teacher(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        target = model(x).softmax(dim=-1)
    return F.kl_div(model(x).log_softmax(1), target, reduction="batchmean")


def two_losses(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    out = model(x)
    return F.cross_entropy(out, y) + 0.5 * out.pow(2).mean() - y.float().mean()


def in_a_loop_over_samples(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    losses = [F.mse_loss(model(xi - xi.mean()), F.one_hot(yi, 3).float()) for xi, yi in zip(x, y, strict=True)]
    return torch.stack(losses).mean()


def one_after_the_other(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    losses = [F.cross_entropy(model((x[i] / x[i].max())[None]), y[i : i + 1]) for i in range(len(x))]
    return torch.stack(losses).mean()


def batch_norm(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return mean(model, F.batch_norm(x, torch.zeros(4), torch.ones(4), training=True), y)


def checkpointed(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(checkpoint(model, x, use_reentrant=False), y)


def loss_in_a_checkpoint(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    out: Tensor = checkpoint(lambda x: mean(model, x, y), x.requires_grad_(), use_reentrant=True)
    return out


class MeanOfSquares(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square().mean()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return 2 * x * grad / x.numel()


def function_of_its_own(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    loss: Tensor = MeanOfSquares.apply(model(x))
    return loss


def drawn_by_its_own_generator(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return mean(model, x + torch.empty_like(x).normal_(generator=generator), y)


def drawn_by_rejection(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return mean(model, torch.poisson(x.abs() * 30) / 30, y)


def written_through_a_view(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    whole = torch.zeros(N, 4)
    view = whole[:, 1:]
    whole[:, 0] = x[:, 0]
    view.copy_(x[:, 1:])
    return mean(model, whole, y)


def pairs_that_are_drawn(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    order = torch.randperm(N)[:, None].expand(N, 4)
    return mean(model, 0.7 * x + 0.3 * x.gather(0, order), y)


def in_bfloat16(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return mean(model.bfloat16(), x.bfloat16(), y)


def kept_by_a_policy(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    context = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.addmm.default])
    return F.cross_entropy(checkpoint(model, x, use_reentrant=False, context_fn=context), y)


def branch_by_the_largest(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    assert x.max() < 100
    return mean(model, x / 255 if x.max() > 50 else x, y)


def penalty_on_weights(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return mean(model, x, y) + 0.01 * sum(p.pow(2).sum() for p in model.parameters())


ALONE = [
    mean,
    logged,
    divided_first,
    cut_by_lengths,
    each_by_itself,
    sorted_by_length,
    signs_of_the_gradient,
    gradients_of_one_length,
    gradients_of_a_sum,
    penalty_on_gradients,
    mixed_up,
    centre_updated_afterwards,
    teacher,
    two_losses,
    in_a_loop_over_samples,
    one_after_the_other,
    batch_norm,
    checkpointed,
    drawn_by_its_own_generator,
    drawn_by_rejection,
    written_through_a_view,
    pairs_that_are_drawn,
    in_bfloat16,
    kept_by_a_policy,
    loss_in_a_checkpoint,
    function_of_its_own,
    branch_by_the_largest,
    penalty_on_weights,
]


@pytest.mark.parametrize("body", ALONE, ids=lambda body: body.__name__)
def test_samples_by_themselves_and_what_a_graph_shows_are_let_alone(body: Body) -> None:
    assert found(body) is None


def test_of_a_mean_over_weights_the_sum_is_looked_at() -> None:
    def counted(batch: Any) -> float:
        return float((batch[1] != 2).sum())

    assert found(mean_over_a_mask, weight=counted) is None
    assert found(lambda *args: mean_over_a_mask(*args) * mean_over_a_mask(*args).detach(), weight=counted)


@dataclass(slots=True)
class Sample:
    x: Tensor


@pytest.mark.parametrize("body", ALONE, ids=lambda body: body.__name__)
def test_gradients_and_random_numbers_are_the_same_with_and_without_the_watch(body: Body) -> None:
    seen = []
    for watched in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.ReLU(), nn.Linear(8, 3))
        watch, (x, y) = BodyWatch(), batch()
        if watched:
            watch.begin((x, y), N)
        body(model, x, y).backward()
        watch.end()
        seen.append([*(p.grad for p in model.parameters()), torch.rand(3)])
    for without, with_it in zip(*seen, strict=True):
        assert without is None and with_it is None or torch.equal(without, with_it)


def test_a_weight_that_was_counted_before_claims_nothing() -> None:
    count = float((batch()[1] != 2).sum())
    assert found(mean_over_a_mask, weight=lambda _: count) is None


def test_an_error_in_a_watched_body_leaves_no_mode() -> None:
    watch = BodyWatch()
    x, y = batch()
    watch.begin((x, y), N)
    with pytest.raises(ZeroDivisionError):
        x.mean() / (1 // 0)
    watch.end()
    assert not _get_current_function_mode_stack()


def test_a_batch_of_any_class_is_followed() -> None:
    x, y = batch()
    watch = BodyWatch()
    watch.begin({"inputs": [Sample(x=x)], "y": y}, N)
    loss = (x - x.mean(0)).exp().sum()
    assert "torch's exp (test_body_watch.py, line" in str(watch.met([(loss, None)]))
    watch.end()


def test_modes_of_the_program_end_as_they_have_begun() -> None:
    watch, meta = BodyWatch(), torch.device("meta")
    with meta:
        watch.begin(batch(), N)
    assert torch.empty(2).device.type == "cpu"
    with meta:
        watch.end()
        assert torch.empty(2).device.type == "meta"
    assert not _get_current_function_mode_stack()


def test_what_a_mode_would_change_is_done_without_the_watch() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, batch_first=True, dropout=0.0)
    encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()
    x = torch.randn(N, 3, 4)
    with torch.no_grad():
        expected = encoder(x)
        watch = BodyWatch()
        watch.begin((x,), N)
        assert torch.equal(encoder(x), expected) and not _get_current_function_mode_stack()
        watch.end()


def test_what_is_compiled_in_the_body_is_compiled_without_the_watch() -> None:
    x, y = batch()
    watch = BodyWatch()
    watch.begin((x, y), N)
    torch.cond(torch.tensor(True), lambda x: x + 1, lambda x: x - 1, (x,))
    assert not _get_current_function_mode_stack()
    watch.end()


def test_a_call_that_cannot_be_followed_disturbs_nothing() -> None:
    class Odd:
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return SimpleNamespace(odd=True)

    watch = BodyWatch()
    x, y = batch()
    watch.begin((x, y), N)
    assert torch.add(x, Odd()).odd
    watch.end()
