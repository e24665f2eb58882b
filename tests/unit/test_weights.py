"""Weights that would silently stop the training are refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from raytrain_het.errors import ConfigError
from raytrain_het.worker.checks.weights import checked_weight


@pytest.mark.parametrize("value", [0, 0.0, 3, 2.5, True, np.float32(2.5), torch.tensor(7), torch.tensor([1.5])])
def test_a_number_from_0_is_a_weight(value: Any) -> None:
    weight = checked_weight(value)
    assert type(weight) is float
    assert weight == value


@pytest.mark.parametrize("value", [-1, -1e-9, math.nan, math.inf, torch.tensor(math.nan), None, "many", torch.ones(2)])
def test_what_is_no_weight_is_refused_with_the_value_and_the_fix(value: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"weight=\.\.\.\) returned .* finite number from 0\. Return what the loss"
    ) as error:
        checked_weight(value)
    assert repr(value) in str(error.value)
