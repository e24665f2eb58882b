"""What to tell whoever has chosen a codec that does not suit the model or its optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from raytrain_het.allreduce.codecs import codec_of
from raytrain_het.allreduce.layout import SMALL, Layout


def warnings_of_model(compression: Any, words: Sequence[str], layout: Layout) -> list[str]:
    """Of tensors that travel as they are."""
    said = []
    shapes = {s.name: s.shape for b in layout.buckets if not b.is_dense for s in b.segments}
    if not shapes:
        said.append(
            f"compression={compression!r} does nothing here: every parameter of the model has one dimension or fewer "
            f"than {SMALL} elements, and those travel as they are. Leave it out."
        )
    if len(words) == 1:  # With several to choose from, the user has not written any of them.
        warning = codec_of(words[0]).warning_of_shapes(shapes)
        if warning is not None:
            said.append(f"compression={compression!r}: {warning}")
    return said


def warnings_of_optimizer(compression: Any, words: Sequence[str], optimizer: torch.optim.Optimizer) -> list[str]:
    """Of signs for one that divides by what gradients vary."""
    if all(codec_of(word).suits_adaptive_optimizers for word in words) or "betas" not in optimizer.defaults:
        return []
    return [
        f"compression={compression!r} does not suit {type(optimizer).__name__}: it divides by a mean of squared "
        "gradients, and with signs all elements of a block have the same square. Use SGD with momentum, or another "
        "codec, such as 'int8'."
    ]


def warnings_of_epochs(compression: Any, words: Sequence[str], num_epochs: int) -> list[str]:
    """Of a density that the run does not come to."""
    said = []
    for codec in map(codec_of, words):
        last = codec.at_epoch(num_epochs - 1)
        if last is not codec and codec.density is not None and last.density is not None:
            said.append(
                f"compression={compression!r}: the run has {num_epochs} epochs, all of them in the warm-up: it ends at "
                f"a density of {last.density:.3g}, and does not come to {codec.density:g}. Write fewer warmup_epochs."
            )
    return said
