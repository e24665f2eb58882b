"""Optimizers, groups, schedulers, and lines of the loop's body: what a program may choose from."""

from __future__ import annotations

OPTIMIZERS_TEXT: dict[str, str] = {
    "sgd": "torch.optim.SGD({}, lr=0.05)",
    "momentum": "torch.optim.SGD({}, lr=0.05, momentum=0.9, weight_decay=0.01)",
    "nesterov": "torch.optim.SGD({}, lr=0.05, momentum=0.9, nesterov=True)",
    "sgd_maximize": "torch.optim.SGD({}, lr=0.001, momentum=0.9, dampening=0.1, maximize=True)",
    "sgd_fused": "torch.optim.SGD({}, lr=0.05, momentum=0.9, fused=True)",
    "sgd_foreach": "torch.optim.SGD({}, lr=0.05, momentum=0.9, foreach=True)",
    "adam": "torch.optim.Adam({}, lr=0.01)",
    "adam_amsgrad": "torch.optim.Adam({}, lr=0.01, amsgrad=True, weight_decay=0.01)",
    "adam_fused": "torch.optim.Adam({}, lr=0.01, fused=True)",
    "adam_foreach": "torch.optim.Adam({}, lr=0.01, foreach=True)",
    "adam_tensor_lr": "torch.optim.Adam({}, lr=torch.tensor(0.01), foreach=False)",
    "adamw": "torch.optim.AdamW({}, lr=0.01)",
    "adamw_fused": "torch.optim.AdamW({}, lr=0.01, fused=True)",
    "rmsprop": "torch.optim.RMSprop({}, lr=0.01, momentum=0.9, centered=False, eps=1e-4)",
    "adagrad": "torch.optim.Adagrad({}, lr=0.05, eps=1e-4)",
    "adagrad_fused": "torch.optim.Adagrad({}, lr=0.05, eps=1e-4, fused=True)",
    "adafactor": "torch.optim.Adafactor({}, lr=0.01)",
    "nadam": "torch.optim.NAdam({}, lr=0.01)",
    "radam": "torch.optim.RAdam({}, lr=0.01)",
    "adamax": "torch.optim.Adamax({}, lr=0.01, eps=1e-4)",
    "adadelta": "torch.optim.Adadelta({}, lr=0.5, eps=1e-3)",
    "asgd": "torch.optim.ASGD({}, lr=0.05, t0=3)",
    "rprop": "torch.optim.Rprop({}, lr=0.001)",
    "lbfgs": "torch.optim.LBFGS({}, lr=0.1)",
}
OPTIMIZERS = tuple(OPTIMIZERS_TEXT)

GROUPS_TEXT: dict[str, str] = {
    "one": "model.parameters()",
    "list": "[p for p in model.parameters() if p.requires_grad]",
    "named": "model.named_parameters()",
    "two": '[{"params": [p for p in model.parameters() if p.ndim > 1]}, '
    '{"params": [p for p in model.parameters() if p.ndim <= 1], "lr": 0.003}]',
    "head": "model.head.parameters()",
    "late_group": "model.stem.parameters()",
    "decay": '[{"params": model.stem.parameters(), "weight_decay": 0.1}, {"params": model.head.parameters()}]',
    "each": '[{"params": [p], "lr": 0.01 / (k + 1)} for k, p in enumerate(model.parameters())]',
    "reversed": "list(model.parameters())[::-1]",
}
GROUPS = tuple(GROUPS_TEXT)

