"""Every command and every link of the docs leads somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from raytrain_het import cli
from raytrain_het.jobs.table import load_job

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
FILES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")])
MADE = {DOCS / "settings.md", DOCS / "log.md"}
"""Pages that the site makes."""


def commands(text: str) -> list[str]:
    """Of blocks and of the text between them."""
    blocks = re.findall(r"^```(?:console|bash)\n(.*?)^```", text, flags=re.M | re.S)
    lines = [line.removeprefix("$ ") for block in blocks for line in block.splitlines()]
    lines += [code for code in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text) if "..." not in code]
    return [line for line in lines if re.match(r"raytrain-het \w|python -m (experiments|raytrain_het)", line)]


FOUND = sorted({(path.name, command) for path in FILES for command in commands(path.read_text())})


@pytest.mark.parametrize(("page", "command"), FOUND)
def test_a_command_of_the_docs_is_one_that_is_there(page: str, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = shlex.split(command, comments=True)
    for word in words:
        if word.startswith("experiments/"):
            assert (ROOT / word).exists(), word
    if words[0] == "raytrain-het":
        check_command_line(words[1:])
    else:
        check_module(words[2], [word for word in words[3:] if word.startswith("--")])


def check_command_line(words: list[str]) -> None:
    try:
        arguments = cli._parser().parse_args(words)
    except SystemExit as end:
        assert end.code == 0, "only --help ends here"  # noqa: PT017
        return
    is_job = words[0] == "train" and (arguments.job or "").startswith("experiments/")
    if is_job or (words[0] == "train" and arguments.job is None):
        # A table of the reader's own is not here.
        load_job(arguments.job, [o for o in arguments.overrides if not o.startswith(("data=", "target="))])


def check_module(module: str, options: list[str]) -> None:
    path = ROOT / Path(*module.split("."))
    files = [path.with_suffix(".py")] if path.with_suffix(".py").exists() else sorted(path.glob("*.py"))
    assert files, module
    text = "".join(file.read_text() for file in [*files, ROOT / "experiments" / "benchmarks" / "common.py"])
    assert [option for option in options if f'"{option}"' not in text] == []


def links(path: Path) -> list[str]:
    prose = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.M | re.S)
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", prose) if "://" not in link]


def anchors(path: Path) -> set[str]:
    prose = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.M | re.S)
    titles = re.findall(r"^#+ (.*)$", prose, flags=re.M)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_each_link_leads_to_a_file_and_a_heading_of_the_repository(path: Path) -> None:
    for link in links(path):
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.exists() or target in MADE, link
        if anchor and target not in MADE:
            assert anchor in anchors(target), link
