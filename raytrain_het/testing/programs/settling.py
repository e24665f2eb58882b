"""Change choices of a drawn program that do not go together; most of them would not go together in any program."""

from __future__ import annotations

from typing import Any

from raytrain_het.balance.batch_shares import apportion
from raytrain_het.testing.programs.program import AVERAGED, EXTREMES, Program
from raytrain_het.testing.programs.text_data import fetches_pairs
from raytrain_het.testing.programs.text_loss import tasks_of

_FORMS = {"none_at_first", "none_then_data", "becomes_none", "grows"}
"""Buffers whose form changes."""
_NO_MOMENTUM = (
    "sgd",
    "rmsprop",
    "adagrad",
    "adagrad_fused",
    "adafactor",
    "adadelta",
    "asgd",
    "rprop",
    "lbfgs",
    "adam_tensor_lr",
)


def settled(program: Program) -> Program:
    """The program with as little as possible changed."""
    for rule in (_run, _task, _data, _parameters, _optimizer, _loop, _odd, _last):
        program = program.but(**rule(program))
    return program


def _without(names: tuple[str, ...], *gone: str) -> tuple[str, ...]:
    return tuple(name for name in names if name not in gone)


def _run(p: Program) -> dict[str, Any]:
    fits = p.shares is None or len(p.shares) == p.workers
    return {} if fits else {"shares": (3.0, 1.0) if p.workers == 2 else (5.0, 2.0, 1.0)}


def _task(p: Program) -> dict[str, Any]:
    """Set right what belongs to some tasks only."""
    if p.odd == "sparse":
        plain = {"head": "linear", "frozen": "none", "optimizer": "sgd", "loss": "mean", "layout": "none"}
        return {"task": "tokens", **plain}
    task = "tokens" if p.collate == "pad" or p.head == "tied" else p.task
    loss = p.loss
    tasks = tasks_of(loss)
    if loss == "gradient_penalty":
        tasks = ("regress", "classify")
    if task not in tasks:
        if task == "tokens" and (p.collate == "pad" or p.head == "tied"):
            loss = "mean"
        else:
            task = tasks[0]
    layout = p.layout
    if layout == "channels_last" and task != "image":
        free = "image" in tasks and p.collate != "pad" and p.dataset in ("tensors", "tuples", "dicts")
        task, layout = ("image", layout) if free else (task, "none")
    # Attention to a single token has no gradients but those of rounding.
    blocks = p.blocks if task == "tokens" else tuple("residual" if b == "attention" else b for b in p.blocks)
    return {"task": task, "loss": loss, "layout": layout, "blocks": blocks}


def _data(p: Program) -> dict[str, Any]:
    new: dict[str, Any] = {}
    dataset, collate = p.dataset, p.collate
    if dataset in ("scalars", "augmented", "curriculum") and p.task != "regress":
        dataset = "tuples"
    if collate == "pad":
        dataset = "tensors"
        # What looks at other tokens, or is a statistic of all, depends on how a batch is padded.
        new["blocks"] = _without(p.blocks, "gru", "attention", "noise", "batch_norm", "batch_norm_eval")
        new["buffers"] = _without(p.buffers, *AVERAGED, *EXTREMES, "none_then_data", "queue")
    if not fetches_pairs(p.but(dataset=dataset)):
        collate = "default"
    if p.extra in ("persistent", "prefetch", "timeout", "worker_init_fn"):
        new["processes"] = 1
    if p.sampler == "own_batches":
        new["drop_last"] = False
    return {**new, "dataset": dataset, "collate": collate}


def _parameters(p: Program) -> dict[str, Any]:
    """Which parameters there are, which are trained, and which the optimizer has."""
    head, groups, frozen, thaw = p.head, p.groups, p.frozen, p.thaw
    if head == "tied" and (thaw == "replace_head" or frozen != "none"):
        head = "linear"
    if head == "tied" and groups in ("two", "decay", "each", "list", "reversed", "named"):
        groups = "one"
    if p.loss == "learned_outside":
        groups, thaw, frozen = "one", "none", "none"
    if thaw == "add_group":
        groups = "late_group"
    elif (groups, thaw) == ("named", "replace_head") or groups == ("head" if "late" in p.blocks else "late_group"):
        groups = "one"
    if thaw == "unfreeze_at_1":
        frozen = "stem"
    elif thaw in ("unfreeze", "freeze_stem") or groups in ("head", "late_group") and frozen in ("head", "stem"):
        frozen = "none"
    return {"head": head, "groups": groups, "frozen": frozen, "thaw": thaw}


def _optimizer(p: Program) -> dict[str, Any]:
    optimizer, scheduler = p.optimizer, p.scheduler
    if scheduler == "config" and p.sampler not in ("shuffle", "plain"):
        scheduler = "none"
    if p.thaw == "add_group" and scheduler in ("lambda", "one_cycle", "cyclic", "chained", "sequential"):
        scheduler = "none"
    if scheduler == "one_cycle" and optimizer in _NO_MOMENTUM:
        optimizer = "momentum"
    if scheduler == "cyclic" and optimizer == "adam_tensor_lr":
        optimizer = "adam"
    # Gradients that are zero but for rounding, divided by their own size, are noise.
    centred = bool({"batch_norm", "batch_norm_eval"} & set(p.blocks)) or "centred" in p.loss
    if centred and optimizer in ("rprop", "adafactor"):
        optimizer = "adam"
    return {"optimizer": optimizer, "scheduler": scheduler}


