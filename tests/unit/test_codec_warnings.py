"""What is said where a codec does not suit what it is used for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from raytrain_het.allreduce.layout import Layout
from raytrain_het.codec_options import AUTO_CODECS
from raytrain_het.worker.checks.codec_warnings import warnings_of_epochs, warnings_of_model, warnings_of_optimizer


def layout_of(*modules: nn.Module) -> Layout:
    return Layout(list(nn.Sequential(*modules).named_parameters()), [], 1 << 20, small_apart=True)


def test_a_model_of_tiny_tensors_is_told_that_compression_does_nothing() -> None:
    (said,) = warnings_of_model("int8", ["int8"], layout_of(nn.Linear(10, 10), nn.Linear(10, 2)))
    assert "compression='int8' does nothing here" in said


def test_matrices_that_factors_of_the_rank_would_not_make_smaller_are_named() -> None:
    layout = layout_of(nn.Linear(1024, 4), nn.Linear(256, 256))
    assert warnings_of_model("lowrank", ["lowrank(rank=2)"], layout) == []
    assert warnings_of_model("auto", AUTO_CODECS, layout) == []
    (said,) = warnings_of_model("lowrank", ["lowrank"], layout)
    assert "1 of 2 matrices travel as they are" in said and "factors of rank 4 " in said
    assert "(0.weight [4, 1024])" in said


@pytest.mark.parametrize(
    ("word", "kind", "warns"),
    [
        ("sign", torch.optim.AdamW, True),
        ("sign", torch.optim.SGD, False),
        ("topk", torch.optim.AdamW, False),
    ],
)
def test_signs_for_an_optimizer_that_divides_by_squares_are_warned_of(word, kind, warns) -> None:
    said = warnings_of_optimizer(word, ["none", word], kind(nn.Linear(2, 2).parameters(), lr=0.1))
    assert ["does not suit" in text for text in said] == [True] * warns


def test_a_warm_up_as_long_as_the_run_is_warned_of() -> None:
    word = "topk(density=0.001, warmup_epochs=3)"
    assert warnings_of_epochs(word, [word, "int8"], 4) == []
    (said,) = warnings_of_epochs(word, [word, "int8"], 3)
    assert "it ends at a density of 0.0063, and does not come to 0.001" in said