SCHEDULERS_TEXT: dict[str, tuple[str, str, str]] = {
    # name: (how it is made, after each step, after each epoch)
    "step_epoch": ("StepLR(optimizer, 1, gamma=0.5)", "", "scheduler.step()"),
    "exponential": ("ExponentialLR(optimizer, 0.9)", "scheduler.step()", ""),
    "lambda": ("LambdaLR(optimizer, lambda k: 1.0 / (1 + k))", "scheduler.step()", ""),
    "one_cycle": ("OneCycleLR(optimizer, max_lr=0.05, total_steps=40)", "scheduler.step()", ""),
    "cyclic": (
        "CyclicLR(optimizer, base_lr=0.01, max_lr=0.05, step_size_up=2, cycle_momentum=False)",
        "scheduler.step()",
        "",
    ),
    "cosine": ("CosineAnnealingLR(optimizer, 4)", "scheduler.step()", ""),
    "warm_restarts": ("CosineAnnealingWarmRestarts(optimizer, 2)", "", "scheduler.step(epoch + 0.5)"),
    "plateau": ("ReduceLROnPlateau(optimizer, patience=0, threshold=0.5)", "", 'scheduler.step(scores["error"])'),
    "sequential": (
        "SequentialLR(optimizer, [LinearLR(optimizer, 0.1, total_iters=2), ExponentialLR(optimizer, 0.9)], [2])",
        "scheduler.step()",
        "",
    ),
    "chained": (
        "ChainedScheduler([ConstantLR(optimizer, 0.5, 2), ExponentialLR(optimizer, 0.9)])",
        "scheduler.step()",
        "",
    ),
    "unregistered": ("ExponentialLR(optimizer, 0.9)", "scheduler.step()", ""),
    "before_prepare": ("ExponentialLR(optimizer, 0.9)", "scheduler.step()", ""),
}
SCHEDULERS = (*SCHEDULERS_TEXT, "by_hand", "each_step_by_hand", "config")

ZERO: dict[str, str] = {
    "before": "optimizer.zero_grad()",
    "first": "optimizer.zero_grad()",
    "after": "optimizer.zero_grad()",
    "keep": "optimizer.zero_grad(set_to_none=False)",
    "model": "model.zero_grad()",
    "none": "for p in model.parameters():\n    p.grad = None",
    "in_place": "for p in model.parameters():\n    if p.grad is not None:\n        p.grad.zero_()",
    "missing": "",
}

CLIPS: dict[str, str] = {
    "none": "",
    "norm": 'seen[epoch, "norm"] = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3))',
    "inf_norm": "torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1, norm_type=torch.inf)",
    "value": "torch.nn.utils.clip_grad_value_(model.parameters(), 0.05)",
    "head": "torch.nn.utils.clip_grad_norm_(model.head.parameters(), 0.1)",
    "config_norm": "",
    "config_value": "",
}

EDITS: dict[str, str] = {
    "none": "",
    "scale": "for p in model.parameters():\n    if p.grad is not None:\n        p.grad.mul_(0.5)",
    "centralise": "for p in model.parameters():\n    if p.grad is not None and p.ndim > 1:\n"
    "        p.grad.sub_(p.grad.mean())",
    "new": "for p in model.parameters():\n    if p.grad is not None:\n        p.grad = p.grad * 2.0",
    "head_none": "model.head.bias.grad = None",
    "sign": "for p in model.parameters():\n    if p.grad is not None:\n"
    "        p.grad.copy_(torch.tanh(100.0 * p.grad))",
}

AFTERS: dict[str, str] = {
    "none": "",
    "clamp": "with torch.no_grad():\n    for p in model.parameters():\n        p.clamp_(-0.3, 0.3)",
    "renorm": "with torch.no_grad():\n    model.head.weight.div_(model.head.weight.norm(dim=1, keepdim=True))",
    "new_data": "model.head.bias.data = 0.9 * model.head.bias.data",
    "data": "model.head.bias.data.mul_(0.9)",
    "ema": "ema.update_parameters(model)",
    "ema_by_hand": "with torch.no_grad():\n    for old, new in zip(ema.parameters(), model.parameters()):\n"
    "        old.lerp_(new, 0.1)",
}

HANDS: dict[str, tuple[str, str]] = {
    # buffer: (between backward() and step(), after step())
    "hand_before_step": ("model.heat.mul_(0.9)", ""),
    "hand_after_step": ("", "model.heat.mul_(0.9)"),
    "shadow": ("", "model.shadow.lerp_(model.head.weight.detach()[0], 0.1)"),
    "queue": ("", "model.queue.copy_(model.last)"),
}
