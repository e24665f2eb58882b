"""The first steps' mean gradients compared with those of one process that has the whole batch:
``HetConfig(check="every_step")``.

The first member's first pass of a step is the whole batch. Its gradients and what it makes of buffers are kept, and
nothing of it counts: buffers, registered objects and settings are put back as between the passes of a step.
"""

from __future__ import annotations

import logging

import torch
from torch import nn

from raytrain_het.config import HetConfig
from raytrain_het.errors import ReplicaMismatchError
from raytrain_het.membership.events import Compared
from raytrain_het.membership.record import Record
from raytrain_het.worker.checks.losses import LossCheck

logger = logging.getLogger("raytrain_het")

STEPS = 3
"""So many of a run's first steps are compared."""
TOLERANCE = 1e-3
"""Relative difference that other orders of adding up explain in fp32."""
_BATCH_NORMS = nn.modules.batchnorm._BatchNorm


class Rehearsal:
    """Compares on one worker.

    Args:
        model: whose gradients are compared.
        config: the run's; where it makes means other than the plain one over samples, nothing is compared.
        loss: what the program says of its loss.
    """

    def __init__(self, model: nn.Module, config: HetConfig, loss: LossCheck) -> None:
        self._model, self._config, self._loss = model, config, loss

    def is_due(self, record: Record, rank: int, step: int) -> bool:
        """Whether this member rehearses this step (0 is the first)."""
        first = next(r for r, m in enumerate(record.members) if m.uid not in record.unhealed)
        plain = self._config.alpha == 0 and record.normalised
        return self._config.check == "every_step" and plain and rank == first and step < STEPS

    def compare(
        self, step: int, means: dict[str, torch.Tensor], reference: dict[str, torch.Tensor], record: Record
    ) -> Compared:
        """Compare every parameter's mean gradient with that of the whole batch.

        Returns:
            An event for the run's log: the relative difference, and the parameter in which it is largest.

        Raises:
            ReplicaMismatchError: they differ by more than rounding, and nothing in the model explains it.
        """
        total, off, worst = 0.0, 0.0, ("", 0.0)
        for name, want in reference.items():
            difference = float((means[name].to(want.device) - want).double().norm())
            off, total = off + difference**2, total + float(want.double().norm()) ** 2
            worst = max(worst, (name, difference), key=lambda pair: pair[1])
        error = (off / total) ** 0.5 if total else off**0.5
        why = self._why(record)
        text = (
            f"step {step + 1}: the workers' mean gradient is {error:.2g} off (relative) from that of one process "
            f"with the whole batch, most in {worst[0]!r}"
        )
        if error > TOLERANCE and not why:
            raise ReplicaMismatchError(
                f"{text}. The loss is no mean over samples, or the model computes something over the batch. Say what "
                "the loss is: prepare_data_loader(loss=..., weight=...); docs/training.md has what they mean."
            )
        logger.info("%s%s", text, f"; {why} would explain that" if error > TOLERANCE else "")
        return Compared(step=step, error=error, parameter=worst[0], explained_by=why)

    def compare_buffers(
        self, step: int, got: dict[str, torch.Tensor], reference: dict[str, torch.Tensor], record: Record
    ) -> None:
        """Compare every buffer, but those of batch norms, with what the whole batch makes of it. Where the program
        gives weights they are means by these, and one process's are not: then nothing is compared.

        Raises:
            ReplicaMismatchError: one differs by more than rounding, and nothing in the model explains it.
        """
        if self._loss.is_weighed:
            return
        batch_norms = {name for name, m in self._model.named_modules() if isinstance(m, _BATCH_NORMS)}
        for name, want in reference.items():
            if name.rpartition(".")[0] in batch_norms or not (want.is_floating_point() or want.is_complex()):
                continue
            error = _largest_difference(got[name], want)
            if not error <= TOLERANCE and not self._why(record):
                raise ReplicaMismatchError(
                    f"step {step + 1}: buffer {name!r} is {error:.2g} off (relative) from what one process with the "
                    "whole batch makes of it: of each buffer workers' changes are averaged by samples. One that holds "
                    "a sum is to be divided by the number of samples; keep one that holds an extreme outside of the "
                    "model."
                )

    def _why(self, record: Record) -> str:
        """What makes a worker's gradients others by design."""
        if self._loss.is_local:
            return "loss='local'"
        lossy = sorted({codec for codec in record.codecs if codec != "none"})
        if lossy:
            return f"compression={lossy[0]!r}"
        for name, module in self._model.named_modules():
            if not module.training:
                continue
            if isinstance(module, _BATCH_NORMS):
                return f"the batch norm {name!r}, whose statistics are of a pass"
            if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
                return f"the dropout {name!r}"
        return ""


def _largest_difference(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative to the largest finite value; NaN where one of them is and the other is not."""
    off = torch.where(got == want, 0, got - want).abs()[~(got.isnan() & want.isnan())]
    finite = want[want.isfinite()].abs()
    largest = float(finite.max()) if finite.numel() else 0.0
    return float(off.max()) / (largest or 1.0) if off.numel() else 0.0
