"""The text of a program's loss."""

from __future__ import annotations

from raytrain_het.testing.programs.program import Program

_LOSSES: dict[str, dict[str, str]] = {
    "regress": {
        "mean": "F.mse_loss(out, y)",
        "by_length": "(out - y).square().sum() / len(x)",
        "huber": "F.huber_loss(out, y, delta=0.5)",
        "two_terms": "F.mse_loss(out, y) + 0.1 * F.l1_loss(out, y) + 0.01 * out.square().mean()",
        "each_mean": "(out - y).square().reshape(len(x), -1).mean(1).mean()",
        "sum": 'F.mse_loss(out, y, reduction="sum")',
        "sum_by_hand": "((out - y) ** 2).sum()",
        "sum_of_constant": "(out - y).square().sum() / 16",
        "root": "F.mse_loss(out, y).sqrt()",
        "largest": "(out - y).square().reshape(len(x), -1).sum(1).amax()",
        "centred": "(out - out.mean(0) - y).square().mean()",
        "spread": "F.mse_loss(out, y) + 0.1 * out.std()",
        "sample_weight": "each = (out - y).square().reshape(len(x), -1).mean(1)\n"
        "loss = (each * x[:, 0].abs()).sum() / x[:, 0].abs().sum()",
    },
    "classify": {
        "mean": "F.cross_entropy(out, y)",
        "nll": "F.nll_loss(F.log_softmax(out, 1), y)",
        "gathered": "-F.log_softmax(out, 1).gather(1, y[:, None]).mean()",
        "binary": "F.binary_cross_entropy_with_logits(out, F.one_hot(y, 4).double())",
        "divergence": 'F.kl_div(F.log_softmax(out, 1), F.one_hot(y, 4).double(), reduction="batchmean")',
        "focal": 'each = F.cross_entropy(out, y, reduction="none")\nloss = ((1 - torch.exp(-each)) ** 2 * each).mean()',
        "margin": "F.multi_margin_loss(out, y)",
        "smooth": "F.cross_entropy(out, y, label_smoothing=0.1)",
        "sum": 'F.cross_entropy(out, y, reduction="sum")',
        "sum_by_hand": 'F.cross_entropy(out, y, reduction="none").sum()',
        "class_weight": "F.cross_entropy(out, y, weight=class_weights)",
        "spread": "F.cross_entropy(out, y) + 0.1 * out.std()",
    },
    "tokens": {
        "mean": 'each = F.cross_entropy(out.transpose(1, 2), y, ignore_index=-100, reduction="none")\n'
        "loss = (each.sum(1) / (y != -100).sum(1)).mean()",
        "sum": 'F.cross_entropy(out.transpose(1, 2), y, ignore_index=-100, reduction="sum")',
        "token": "F.cross_entropy(out.transpose(1, 2), y, ignore_index=-100)",
        "token_flat": "F.cross_entropy(out.reshape(-1, 11), y.reshape(-1), ignore_index=-100)",
        "token_mask": "mask = y != -100\n"
        'loss = (F.cross_entropy(out.transpose(1, 2), y, reduction="none") * mask).sum() / mask.sum()',
        "token_chosen": "F.cross_entropy(out[y != -100], y[y != -100])",
    },
}
_ANY = ("learned", "learned_outside", "penalty", "norm_penalty", "gradient_penalty")

UNDECLARED = (
    "sum",
    "sum_by_hand",
    "sum_of_constant",
    "token",
    "token_flat",
    "token_mask",
    "token_chosen",
    "class_weight",
    "root",
    "largest",
    "centred",
    "spread",
    "sample_weight",
)
"""Losses that are no means over samples, of which the run was not told."""
DECLARED = tuple(f"{name}_declared" for name in UNDECLARED if name.startswith(("sum", "token", "class")))
LOCAL = tuple(f"{name}_local" for name in ("root", "centred", "spread", "token"))
_names = (name for kinds in _LOSSES.values() for name in kinds if name != "mean" and name not in UNDECLARED)
LOSSES = (*dict.fromkeys(_names), *_ANY, *UNDECLARED, *DECLARED, *DECLARED, *LOCAL)


def base_of(loss: str) -> str:
    """The loss without what was told of it."""
    return loss.removesuffix("_declared").removesuffix("_local")


def tasks_of(loss: str) -> tuple[str, ...]:
    """The tasks that have such a loss."""
    base = base_of(loss)
    if base in _ANY:
        return ("regress", "classify", "tokens", "image")
    tasks = tuple(task for task, kinds in _LOSSES.items() if base in kinds)
    return (*tasks, "image") if "classify" in tasks else tasks


def loss_lines(program: Program) -> list[str]:
    """Lines that compute ``out`` and ``loss``."""
    kinds = _LOSSES["classify" if program.task == "image" else program.task]
    text = kinds.get(base_of(program.loss), kinds["mean"])
    lines = ["out = model(x)" if program.dataset != "scalars" else "out = model(x).sum(1)"]
    lines += text.splitlines() if "\n" in text else [f"loss = {text}"]
    if program.loss == "learned":
        lines.append("loss = loss * torch.exp(-model.log_scale) + model.log_scale")
    elif program.loss == "learned_outside":
        lines.append("loss = criterion(loss)")
    elif program.loss == "penalty":
        lines.append("loss = loss + 0.01 * sum(p.square().sum() for p in model.parameters())")
    elif program.loss == "norm_penalty":
        lines.append("loss = loss + 0.01 * model.head.weight.norm()")
    elif program.loss == "gradient_penalty":
        lines = ["x.requires_grad_()", *lines]
        lines.append("slope = torch.autograd.grad(out.sum(), x, create_graph=True)[0]")
        lines.append("loss = loss + 0.1 * slope.square().sum(1).mean()")
    if program.odd == "complex":
        lines.append("loss = loss + 0.1 * model.phase.abs().sum()")
    return lines


def declared(program: Program, y: str) -> str:
    """How prepare_data_loader is told of the loss; nothing where it need not be.

    Args:
        program: the program.
        y: how the targets are written, with a batch in ``batch``.
    """
    if program.loss.endswith("_local"):
        return 'loss="local"'
    if not program.loss.endswith("_declared"):
        return ""
    if program.loss.startswith("token"):
        return f"weight=lambda batch: float(({y} != -100).sum())"
    if program.loss.startswith("class_weight"):
        return f"weight=lambda batch: float(class_weights[{y}].sum())"
    return 'loss="sum"'


def additive(program: Program) -> str:
    """Something of a batch whose sum over the parts of a batch is that of the whole."""
    if program.loss.startswith("sum"):
        return "loss.item()"
    return "float(len(x))" if base_of(program.loss) in UNDECLARED else "loss.item() * len(x)"
