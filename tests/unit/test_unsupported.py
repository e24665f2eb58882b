"""One table of what is not supported: in code, in docs/training.md, and each row raised somewhere."""

import re
from pathlib import Path

import pytest

from raytrain_het.errors import ConfigError, LoopOrderError
from raytrain_het.worker.checks.unsupported import TABLE, refuse

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("row", TABLE)
def test_the_documents_have_the_same_row(row):
    line = f"| {TABLE[row].what} | {TABLE[row].way_out} |"
    assert line in (ROOT / "docs" / "training.md").read_text(), f"docs/training.md lacks:\n{line}"


def test_the_documents_have_no_row_that_the_code_lacks():
    text = (ROOT / "docs" / "training.md").read_text()
    section = text[text.index("## What is not supported") : text.index("## Learning rates")]
    assert len(re.findall(r"^\| (?!what \|)", section, flags=re.M)) == len(TABLE)


@pytest.mark.parametrize("row", TABLE)
def test_each_row_is_raised_somewhere(row):
    sources = [p.read_text() for p in (ROOT / "raytrain_het").rglob("*.py") if p.name != "unsupported.py"]
    assert any(f'"{row}"' in text for text in sources)


def test_the_error_says_what_and_the_way_out():
    error = refuse("sparse parameter", "'w' has torch.sparse_coo")
    assert isinstance(error, LoopOrderError) and isinstance(error, ConfigError)
    assert str(error) == "sparse parameters can't be trained: 'w' has torch.sparse_coo. Make it dense: p.to_dense()."
