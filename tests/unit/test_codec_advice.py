"""What is said of codecs before a run."""

import dataclasses
import io

import pytest
from rich.console import Console

from raytrain_het.balance.codec_choice import CodecCost, Fleet, predict
from raytrain_het.cli import main
from raytrain_het.jobs.probe_report import _codec_sentences, _codec_table
from raytrain_het.probing.codec_advice import codec_advice

COSTS = {
    "none": CodecCost(4, 0, 0, 0),
    "int8": CodecCost(1, 1e-9, 1e-9, 0.006),
    "topk": CodecCost(0.03, 3e-9, 1e-9, 0.95),
}
MBIT = 1e6 / 8
SLOW = Fleet(4_000_000, [COSTS] * 4, [1 / (100 * MBIT)] * 4, [1.0] * 4, compute_s=0.05)


def test_every_codec_is_predicted_and_the_choice_is_that_of_auto():
    advice = codec_advice(SLOW, list(COSTS), 0.97)
    assert advice.by_codec["int8"] == predict(SLOW, ["int8"] * 4)
    assert advice.chosen == ("topk",) * 4 and advice.step_s == predict(SLOW, advice.chosen).step_s
    assert "times as short" in advice.why
    assert codec_advice(SLOW, list(COSTS), 0.1).chosen == ("int8",) * 4


@pytest.mark.parametrize("word", ["int8", "topk"])
def test_below_its_break_even_a_codec_makes_steps_shorter_and_above_longer(word):
    below = codec_advice(SLOW, list(COSTS), 1.0).break_even[word]
    for factor, pays in ((0.95, True), (1.05, False)):
        there = dataclasses.replace(SLOW, byte_s=[1 / (factor * below)] * 4)
        assert (predict(there, [word] * 4).step_s < predict(there, ["none"] * 4).step_s) is pays


def test_why_nothing_is_compressed_is_said():
    fast = dataclasses.replace(SLOW, byte_s=[1e-12] * 4)
    assert codec_advice(fast, list(COSTS), 1.0).why.startswith("none that may be used makes steps shorter by 5%")
    alone = Fleet(1000, [COSTS], [0.0], [1.0])
    assert codec_advice(alone, list(COSTS), 1.0).why == "a single worker sends nothing"
    tiny = dataclasses.replace(SLOW, num_elements=0)
    assert "too small" in codec_advice(tiny, list(COSTS), 1.0).why
    dear = {word: dataclasses.replace(cost, encode_s=1.0 if word != "none" else 0.0) for word, cost in COSTS.items()}
    never = codec_advice(dataclasses.replace(SLOW, costs=[dear] * 4), list(COSTS), 1.0)
    assert never.break_even == {"int8": None, "topk": None}


def test_the_table_fits_in_80_columns_and_names_each_workers_codec_where_they_differ():
    console = Console(width=80, record=True, file=io.StringIO())
    advice = codec_advice(SLOW, list(COSTS), 0.97)
    console.print(_codec_table(advice))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80 and "topk" in text and "int8" in text
    assert _codec_sentences(advice)[0].startswith("compression=auto would choose topk: ")
    mixed = dataclasses.replace(advice, chosen=("none", "none", "none", "topk"))
    assert "topk on worker 3" in _codec_sentences(mixed)[0]


def test_codecs_are_predicted_for_a_job_only(capsys: pytest.CaptureFixture[str]):
    assert main(["probe", "--compression"]) == 2
    assert "add --model JOB.yaml" in capsys.readouterr().err
