"""What a program is made of: one choice for each thing that people vary."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class Program:
    """A training program and how it is run. Every field at its default is the plainest program there is."""

    seed: int = 0
    """Of weights and data."""

    # ---- the model
    task: str = "regress"
    blocks: tuple[str, ...] = ()
    """Between stem and head, in order."""
    buffers: tuple[str, ...] = ()
    head: str = "linear"
    frozen: str = "none"
    thaw: str = "none"
    """What is frozen or unfrozen at the beginning of epoch 1."""
    layout: str = "none"

    # ---- what is minimised, and how
    loss: str = "mean"
    optimizer: str = "sgd"
    groups: str = "one"

    # ---- data
    dataset: str = "tensors"
    sampler: str = "shuffle"
    collate: str = "default"
    processes: int = 0
    extra: str = "none"
    """One more argument of the DataLoader."""
    samples: int = 24
    batch: int = 8
    drop_last: bool = False

    # ---- the loop
    epochs: int = 2
    zero: str = "before"
    clip: str = "none"
    scheduler: str = "none"
    edit: str = "none"
    """What is done to gradients between backward() and step()."""
    after: str = "none"
    """What is done to the model after step()."""
    keep: str = "none"
    """Whether gradients of the last step are kept and used."""
    evaluate: str = "none"
    report: str = "none"
    early: str = "none"
    odd: str = "none"
    """What may be refused."""
    micro: int = 0

    # ---- the run
    workers: int = 2
    shares: tuple[float, ...] | None = (3.0, 1.0)
    bucket_mib: float = 4.0
    check_steps: int = 50
    check: Literal["rolling", "every_step"] = "rolling"
    fault: str = "none"

    def changed(self) -> dict[str, Any]:
        """The fields that are not at their default."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if getattr(self, f.name) != f.default}

    def but(self, **fields: Any) -> Program:
        """The same with some fields changed."""
        return dataclasses.replace(self, **fields)

    def __str__(self) -> str:
        return f"Program({', '.join(f'{k}={v!r}' for k, v in self.changed().items())})"

    @property
    def equal_shares(self) -> bool:
        """Whether every worker has as many samples of each batch as every other one."""
        even = self.shares is None or len(set(self.shares)) == 1
        return even and self.batch % self.workers == 0 and (self.drop_last or self.samples % self.batch == 0)

    @property
    def by_pass(self) -> bool:
        """Whether what is computed depends on how a batch is cut into passes, as the documents say: the reference then
        makes the same passes."""
        weighed = set(self.buffers) & AVERAGED and (self.loss.startswith(WEIGHED) or self.loss.endswith("_local"))
        return bool(
            "batch_norm" in self.blocks or weighed or EXTREMES & set(self.buffers) or self.loss.endswith("_local")
        )

    @property
    def random_passes(self) -> bool:
        """Whether a worker draws numbers of its own: nothing can be compared with one process then."""
        return "dropout" in self.blocks


CONSTANT = {"const_inf", "const_nan", "const_bool", "const_int", "expanded"}
"""Buffers that never change."""
WEIGHED = ("token", "class_weight", "sample_weight")
"""Losses that are means over something else than samples, by which changes of buffers are weighed too."""
AVERAGED = {"mean", "non_persistent", "single"}
"""Buffers that hold averages over the samples of passes."""
EXTREMES = {"infinite"}
"""Buffers that hold least or largest values."""
