"""What to tell whoever has chosen a codec that does not suit the model or its optimizer."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

from raytrain_het.collectives.layout import SMALL, Layout
from raytrain_het.compression import CODECS, LowRank
from raytrain_het.compression.randomk import RandomK
from raytrain_het.compression.sign import Sign
from raytrain_het.compression.topk import TopK

logger = logging.getLogger("raytrain_het")


def warn_of_model(compression: Any, words: Sequence[str], layout: Layout) -> None:
    """Of tensors that travel as they are."""
    shapes = {s.name: s.shape for b in layout.buckets if not b.is_dense for s in b.segments}
    if not shapes:
        logger.warning(
            "compression=%r does nothing here: every parameter of the model has one dimension or fewer than %d "
            "elements, and those travel as they are. Leave it out.", compression, SMALL,
        )  # fmt: skip
    for codec in (CODECS[word] for word in words):
        if not isinstance(codec, LowRank) or len(words) > 1:  # Of many that may be chosen, none is told of.
            continue
        whole = [name for name, shape in shapes.items() if codec.matrix(shape) is None]
        if whole:
            logger.warning(
                "compression=%r: %d of %d matrices travel as they are, since factors of rank %d would be no smaller "
                "(%s%s). Write a lower rank if they are to be compressed.", compression, len(whole), len(shapes),
                codec.rank, ", ".join(f"{name} {list(shapes[name])}" for name in whole[:3]),
                ", ..." if len(whole) > 3 else "",
            )  # fmt: skip


def warn_of_optimizer(compression: Any, words: Sequence[str], optimizer: torch.optim.Optimizer) -> None:
    """Of signs for one that divides by what gradients vary."""
    if any(isinstance(CODECS[word], Sign) for word in words) and "betas" in optimizer.defaults:
        logger.warning(
            "compression=%r does not suit %s: it divides by a mean of squared gradients, and with signs all elements "
            "of a block have the same square. Use SGD with momentum, or another codec, such as 'int8'.", compression,
            type(optimizer).__name__,
        )  # fmt: skip


def warn_of_epochs(compression: Any, words: Sequence[str], num_epochs: int) -> None:
    """Of a density that the run does not come to."""
    for word in words:
        codec = CODECS[word]
        last = codec.at_epoch(num_epochs - 1)
        if isinstance(codec, TopK | RandomK) and isinstance(last, TopK | RandomK) and last is not codec:
            logger.warning(
                "compression=%r: the run has %d epochs, all of them in the warm-up: it ends at a density of %.3g, and "
                "does not come to %g. Write fewer warmup_epochs.", compression, num_epochs, last.density, codec.density,
            )  # fmt: skip
