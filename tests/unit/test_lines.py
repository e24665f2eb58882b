"""Lines fit in 80 columns where there is no terminal, without colours, and what is to be copied stays whole."""

from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table
from rich.text import Text

from raytrain_het.jobs import lines

PATH = "/tmp/" + "a-folder/" * 12 + "runs/mine"


@given(st.lists(st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=20), max_size=40))
def test_words_fit_and_none_is_lost(words: list[str]) -> None:
    text = " ".join(words)
    found = lines.wrapped(text, 60)
    assert " ".join(line.strip() for line in found) == text
    assert max(map(len, found)) <= 60
    assert all(line.startswith("  ") for line in found[1:])


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        (f"run folder: {PATH}", f"run folder: {PATH}"),
        (f"the best again: raytrain-het train {PATH}.yaml", f"raytrain-het train {PATH}.yaml"),
        (f"{'word ' * 20}it is in {PATH} now", PATH),
        ("word " * 15 + "write --set global_batch_size=16", "--set global_batch_size=16"),
        ("word " * 15 + """write --set features='["a", "b"]'""", """--set features='["a", "b"]'"""),
        ("word " * 15 + "took 12 ms", "12 ms"),
        ("step 3  epoch 0  " + "  ".join(f"metric_{i} {i}.5" for i in range(9)), "metric_4 4.5"),
    ],
)
def test_what_is_to_be_copied_stays_in_one_line(text: str, whole: str) -> None:
    assert any(whole in line for line in lines.wrapped(text, 80))


def test_a_file_gets_80_columns_or_what_the_environment_says_and_no_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setenv("FORCE_COLOR", "1")
    for text, width in (("", 80), ("120", 120), ("9", 40), ("wide", 80)):
        monkeypatch.setenv("COLUMNS", text)
        assert lines.columns(stream) == lines.console_for(stream).width == width
    table = Table("one", "other", title="A table")
    table.add_row(Text("x", style="bold red"), "long " * 40)
    lines.print_tables(table, stream)
    found = stream.getvalue().splitlines()
    assert "\x1b" not in stream.getvalue()
    assert max(map(len, found)) <= 80 and all(line == line.rstrip() for line in found)
