"""From a whole number to a program: rare choices are made to appear."""

from __future__ import annotations

import random
from typing import Any

from raytrain_het.testing.programs.program import Program
from raytrain_het.testing.programs.settling import settled
from raytrain_het.testing.programs.text_choices import AFTERS, CLIPS, EDITS, GROUPS, OPTIMIZERS, SCHEDULERS, ZERO
from raytrain_het.testing.programs.text_data import DATASETS, EXTRAS, SAMPLERS
from raytrain_het.testing.programs.text_loss import LOSSES
from raytrain_het.testing.programs.text_model import BLOCKS, BUFFERS

ODD = (
    "two_backward",
    "create_graph",
    "autograd_backward",
    "closure",
    "second_model",
    "second_optimizer",
    "no_step",
    "step_twice",
    "break",
    "continue",
    "accumulate",
    "raise",
    "raise_on_one",
    "return_on_one",
    "sparse",
    "complex",
    "lazy",
    "list_first",
    "second_pass",
    "warm_up_pass",
    "scaler",
    "own_loop",
    "evaluate_on_one",
    "evaluate_raises",
    "conditional_step",
    "finite_step",
    "local_rate",
    "rank_seed",
    "optimizer_first",
    "numpy_sizes",
    "post_hook_after",
)

_DRAWS: dict[str, tuple[float, tuple[Any, ...]]] = {
    # field: (how likely it is to be another than the default, against the others; which)
    "task": (2.0, ("classify", "tokens", "image")),
    "head": (0.2, ("tied",)),
    "frozen": (0.6, ("stem", "stem_weight", "head_bias", "head")),
    "thaw": (0.5, ("restore", "unfreeze", "freeze_stem", "unfreeze_at_1", "replace_head", "add_group")),
    "layout": (0.4, ("channels_last",)),
    "loss": (1.5, LOSSES),
    "optimizer": (2.5, OPTIMIZERS[1:]),
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
    "report": (1.2, ("sum", "same", "tensor", "sum", "same", "on_one", "twice", "kinds")),
    "early": (0.4, ("top", "after_step", "epoch")),
    "odd": (0.5, ODD),
    "micro": (1.0, (2, 3)),
    "workers": (1.2, (3,)),
    "bucket_mib": (1.5, (0.0002, 0.001)),
    "check_steps": (1.0, (1, 3, 0)),
    "check": (0.5, ("every_step",)),
    "fault": (
        0.9,
        ("kill", "kill_first", "kill_updated", "kill_decoded", "leave", "kill_all", "hub", "kill_reporting", "resume"),
    ),
}
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
