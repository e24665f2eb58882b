"""What a loss is of its samples is seen in its graph, where it can be seen."""

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from raytrain_het.errors import ConfigError, NotSupportedError
from raytrain_het.worker.checks import losses
from raytrain_het.worker.checks.loss_graph import LossGraph
from raytrain_het.worker.checks.losses import checked_loss


class LossCheck(losses.LossCheck):
    """Looks at losses as ``loss.backward()`` has them looked at, of as many samples as they weigh."""

    def look(self, roots, weight, scale=1.0, *, samples=None, alike=True):
        pairs = [root if isinstance(root, tuple) else (root, torch.ones_like(root)) for root in roots]
        return super().look(pairs, weight, scale, samples=int(weight) if samples is None else samples, alike=alike)


MODEL = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 4))
X, Y, TARGET = torch.randn(6, 5), torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
LEFT_OUT = torch.tensor([0, 1, -100, 3, 0, -100])
MASK = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0, 0.0])


def attention(z):
    return (z @ z.T).softmax(1) @ z


def penalty():
    return 1e-3 * sum(p.square().sum() for p in MODEL.parameters())


def orthogonal():
    w = MODEL[0].weight
    return (w @ w.T - torch.eye(7)).square().sum()


MEANS = {
    "mse": (lambda: F.mse_loss(MODEL(X), Y), 24),
    "mean of a mean": (lambda: (MODEL(X) - Y).square().mean(1).mean(), 6),
    "sum over its number": (lambda: F.mse_loss(MODEL(X), Y, reduction="sum") / len(X), 6),
    "sum times a constant": (lambda: (MODEL(X) - Y).square().sum() * (1 / 8), 8),
    "cross entropy": (lambda: F.cross_entropy(MODEL(X), TARGET), 6),
    "with penalties": (lambda: F.cross_entropy(MODEL(X), TARGET) + penalty() + orthogonal(), 6),
    "scaled": (lambda: 1024.0 * F.cross_entropy(MODEL(X), TARGET), 6),
    "two": (lambda: torch.stack([F.mse_loss(MODEL(X), Y), F.l1_loss(MODEL(X), Y)]).sum(), 24),
}
SUMS = {
    "mse": lambda: F.mse_loss(MODEL(X), Y, reduction="sum"),
    "cross entropy": lambda: F.cross_entropy(MODEL(X), TARGET, reduction="sum"),
    "sum()": lambda: (MODEL(X) - Y).square().sum(),
    "of none": lambda: F.cross_entropy(MODEL(X), TARGET, reduction="none").sum() + penalty(),
    "embedding": lambda: (nn.Embedding(4, 3)(TARGET)).sum(),
    "bce": lambda: F.binary_cross_entropy_with_logits(MODEL(X), Y.sigmoid(), reduction="sum"),
}
NEITHER = {
    "flooding": lambda: (F.mse_loss(MODEL(X), Y) - 0.1).abs() + 0.1,
    "the larger": lambda: torch.maximum(F.mse_loss(MODEL(X), Y), F.l1_loss(MODEL(X), Y)),
    "deviation": lambda: F.mse_loss(MODEL(X), Y) + 0.1 * MODEL(X).std(),
    "norm": lambda: (MODEL(X) - Y).norm(),
    "root": lambda: F.mse_loss(MODEL(X), Y).sqrt(),
    "log": lambda: torch.log(F.mse_loss(MODEL(X), Y)),
    "dice": lambda: 1 - 2 * (MODEL(X).sigmoid() * Y).sum() / (MODEL(X).sigmoid().sum() + Y.sum()),
}


@pytest.mark.parametrize("name", MEANS)
def test_a_mean_is_seen_with_what_it_is_over(name):
    loss, count = MEANS[name]
    found = LossGraph(loss().grad_fn, samples=6).reductions
    assert {r.kind for r in found} <= {"mean", "quotient"} and found[0].count == pytest.approx(count)
    assert LossCheck("mean", weighed=False).look([loss()], 6.0) is None
    if found[0].kind == "mean":
        assert isinstance(LossCheck("sum", weighed=False).look([loss()], 6.0), ConfigError)


