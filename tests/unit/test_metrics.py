"""What report() and evaluate() take: numbers of every library, nested; and what they refuse, by name."""

from __future__ import annotations

import datetime
import decimal
import fractions
import json
import math
from typing import Any

import numpy as np
import pytest
import torch

from raytrain_het.errors import ConfigError
from raytrain_het.worker.state.metrics import check_metrics, check_reduce, check_sums


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (torch.tensor(1.5), 1.5),
        (torch.tensor([[2]]), 2),
        (torch.tensor(1.5, requires_grad=True), 1.5),
        (torch.tensor(0.5, dtype=torch.bfloat16), 0.5),
        (torch.tensor(True), True),
        (np.float32(0.5), 0.5),
        (np.int64(3), 3),
        (np.bool_(True), True),
        (np.array([7]), 7),
        (np.str_("text"), "text"),
        (None, None),
        (math.inf, math.inf),
        (decimal.Decimal("0.5"), 0.5),
        (fractions.Fraction(1, 4), 0.25),
        (10**30, 1e30),
        (2**62, 2**62),
        (True, True),
        ("text", "text"),
    ],
)
def test_numbers_of_every_library_are_plain_numbers(value: Any, expected: Any) -> None:
    found = check_metrics({"x": value}, {})["x"]
    assert (type(found), found) == (type(expected), expected)
    json.dumps(found)


def test_nested_dictionaries_have_their_names_joined_and_other_keys_are_texts() -> None:
    metrics = {"eval": {"loss": 1.0, "by class": {np.int64(0): 0.5, 1: 0.25}}, 3: 4}
    plain = check_metrics(metrics, check_reduce({"eval": {"loss": "max"}}))
    assert plain == {"eval/loss": 1.0, "eval/by class/0": 0.5, "eval/by class/1": 0.25, "3": 4}


@pytest.mark.parametrize(
    ("metrics", "said"),
    [
        ({"x": [1, 2]}, "metric 'x' is a list"),
        ({"x": torch.zeros(3)}, "metric 'x' is a Tensor of 3 elements"),
        ({"x": np.zeros(0)}, "of 0 elements"),
        ({"x": 1 + 2j}, "is a complex"),
        ({"x": torch.zeros(1, dtype=torch.complex64)}, "is a complex"),
        ({"x": torch.zeros(1, device="meta")}, "metric 'x' has no value"),
        ({"x": datetime.date(2020, 1, 1)}, "is a date"),
        ({"x": 10**400}, "no float holds"),
        ({"x": "a" * 10_001}, "a text of 10,001 characters"),
        ({("a", "b"): 1}, "('a', 'b') names a metric"),
        ({None: 1}, "None names a metric"),
        ({"a/b": 1, "a": {"b": 2}}, "'a/b' is given twice"),
        ({"a": {"b": object()}}, "metric 'a/b' is a object"),
        ([1.0], "report() got a list"),
        (None, "got a NoneType"),
        (dict.fromkeys(range(200), "a" * 9999), "200 metrics take"),
    ],
)
def test_what_is_no_number_text_or_flag_is_refused_by_name(metrics: Any, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_metrics(metrics, {})
    assert said in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("reduce", [{"y": "sum"}, {"x": "median"}, {"x": []}, {"text": "sum"}])
def test_a_reduction_of_what_is_not_there_or_no_number_is_refused(reduce: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"report\(reduce="):
        check_metrics({"x": 1.0, "text": "a"}, reduce)


def test_an_evaluations_sums_are_numbers() -> None:
    assert check_sums({"hits": torch.tensor(3), "flag": True, "by": {"a": np.float32(0.5)}}) == {
        "hits": 3.0,
        "flag": 1.0,
        "by/a": 0.5,
    }
    for returned in ({"x": "good"}, {"x": None}, {"x": torch.zeros(2)}, 3.0, None, torch.tensor(1.0)):
        with pytest.raises(ConfigError, match=r"evaluate\(\): fn"):
            check_sums(returned)
