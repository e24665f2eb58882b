"""The benchmark pages: each answers a question with raw data that the repository holds."""

from __future__ import annotations

import functools
import re
from decimal import Decimal
from pathlib import Path

import pytest

from experiments.docs_benchmarks import PLACE, plot_and_table
from experiments.docs_plots import PLOTS
from experiments.docs_plots.svg import drawing

ROOT = Path(__file__).resolve().parents[2]
PAGES = ROOT / "docs" / "benchmarks"


@functools.cache
def drawn(name: str) -> tuple[tuple[str, ...], str]:
    """The sources of a page, and what it shows of them."""
    with drawing():
        shown = PLOTS[name]()
        return tuple(shown.sources), plot_and_table(shown)


def test_each_benchmark_page_has_a_plot_and_each_plot_a_page() -> None:
    assert {page.stem for page in PAGES.glob("*.md")} == {*PLOTS, "index"}


@pytest.mark.parametrize("name", PLOTS)
def test_a_benchmark_page_has_all_its_parts(name: str) -> None:
    text = (PAGES / f"{name}.md").read_text()
    parts = [
        r"# .*\?",
        r"\*\*Answer\.\*\* ",
        r"```console\n\$ ",
        PLACE,
        "## What it does not show\n\n- ",
        "## Measured\n\n2",
    ]
    places = [match.start() for part in parts if (match := re.search(f"^{part}", text, flags=re.M))]
    assert len(places) == len(parts) and places == sorted(places)


@pytest.mark.parametrize("name", PLOTS)
def test_a_benchmark_page_shows_what_its_raw_data_hold(name: str) -> None:
    page = (PAGES / f"{name}.md").read_text()
    sources, made = drawn(name)
    for source in sources:
        folder = source.split("/")[0]
        assert (ROOT / "experiments" / "results" / source).is_file()
        assert f"(../../experiments/results/{folder})" in page, folder
        assert source[:10] in page[page.index("## Measured") :]
    assert made.startswith('<figure class="plot"') and "currentColor" in made and "<metadata" not in made
    svg, _, rest = made.partition("</figure>")
    assert "\n" not in svg, "a line break could end the block of HTML"
    widths = {line.count("|") for line in rest.splitlines() if line.startswith("|")}
    assert len(widths) == 1, "each row has as many columns as the head"


@pytest.mark.parametrize("name", PLOTS)
def test_each_decimal_of_an_answer_is_in_the_raw_data(name: str) -> None:
    """Whole numbers may be counts of the text, such as steps."""
    answer = re.search(r"^\*\*Answer\.\*\* (.*?)\n\n", (PAGES / f"{name}.md").read_text(), flags=re.M | re.S)
    assert answer is not None
    table = numbers(drawn(name)[1].partition("</figure>")[2])
    for number in numbers(answer[1]):
        exponent = number.as_tuple().exponent
        if isinstance(exponent, int) and exponent < 0:
            step = Decimal(1).scaleb(exponent)
            assert any(abs(value - number) <= step / 2 for value in table), number


def numbers(text: str) -> list[Decimal]:
    """Without their signs."""
    found = re.findall(r"(?<![\w.])\d[\d,]*(?:\.\d+)?(?:e-?\d+)?(?![\w])", text)
    return [Decimal(number.replace(",", "")) for number in found]