@pytest.mark.parametrize("name", SUMS)
def test_a_sum_is_refused_unless_it_was_said_to_be_one(name):
    error = LossCheck("mean", weighed=False).look([SUMS[name]()], 6.0)
    assert isinstance(error, ConfigError) and "loss='sum'" in str(error)
    assert LossCheck("sum", weighed=False).look([SUMS[name]()], 6.0) is None


@pytest.mark.parametrize("name", NEITHER)
def test_a_function_of_a_mean_is_refused_unless_it_was_said_to_be_local(name):
    error = LossCheck("mean", weighed=False).look([NEITHER[name]()], 6.0)
    assert isinstance(error, NotSupportedError) and "loss='local'" in str(error)
    assert LossCheck("local", weighed=False).look([NEITHER[name]()], 6.0) is None


@pytest.mark.parametrize(
    "loss",
    [
        lambda: (F.cross_entropy(MODEL(X), TARGET, reduction="none") * MASK).sum() / MASK.sum(),
        lambda: MODEL(X).square().sum() / 16,
        lambda: F.cross_entropy(MODEL(X), LEFT_OUT),
        lambda: F.cross_entropy(MODEL(X), TARGET, weight=torch.tensor([1.0, 2.0, 3.0, 4.0])),
    ],
)
def test_a_mean_over_a_weight_has_to_be_said(loss):
    error = LossCheck("mean", weighed=False).look([loss()], 6.0)
    assert isinstance(error, ConfigError) and "weight=lambda batch" in str(error)
    assert LossCheck("mean", weighed=True).look([loss()], 4.0) is None


@pytest.mark.parametrize("divisor", [6, 24])
def test_a_sum_is_a_mean_if_it_is_divided_by_samples_or_by_all_numbers(divisor):
    assert LossCheck("mean", weighed=False).look([(MODEL(X) - Y).square().sum() / divisor], 6.0) is None


def test_a_mean_over_another_number_for_each_sample_is_noticed():
    check = LossCheck("mean", weighed=False)
    long, short = torch.randn(2, 9, 5), torch.randn(4, 3, 5)
    assert check.look([MODEL(long).square().mean()], 2.0) is None and check.fired() is None
    assert check.terms == [(72.0, 36.0)]
    assert check.look([MODEL(short).square().mean()], 4.0) is None
    error = check.fired()
    assert isinstance(error, ConfigError) and "12 numbers for each sample" in str(error)


def test_other_shares_of_the_same_samples_are_the_same_mean():
    check = LossCheck("mean", weighed=False)
    for size in (6, 1, 5):
        assert check.look([F.mse_loss(MODEL(X[:size]), Y[:size])], float(size)) is None and check.fired() is None


def test_a_loss_that_is_none_of_them_is_named():
    with pytest.raises(ConfigError, match=r"loss='average' is not valid: allowed are 'mean', 'sum' and 'local'"):
        checked_loss("average", weighed=False)
    with pytest.raises(ConfigError, match="a sum needs no weight"):
        checked_loss("sum", weighed=True)


def test_a_sum_may_be_divided_by_a_constant_and_not_by_the_number_of_a_pass():
    check = LossCheck("sum", weighed=False)
    assert check.look([MODEL(X).sum() / 64], 6.0) is None and check.fired() is None
    assert check.look([MODEL(X[:2]).sum() / 64], 2.0) is None and check.fired() is None
    assert check.look([MODEL(X[:2]).sum() / 2], 2.0) is None
    error = check.fired()
    assert isinstance(error, ConfigError) and "divided by 2 in this pass, and was by 64" in str(error)


SOFT = torch.randn(6, 4).softmax(1)
W = nn.Parameter(torch.randn(5))


SPECTRAL = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 4))
WIDE, SQUARE = nn.Linear(5, 6), nn.Linear(6, 6)


