"""Which refusals are right: for what a program does, what an error about it must name."""

from __future__ import annotations

from raytrain_het.testing.programs.program import Program
from raytrain_het.testing.programs.text_loss import UNDECLARED

_REFUSALS: dict[tuple[str, str], str] = {
    ("loss", "learned_outside"): r"optimizer.*(not|outside).*model|log_scale|criterion",
    ("thaw", "unfreeze"): r"requires_grad|froze|frozen|unfr",
    ("thaw", "unfreeze_at_1"): r"requires_grad|froze|frozen|unfr",
    ("thaw", "freeze_stem"): r"requires_grad|froze|frozen|unfr",
    ("thaw", "replace_head"): r"head",
    ("thaw", "add_group"): r"group|optimizer",
    ("sampler", "distributed"): r"DistributedSampler",
    ("sampler", "own_batches"): r"batch_sampler|Buckets",
    ("sampler", "batches"): r"batch_sampler|BatchSampler",
    ("sampler", "random_batches"): r"batch_sampler|BatchSampler",
    ("sampler", "counting"): r"depends on how often it was iterated",
    ("extra", "timeout"): r"timeout",
    ("extra", "worker_init_fn"): r"worker_init_fn",
    ("extra", "prefetch"): r"prefetch_factor",
    ("extra", "pin_memory"): r"pin_memory",
    ("extra", "persistent"): r"persistent_workers",
    ("scheduler", "unregistered"): r"scheduler.*register",
    ("scheduler", "before_prepare"): r"before the learning-rate scheduler",
    ("zero", "missing"): r"zero_grad",
    ("report", "on_one"): r"report",
    ("report", "twice"): r"report",
    ("optimizer", "lbfgs"): r"closure|LBFGS",
    ("early", "top"): r"return|left",
    ("odd", "two_backward"): r"backward\(\) ran twice",
    ("odd", "create_graph"): r"create_graph",
    ("odd", "closure"): r"closure",
    ("odd", "second_model"): r"prepare_model\(\) was called twice",
    ("odd", "second_optimizer"): r"prepare_optimizer\(\) was called twice|optimizer",
    ("odd", "no_step"): r"step\(\)",
    ("odd", "step_twice"): r"step\(\)",
    ("odd", "break"): r"left in the middle|break",
    ("odd", "continue"): r"backward\(\)",
    ("odd", "accumulate"): r"micro_batch_size|step\(\)|zero_grad",
    ("odd", "sparse"): r"sparse",
    ("odd", "complex"): r"complex|real floating",
    ("odd", "lazy"): r"lazy|uninitialized|Lazy",
    ("odd", "list_first"): r"backward|pass|loader",
    ("odd", "second_pass"): r"second pass|already|finished|loader",
    ("odd", "warm_up_pass"): r"epochs\(\)",
    ("odd", "own_loop"): r"epochs\(\)",
    ("odd", "evaluate_on_one"): r"evaluate",
    ("odd", "evaluate_raises"): r"evaluate|no score",
    ("odd", "conditional_step"): r"step\(\)",
    ("odd", "local_rate"): r"lr|rate",
    ("odd", "post_hook_after"): r"hook",
    ("odd", "return_on_one"): r"return|left",
    ("blocks", "checkpoint_reentrant_twice"): r"checkpoint|reentrant|twice",
    ("blocks", "checkpoint_twice"): r"checkpoint|twice",
    ("buffers", "grows"): r"memory",
    ("buffers", "becomes_none"): r"start",
    ("buffers", "none_then_data"): r"shift|they meet in",
    ("buffers", "none_at_first"): r"first",
    ("buffers", "queue"): r"queue",
    ("buffers", "hand_before_step"): r"heat",
    ("buffers", "hand_after_step"): r"heat",
    ("buffers", "shadow"): r"shadow",
    ("buffers", "best"): r"best",
    ("buffers", "infinite"): r"least",
    ("edit", "head_none"): r"head",
}
"""By (field, value): what the text of a refusal must match."""


def refusals_of(program: Program) -> list[str]:
    """Patterns, one of which a refusal of this program must match."""
    patterns = []
    for (field, value), pattern in _REFUSALS.items():
        there = getattr(program, field)
        if there == value or isinstance(there, tuple) and value in there:
            patterns.append(pattern)
    if program.loss in UNDECLARED:
        patterns.append(r"loss|weight=|reduction")
    if program.workers > program.batch:
        patterns.append("global_batch_size")
    if program.drop_last and program.batch > program.samples - 3:
        patterns.append("leaves no step|makes no step")
    return patterns
