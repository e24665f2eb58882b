"""From a whole number to a program: rare choices are made to appear, and what does not go together is set right."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

from raytrain_het.testing.programs.program import AVERAGED, CONSTANT, EXTREMES, Program
from raytrain_het.testing.programs.text_data import DATASETS, EXTRAS, SAMPLERS, fetches_pairs
from raytrain_het.testing.programs.text_loop import AFTERS, CLIPS, EDITS, GROUPS, OPTIMIZERS, SCHEDULERS, ZERO
from raytrain_het.testing.programs.text_loss import LOSSES, tasks_of
from raytrain_het.testing.programs.text_model import BLOCKS, BUFFERS

ODD = (
    "two_backward", "create_graph", "autograd_backward", "closure", "second_model", "second_optimizer", "no_step",
    "step_twice", "break", "continue", "accumulate", "raise", "raise_on_one", "return_on_one", "sparse", "complex",
    "lazy", "list_first", "second_pass", "warm_up_pass", "scaler",
)  # fmt: skip

_DRAWS: dict[str, tuple[float, tuple[Any, ...]]] = {
    # field: (how likely it is to be another than the default, against the others; which)
    "task": (2.0, ("classify", "tokens", "image")),
    "head": (0.2, ("tied",)),
    "frozen": (0.6, ("stem", "stem_weight", "head_bias", "head")),
    "thaw": (0.4, ("unfreeze", "freeze_stem", "unfreeze_at_1", "replace_head", "add_group")),
    "layout": (0.4, ("channels_last",)),
    "loss": (1.5, LOSSES),
    "optimizer": (2.5, tuple(name for name in OPTIMIZERS if name not in ("sgd", "lbfgs")) + ("lbfgs",)),
    "groups": (1.0, GROUPS[1:]),
    "dataset": (1.0, DATASETS[1:]),
    "sampler": (1.2, SAMPLERS[1:]),
    "collate": (0.8, ("dict", "own", "pad")),
    "processes": (0.3, (1,)),
    "extra": (0.3, EXTRAS[1:]),
    "samples": (2.0, (17, 21, 25, 32, 40)),
    "batch": (1.5, (4, 6, 7, 12, 50)),
    "drop_last": (1.0, (True,)),
    "epochs": (0.5, (1, 3)),
    "zero": (1.0, tuple(ZERO)[1:]),
    "clip": (1.0, tuple(CLIPS)[1:]),
    "scheduler": (1.2, SCHEDULERS),
    "edit": (0.6, tuple(EDITS)[1:]),
    "after": (0.8, tuple(AFTERS)[1:]),
    "keep": (0.3, ("compare",)),
    "evaluate": (0.8, ("plain", "loader")),
    "report": (1.2, ("sum", "same", "tensor", "sum", "same", "on_one", "twice")),
    "early": (0.4, ("top", "after_step", "epoch")),
    "odd": (0.5, ODD),
    "micro": (1.0, (2, 3)),
    "workers": (1.2, (3,)),
    "bucket_mib": (1.5, (0.0002, 0.001)),
    "check_steps": (1.0, (1, 3, 0)),
    "check": (0.5, ("every_step",)),
    "fault": (0.9, ("kill", "kill_first", "kill_updated", "kill_decoded", "leave", "kill_all", "hub")),
}  # fmt: skip
_SHARES = {
    2: ((3.0, 1.0), (1.0, 3.0), None, (1.0, 1.0), (5.0, 2.0), (1.0, 0.0), (0.0, 1.0), (100.0, 1.0)),
    3: ((5.0, 2.0, 1.0), (1.0, 2.0, 3.0), None, (2.0, 0.0, 1.0), (1.0, 1.0, 1.0), (0.0, 0.0, 1.0)),
}


def generate(seed: int) -> Program:
    """The program of a number. Each field has random numbers of its own, so that a new one leaves the others alone."""
    activity = _random(seed, "activity").choice((0.1, 0.25, 0.45))
    fields: dict[str, Any] = {"seed": seed}
    for name, (weight, values) in _DRAWS.items():
        rng = _random(seed, name)
        if rng.random() < 1 - (1 - activity) ** weight:
            fields[name] = rng.choice(values)
    for name, choices in (("blocks", BLOCKS), ("buffers", BUFFERS)):
        rng = _random(seed, name)
        count = 0
        while count < 3 and rng.random() < activity + (0.3 if name == "blocks" else 0.05):
            count += 1
        fields[name] = tuple(rng.sample(choices, count))
    rng = _random(seed, "shares")
    if fields.get("workers", 2) == 3 or rng.random() < 2 * activity:
        fields["shares"] = rng.choice(_SHARES[fields.get("workers", 2)])
    return settled(Program(**fields))


def _random(seed: int, what: str) -> random.Random:
    return random.Random(f"{seed}/{what}")


def settled(program: Program) -> Program:
    """The program with what does not go together set right; most of it is not there in one's own program either."""
    p = program

    def put(**fields: Any) -> None:
        nonlocal p
        p = dataclasses.replace(p, **fields)

    if p.shares is not None and len(p.shares) != p.workers:
        put(shares=_SHARES[p.workers][0])
    # What belongs to one task only.
    if p.odd == "sparse":
        put(task="tokens", head="linear", frozen="none", optimizer="sgd", loss="mean")
    if p.collate == "pad" or p.head == "tied":
        put(task="tokens")
    if p.loss.startswith("token"):
        put(task="tokens")
    tasks = tasks_of(p.loss)
    if p.task not in tasks:
        put(task=tasks[0]) if p.layout == "none" else put(loss="mean")
    if p.loss == "gradient_penalty" and p.task not in ("regress", "classify"):
        put(task="regress")
    if p.dataset in ("scalars", "augmented", "curriculum") and p.task != "regress":
        put(dataset="tuples")
    if p.collate == "pad":
        put(dataset="tensors", blocks=tuple(b for b in p.blocks if b not in ("gru", "attention", "noise", "batch_norm", "batch_norm_eval")))  # fmt: skip # noqa: E501
    if p.task == "tokens":
        # Blocks that would look at what is padded or ignored do so for each sample by itself.
        put(dataset=p.dataset if p.dataset not in ("scalars", "augmented", "curriculum") else "tuples")
    if p.collate != "default" and not fetches_pairs(p):
        put(collate="default")
    if p.collate == "own" and p.loss == "sum_declared":
        put(collate="default")
    if p.layout == "channels_last" and p.task != "image":
        put(task="image" if "image" in tasks_of(p.loss) and p.loss != "gradient_penalty" and p.dataset in ("tensors", "tuples", "dicts") and p.collate != "pad" else p.task)  # fmt: skip # noqa: E501
        if p.task != "image":
            put(layout="none")
    if p.head == "tied" and (p.thaw == "replace_head" or p.frozen != "none" or p.odd == "sparse"):
        put(head="linear")
    # What needs something else.
    if p.head == "tied" and p.groups in ("two", "decay", "each", "list", "reversed", "named"):
        put(groups="one")
    if p.thaw == "add_group":
        put(groups="late_group")
    elif p.groups == "late_group":
        put(groups="one")
    if p.groups == "named" and p.thaw == "replace_head":
        put(groups="one")
    if p.thaw == "unfreeze_at_1":
        put(frozen="stem")
    if p.thaw in ("unfreeze", "freeze_stem") or p.frozen == "head" and p.groups in ("head",):
        put(frozen="none")
    if p.groups in ("head", "late_group") and p.frozen in ("head", "stem"):
        put(frozen="none")
    if p.loss == "learned_outside":
        put(groups="one", thaw="none", frozen="none")
    if p.sampler in ("batches", "random_batches", "own_batches"):
        put(extra="none" if p.extra == "prefetch" else p.extra)
    if p.sampler == "own_batches":
        put(drop_last=False)
    if p.extra in ("persistent", "prefetch", "timeout", "worker_init_fn"):
        put(processes=1)
    if p.scheduler == "plateau" or "best" in p.buffers:
        put(evaluate=p.evaluate if p.evaluate != "none" else "plain")
    if p.scheduler == "config" and p.sampler not in ("shuffle", "plain"):
        put(scheduler="none")
    if p.scheduler in ("one_cycle", "cyclic") and p.optimizer in ("adam_tensor_lr",):
        put(optimizer="adam")
    if p.scheduler == "one_cycle" and p.optimizer in ("rmsprop", "adagrad", "adagrad_fused", "adafactor", "adadelta", "asgd", "rprop", "sgd", "lbfgs"):  # fmt: skip # noqa: E501
        put(optimizer="momentum")
    if p.scheduler == "chained" or p.scheduler == "sequential":
        put(thaw=p.thaw if p.thaw != "add_group" else "none")
        if p.groups == "late_group" and p.thaw != "add_group":
            put(groups="one")
    if p.scheduler in ("lambda", "one_cycle", "cyclic") and p.thaw == "add_group":
        put(scheduler="none")
    # Gradients of exactly zero but for rounding, divided by their own size, are noise.
    if p.optimizer in ("rprop", "adafactor") and {"batch_norm", "batch_norm_eval"} & set(p.blocks):
        put(optimizer="adam")
    # Bodies that run once for each pass: what a program keeps by itself counts passes then.
    if p.micro:
        put(early="epoch" if p.early in ("top", "after_step") else p.early, keep="none")
        if p.odd in ("break", "continue", "accumulate"):
            put(micro=0)
    if p.scheduler == "each_step_by_hand" and p.fault != "none":
        put(fault="none")
    if p.keep == "compare":
        put(zero="before" if p.zero in ("keep", "in_place") else p.zero, clip="none", edit="none")
    if p.after == "renorm" and (p.frozen == "head" or p.head == "tied" or p.thaw == "replace_head"):
        put(after="none")
    if p.after in ("ema", "ema_by_hand") and (p.thaw != "none" or {"none_at_first", "none_then_data", "becomes_none", "grows", "weight_norm", "spectral_norm"} & {*p.buffers, *p.blocks}):  # fmt: skip # noqa: E501
        put(after="none")
    if p.edit == "head_none" and (p.frozen in ("head", "head_bias") or p.thaw == "replace_head"):
        put(edit="none")
    if p.optimizer == "lbfgs" or p.odd == "closure":
        put(clip="none", edit="none", keep="none", groups="one", report="none", thaw="none")
    if p.odd == "scaler":
        put(keep="none", scheduler="none" if p.scheduler in ("one_cycle",) else p.scheduler)
    if p.odd in ("complex", "lazy"):
        put(optimizer="sgd", clip="none", edit="none", after="none", loss="mean")
    if p.odd in ("list_first", "second_pass", "warm_up_pass", "no_step", "second_model"):
        put(fault="none")
    if p.odd == "accumulate":
        put(zero="missing")
    if p.zero == "missing" and p.odd == "none":
        put(fault="none")
    if p.early != "none" and p.epochs < 2:
        put(epochs=2)
    if p.loss == "gradient_penalty":
        twice = ("inner_backward", "checkpoint_reentrant", "checkpoint_reentrant_twice", "gru")
        put(blocks=tuple(b for b in p.blocks if b not in twice))  # Torch has no second derivatives of them.
    if "batch_norm" in p.blocks and p.batch < 12:
        put(batch=12)
    if set(p.buffers) - CONSTANT and p.thaw == "replace_head" and "shadow" in p.buffers:
        put(thaw="none")
    if "late" in p.blocks and p.groups == "head":
        put(groups="one")
    if p.collate == "pad":  # Statistics of what is padded depend on how a batch is cut.
        put(buffers=tuple(b for b in p.buffers if b not in (*AVERAGED, *EXTREMES, "none_then_data", "queue")))
    if p.by_pass:
        put(keep="none")
        names = ("none_at_first", "none_then_data", "becomes_none", "grows")
        put(buffers=tuple(b for b in p.buffers if b not in names))
    return p