def checkpointed(x):
    return checkpoint(MODEL[1:], MODEL[0](x), use_reentrant=True)


@pytest.mark.parametrize(
    "loss",
    [
        lambda: F.cross_entropy(MODEL(X), SOFT, label_smoothing=0.1),
        lambda: MODEL(X).square().mean(0).sum(),
        lambda: F.mse_loss(MODEL(X), Y) + MODEL(torch.randn(100, 5)).square().mean(),
        lambda: sum(F.mse_loss(MODEL(x), y) for x, y in zip(X, Y, strict=True)) / len(X),
        lambda: torch.stack([F.mse_loss(MODEL(x), y) for x, y in zip(X, Y, strict=True)]).mean(),
        lambda: (torch.stack([F.mse_loss(MODEL(X), Y), F.l1_loss(MODEL(X), Y)]) * torch.tensor([0.3, 0.7])).sum(),
        lambda: ((MODEL(X) - Y).square().sum(1), torch.full((6,), 1 / 6)),
        lambda: F.mse_loss(MODEL(X), Y) + F.mse_loss(W, torch.ones(5)) + W.norm() + W.exp().sum(),
        lambda: F.mse_loss(MODEL(X), Y) + torch.linalg.svdvals(MODEL[0].weight).sum(),
        lambda: ((MODEL(X) - Y) @ (MODEL(X) - Y).T).trace() / len(X),
        lambda: F.mse_loss(nn.BatchNorm1d(4)(MODEL(X)), Y),
        lambda: F.mse_loss(nn.MultiheadAttention(4, 2, batch_first=True)(*[MODEL(X)[:, None]] * 3)[0], Y[:, None]),
        lambda: F.mse_loss(nn.MultiheadAttention(4, 2)(*[MODEL(X)[None]] * 3)[0], Y[None]),
        lambda: torch.stack([attention(MODEL(torch.randn(6, 5))).mean() for _ in X]).mean(),
        lambda: F.mse_loss(SPECTRAL(WIDE(X)), Y),
        lambda: of_a_mean(lambda z, y: F.mse_loss(z, y, reduction="sum")),
        lambda: W.square().mean() + (MODEL(X) - Y).square().mean(),
        lambda: 0.1 * W.square().sum() + 1 / len(X) * (MODEL(X) - Y).square().sum(),
        lambda: F.cross_entropy(MODEL(X), TARGET, reduction="none").view(3, 2).sum(0).mean(),
        lambda: torch.stack([F.mse_loss(MODEL(x), y).sqrt() for x, y in zip(X, Y, strict=True)]).mean(),
        lambda: sum(F.mse_loss(MODEL(X[:k]), Y[:k]) for k in range(1, 7)) / 6,
        lambda: (torch.stack([F.mse_loss(MODEL(X), Y), F.l1_loss(MODEL(X), Y)]) * (-W[:2]).exp() + W[:2]).sum(),
        lambda: (F.l1_loss(MODEL(X), Y, reduction="none").mean(0) * torch.rand(4)).sum(),
        lambda: F.l1_loss(MODEL(X), Y, reduction="none").mean(0) @ torch.rand(4),
        lambda: ((MODEL(X) - Y).square().sum(1) / len(X)).sum(),
        lambda: (MODEL(X) - Y).square().sum(1) @ torch.full((6,), 1 / 6),
        lambda: F.mse_loss(WIDE(X), torch.zeros(6, 6)) + (torch.rand(6, 5) * (WIDE.weight - 1).square()).sum(),
        lambda: F.mse_loss(F.linear(X @ torch.rand(5, 6), torch.rand(6, 6).bool() * SQUARE.weight), torch.zeros(6, 6)),
        lambda: F.mse_loss(MODEL(X), Y) + torch.cat([p.flatten() for p in MODEL.parameters()]).norm(),
        lambda: F.mse_loss(X + W, X),
        lambda: nn.LSTM(5, 3, batch_first=True)(X[:, None])[0].square().mean(),
        lambda: nn.TransformerEncoderLayer(6, 2, 8)(WIDE(torch.randn(6, 6, 5))).square().mean(),
    ],
)
def test_means_of_other_forms_are_no_sums(loss):
    assert LossCheck("mean", weighed=False).look([loss()], 6.0, samples=6) is None