def _loop(p: Program) -> dict[str, Any]:
    new: dict[str, Any] = {}
    if p.scheduler == "plateau" or "best" in p.buffers:
        new["evaluate"] = p.evaluate if p.evaluate != "none" else "plain"
    if p.micro or p.check == "every_step":
        # The body runs once for each pass: what a program counts by itself are passes then.
        new |= {"early": "epoch" if p.early in ("top", "after_step") else p.early, "keep": "none"}
        if p.report == "sum" and p.check == "every_step":
            new["report"] = "same"
    elif p.keep == "compare":
        zero = "before" if p.zero in ("keep", "in_place") else p.zero
        new |= {"zero": zero, "clip": "none", "edit": "none"}
    if p.early != "none" and p.epochs < 2:
        new["epochs"] = 2
    # What a program counts or keeps by itself is its own affair when a step is done again, or a worker comes late.
    if p.fault in ("resume", "kill_reporting"):
        new["report"] = p.report if p.report not in ("none", "same") else "tensor"
    counts = p.early in ("top", "after_step") or p.thaw == "restore" or p.scheduler == "each_step_by_hand"
    if counts or p.zero == "missing" and p.odd == "none":
        new["fault"] = "none"
    changes_head = p.frozen == "head" or p.head == "tied" or p.thaw == "replace_head"
    if p.after == "renorm" and changes_head:
        new["after"] = "none"
    if p.after in ("ema", "ema_by_hand") and (
        p.thaw != "none" or _FORMS & set(p.buffers) or {"weight_norm", "spectral_norm"} & set(p.blocks)
    ):
        new["after"] = "none"
    if p.edit == "head_none" and (p.frozen in ("head", "head_bias") or p.thaw == "replace_head"):
        new["edit"] = "none"
    if p.thaw == "replace_head" and "shadow" in p.buffers:
        new["buffers"] = _without(p.buffers, "shadow")
    return new


def _odd(p: Program) -> dict[str, Any]:
    if p.optimizer == "lbfgs" or p.odd == "closure":
        return {"clip": "none", "edit": "none", "keep": "none", "groups": "one", "report": "none", "thaw": "none"}
    if p.odd == "scaler":
        return {"keep": "none", "scheduler": "none" if p.scheduler == "one_cycle" else p.scheduler}
    if p.odd in ("complex", "lazy"):
        return {"optimizer": "sgd", "clip": "none", "edit": "none", "after": "none", "loss": "mean"}
    if p.odd in ("list_first", "second_pass", "warm_up_pass", "no_step", "second_model"):
        return {"fault": "none"}
    if p.odd in ("evaluate_on_one", "evaluate_raises"):
        return {"evaluate": "plain"}
    if p.odd == "accumulate":
        return {"zero": "missing", "micro": 0}
    return {"micro": 0} if p.odd in ("break", "continue") else {}


def _last(p: Program) -> dict[str, Any]:
    new: dict[str, Any] = {}
    if p.loss == "gradient_penalty":  # Torch has no second derivatives of these.
        twice = ("inner_backward", "checkpoint_reentrant", "checkpoint_reentrant_twice", "gru")
        new["blocks"] = _without(p.blocks, *twice)
    if "batch_norm" in p.blocks and p.batch < 12:
        new["batch"] = 12
    if p.by_pass:
        # The reference makes a worker's passes by itself: the body runs once for each, and buffers are written.
        early = "epoch" if p.early in ("top", "after_step") else p.early
        new |= {"keep": "none", "early": early, "buffers": _without(p.buffers, *_FORMS, "expanded")}
    if p.collate == "pad":  # It would see the padding, of which each worker's slice has as much as it needs.
        new["blocks"] = _without(new.get("blocks", p.blocks), "group_norm")
    if p.fault != "none" and p.groups in ("decay", "head") and p.clip in ("norm", "inf_norm"):
        new["clip"] = "none"  # The norm is of gradients that nobody zeroes, and a worker that comes later has none.
    if p.check_steps == 0 and (p.odd == "local_rate" or "queue" in p.buffers):
        new["check_steps"] = 50  # With nothing compared, replicas differ as they are told to.
    if p.report == "sum" and _somebody_stands_in(p):
        new["report"] = "same"  # What the body adds up holds samples that do not count; a warning says so.
    return new


def _somebody_stands_in(p: Program) -> bool:
    """Whether a worker gets samples that do not count, in a batch of which it has none."""
    last = p.samples % p.batch if not p.drop_last and p.samples % p.batch else p.batch
    return 0 in apportion(min(p.batch, p.samples, last), p.shares or (1.0,) * p.workers)