@pytest.mark.parametrize(
    "loss",
    [
        lambda: ((X * W).sum(1) - Y[:, 0]).square().sum(),
        lambda: nn.Sequential(*[nn.Linear(5, 5) for _ in range(300)])(X).square().sum(),
        lambda: (MODEL(X) - Y).square().mean(1),
        lambda: MODEL(X).square().mean(1).sum(),
        lambda: (MODEL(X) - Y)[:, 0] @ (MODEL(X) - Y)[:, 0],
        lambda: (MODEL(X) - Y).square().nansum(),
        lambda: torch.nan_to_num((MODEL(X) - Y).square().sum()),
        lambda: torch.einsum("nd,nd->", MODEL(X) - Y, MODEL(X) - Y),
        lambda: ((MODEL(X) - Y) @ (MODEL(X) - Y).T).trace(),
        lambda: (MODEL(X) - Y).square().sum(1).cumsum(0)[-1],
        lambda: sum(F.mse_loss(MODEL(x), y) for x, y in zip(X, Y, strict=True)),
        lambda: torch.stack([F.mse_loss(MODEL(x), y) for x, y in zip(X, Y, strict=True)]).sum(),
        lambda: torch.cat([F.mse_loss(MODEL(x), y)[None] for x, y in zip(X, Y, strict=True)]).sum(),
        lambda: nn.LSTM(5, 3, batch_first=True)(X[:, None])[0].square().sum(),
        lambda: nn.Bilinear(5, 5, 2)(X, X).square().sum(),
        lambda: nn.LayerNorm(5)(X).square().sum(),
        lambda: MODEL(X.clone().requires_grad_()).square().sum(),
        lambda: checkpointed(X).square().sum(),
        lambda: (MODEL(X) - Y).square().sum() + W.square().sum(),
        lambda: (X + W).square().sum(),
        lambda: MODEL(W[None] + X).square().sum(),
        lambda: torch.rand(9, 5).requires_grad_()[TARGET].square().sum() + W.sum(),
        lambda: nn.Parameter(torch.rand(9, 5))[TARGET].square().sum(),
        lambda: torch.ones(6) @ (MODEL(X) - Y).square().sum(1),
        lambda: (MODEL(X) - Y).square().T.sum(1).mean(),
    ],
)
def test_sums_of_other_forms_are_seen(loss):
    assert isinstance(LossCheck("mean", weighed=False).look([loss()], 6.0, samples=6), ConfigError)


def test_losses_by_turns_are_the_same_mean_in_a_step():
    check = LossCheck("mean", weighed=False)
    for loss in (lambda n: F.mse_loss(MODEL(X[:n]), Y[:n]), lambda n: F.cross_entropy(MODEL(X[:n]), TARGET[:n])):
        check.begin_step()
        for size in (4, 2):
            assert check.look([loss(size)], float(size), samples=size) is None and check.fired() is None


def test_a_pass_that_is_none_of_the_steps_leaves_no_trace():
    check = LossCheck("mean", weighed=False)
    check.look([F.mse_loss(MODEL(X), Y)], 6.0)
    assert check.terms == [] and check.mark == 0


def test_a_term_of_a_fixed_size_may_be_one_of_the_pass_and_is_said_to_be_local():
    check = LossCheck("mean", weighed=False)
    for size in (2, 1):
        assert check.look([(MODEL(X[:size]).mean(0) - Y[:size].mean(0)).square().mean()], float(size)) is None
        error = check.fired()
    assert isinstance(error, ConfigError) and "loss='local'" in str(error)


def test_a_factor_that_depends_on_the_pass_is_noticed():
    check = LossCheck("mean", weighed=False)
    for size in (6, 2):
        assert check.look([F.mse_loss(MODEL(X[:size]), Y[:size]) * size / 8], float(size)) is None
        error = check.fired()
    assert isinstance(error, ConfigError)


def test_a_multiple_of_the_samples_is_no_constant_where_passes_differ_in_size():
    check = LossCheck("mean", weighed=False)
    assert check.look([(MODEL(X)[:, :1] - 1).square().sum() / 12], 6.0, alike=False) is None
    assert isinstance(check.look([(MODEL(X)[:, :1] - 1).square().sum() / 16], 6.0, alike=False), ConfigError)
    assert isinstance(check.look([(MODEL(X)[:, :1] - 1).square().sum() / 12], 6.0), ConfigError)


def test_a_loss_that_is_not_finite_says_nothing_of_what_it_is():
    nan = torch.tensor(torch.nan)
    for loss in (nan * F.mse_loss(MODEL(X), Y), (MODEL(X) - Y).square().sum() / nan):
        check = LossCheck("mean", weighed=False)
        assert check.look([loss], 6) is None
        assert check.fired() is None and check.mark == 0


def of_a_mean(loss):
    """A penalty on the gradient of a mean by its inputs."""
    x = X.clone().requires_grad_()
    (g,) = torch.autograd.grad(loss(MODEL(x), Y), x, create_graph=True)
    return g.norm(dim=1).mean()


@pytest.mark.parametrize(
    "loss",
    [
        lambda z: F.cross_entropy(z @ z.T, torch.arange(6)),
        lambda z: F.cross_entropy(torch.einsum("id,jd->ij", z, z), torch.arange(6)),
        lambda z: F.cross_entropy(F.normalize(z) @ F.normalize(MODEL(2 * X)).T / 0.1, torch.arange(6)),
        lambda z: F.mse_loss(z - z.mean(0), Y),
        lambda z: F.mse_loss((z - z.mean(0)) / z.std(0), Y),
        lambda z: F.mse_loss(z / z.norm(dim=0), Y),
        lambda z: F.mse_loss(z - z.mean(), Y),
        lambda z: (z.softmax(0) * Y).mean(),
        lambda z: (z - Y).square().mean(1).topk(3).values.mean(),
        lambda z: torch.cdist(z, z).mean(),
        lambda z: (z[:, None] - z[None]).square().mean(),
        lambda z: z.T.mm(z).fill_diagonal_(0).square().mean(),
        lambda z: (z - z.roll(1, 0)).square().mean(),
        lambda z: of_a_mean(F.mse_loss),
        lambda z: F.mse_loss(z.flip(0), z),
        lambda z: F.mse_loss(torch.softmax(torch.rand(6, 6), 1) @ z, Y),
        lambda z: (F.one_hot(TARGET, 4).float().T @ z).square().mean(),
        lambda z: F.mse_loss(nn.LSTM(4, 4)(z[:, None])[0], Y[:, None]),
        lambda z: F.mse_loss(F.scaled_dot_product_attention(*[z[None, None]] * 3), Y[None, None]),
        lambda z: nn.TransformerEncoderLayer(4, 2, 8)(z[:, None]).square().mean(),
        lambda z: F.mse_loss(attention(z), Y),
        lambda z: F.mse_loss(nn.MultiheadAttention(4, 2)(*[z[:, None]] * 3)[0], Y[:, None]),
    ],
)
def test_samples_that_see_each_other_are_refused_unless_the_loss_is_said_to_be_local(loss):
    error = LossCheck("mean", weighed=False).look([loss(MODEL(X))], 6.0)
    assert isinstance(error, NotSupportedError) and "loss='local'" in str(error) and "Backward" in str(error)
    assert LossCheck("local", weighed=False).look([loss(MODEL(X))], 6.0) is None


def test_a_product_of_two_means_is_no_mean():
    mean = MODEL(X).mean(0)
    for loss in (F.mse_loss(MODEL(X), Y) * MODEL(X).sigmoid().mean(), mean @ mean):
        assert isinstance(LossCheck("mean", weighed=False).look([loss], 6.0), NotSupportedError)
    learnt = F.mse_loss(MODEL(X), Y) * torch.exp(-W[0]) + W[0]
    assert LossCheck("mean", weighed=False).look([learnt], 6.0) is None


def test_workers_whose_losses_have_other_numbers_of_terms_are_compared_by_what_these_are():
    def of_some(n):
        return F.mse_loss(MODEL(X[:n]), Y[:n]) + (F.mse_loss(MODEL(X[:2]), Y[:2]) if n > 2 else 0.0)

    check = LossCheck("mean", weighed=False)
    assert check.look([of_some(2)], 2.0) is None and check.fired() is None
    assert check.look([of_some(6)], 6.0) is None and isinstance(check.fired(), ConfigError)


class Hidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z):
        ctx.num = z.numel()
        return z.sum()

    @staticmethod
    def backward(ctx, g):
        return g.expand(6, 4)


def test_a_loss_that_can_not_be_read_is_said_to_be_taken_for_a_mean_once(caplog):
    check = LossCheck("mean", weighed=False)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert check.look([Hidden.apply(MODEL(X))], 6.0) is None
    assert [r.getMessage() for r in caplog.records if "HiddenBackward" in r.getMessage()] != []
    assert len(caplog.records) == 1


def test_a_small_pass_before_and_a_term_that_comes_later_hide_nothing():
    check = LossCheck("mean", weighed=False)
    for size in (2, 6):
        z = MODEL(X[:size])
        error = check.look([F.mse_loss(z - z.mean(0), Y[:size])], float(size))
    assert isinstance(error, NotSupportedError)
    check = LossCheck("mean", weighed=False)
    for late in (False, True):
        z = MODEL(X)
        error = check.look([F.mse_loss(z, Y) + (F.mse_loss(z - z.mean(0), Y) if late else 0.0)], 6.0)
    assert isinstance(error, NotSupportedError)


def test_reading_a_loss_computes_no_checkpointed_block_once_more():
    calls = []

    def block(h):
        calls.append(1)
        return MODEL[2](torch.tanh(h) * h)

    loss = F.mse_loss(checkpoint(block, MODEL[0](X), use_reentrant=False), Y)
    assert LossCheck("mean", weighed=False).look([loss], 6.0) is None
    assert len(calls) == 1


@pytest.mark.parametrize("loss", [lambda: 2 * (MODEL(X) - Y).square().sum(), lambda: F.mse_loss(MODEL(X), Y) * len(X)])
def test_a_factor_that_may_make_a_sum_is_warned_of_where_all_passes_are_of_one_size(loss):
    check, told = LossCheck("mean", weighed=False), []
    check.warn = told.append
    assert check.look([loss()], 6.0) is None
    assert len(told) == 1 and "loss='sum'" in told[0]
    assert check.look([0.1 * (MODEL(X) - Y).square().sum() / len(X)], 6.0) is None and len(told) == 1


def test_what_means_over_samples_are_multiplied_by_is_the_same_in_all_passes():
    weights = torch.rand(4)
    for same in (True, False):
        check = LossCheck("mean", weighed=False)
        for size in (6, 4):
            p = MODEL(X[:size]).softmax(1)
            by = weights if same else p.detach().square().mean(0)
            assert check.look([(p.mean(0) * by).sum()], float(size)) is None
            error = check.fired()
        assert error is None if same else isinstance(error, NotSupportedError)


def test_the_mark_of_a_loss_does_not_hang_on_its_last_bits():
    marks = set()
    for count in (3.125, 3.125 * (1 + 1e-15), 3.125 * (1 - 1e-15)):
        check = LossCheck("mean", weighed=False)
        check._of_step = [(50.0, count)]
        marks.add(check.mark)
    assert len(marks) == 1
