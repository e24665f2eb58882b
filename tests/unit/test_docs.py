"""The docs: every complete example runs, and the site is whole."""

from __future__ import annotations

import ast
import builtins
import dataclasses
import dis
import inspect
import os
import re
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pydantic
import pytest
import yaml

from experiments import docs_pages
from raytrain_het.codec_options import CODECS
from raytrain_het.jobs.table import JOBS
from raytrain_het.membership import events
from raytrain_het.optim import OPTIMIZERS, SCHEDULES
from raytrain_het.score_policies import SCORE_POLICIES
from raytrain_het.sweeps import SweepConfig, make_sweep
from raytrain_het.testing import plugin

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
MADE = {"settings.md", "log.md"}
"""Pages that are made of the code and of the log."""
GUIDES = {
    "Training function": "training.md",
    "Unequal fleets": "shares.md",
    "Compression": "compression.md",
    "Faults and resuming": "faults.md",
    "Sweeps": "sweeps.md",
    "Probing": "probing.md",
    "Simulation": "lab.md",
}


def python_blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(), flags=re.M | re.S)


@pytest.fixture
def tables() -> Iterator[None]:
    """What an example adds to the tables is gone after it."""
    all_tables: list[dict] = [CODECS, JOBS, OPTIMIZERS, SCHEDULES, SCORE_POLICIES]
    before = [dict(table) for table in all_tables]
    yield
    for table, items in zip(all_tables, before, strict=True):
        for key in table.keys() - items.keys():
            del table[key]


@pytest.mark.parametrize("place", range(len(python_blocks("extending.md"))))
def test_an_example_of_an_extension_runs_as_it_stands(
    place: int, tables: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType(f"example_{place + 1}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(python_blocks("extending.md")[place], f"extending.md, block {place + 1}", "exec"), vars(module))
    defined = [v for v in vars(module).values() if getattr(v, "__module__", "") == module.__name__ and callable(v)]
    assert [v.__name__ for v in defined if hasattr(v, "__name__")], "it defines something of its own"


@pytest.mark.parametrize("page", sorted(page.name for page in DOCS.glob("*.md") if "```python" in page.read_text()))
def test_scripts_of_the_docs_are_python(page: str) -> None:
    blocks = python_blocks(page)
    assert blocks and all(compile(block, f"{page}, block {k + 1}", "exec").co_code for k, block in enumerate(blocks))


@pytest.mark.parametrize("page", ["start.md", *GUIDES.values()])
def test_the_first_example_of_a_guide_runs_as_it_stands(page: str) -> None:
    """All of it but what a script does when it is started: training functions are run by tests/distributed."""
    space: dict[str, object] = {"__name__": "first_example"}
    exec(compile(python_blocks(page)[0], page, "exec"), space)
    assert space.keys() - {"__name__", "__builtins__"}, "it defines or imports something"


def test_the_labs_script_with_a_fault_runs_as_it_stands(tmp_path: Path) -> None:
    """As a file of its own: each worker of a process lab imports the script."""
    script = tmp_path / "script.py"
    script.write_text(python_blocks("lab.md")[1])
    done = subprocess.run([sys.executable, script], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
    assert done.returncode == 0


def test_the_labs_tests_import_what_they_use() -> None:
    space: dict[str, Any] = {"__name__": "example"}
    exec(compile(python_blocks("lab.md")[2], "lab.md, block 3", "exec"), space)
    tests = [value for name, value in space.items() if name.startswith("test_")]
    assert tests
    for test in tests:
        used = {line.argval for line in dis.get_instructions(test) if line.opname == "LOAD_GLOBAL"}
        assert used <= space.keys() | vars(builtins).keys()
        assert all(hasattr(plugin, fixture) for fixture in inspect.signature(test).parameters)


def test_the_first_sweep_of_the_guide_is_one() -> None:
    (block,) = re.findall(r"^```yaml\n(.*?)^```", (DOCS / "sweeps.md").read_text(), flags=re.M | re.S)
    config = pydantic.TypeAdapter(SweepConfig).validate_python(yaml.safe_load(block))
    assert make_sweep(dataclasses.replace(config, job=None)).config.trials == 12


def test_every_page_has_its_place_in_the_site() -> None:
    def pages(entry: object) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        for item in entry.values() if isinstance(entry, dict) else entry if isinstance(entry, list) else ():
            yield from pages(item)

    text = re.sub(r"!!python/name:\S+", "x", (ROOT / "mkdocs.yml").read_text())
    nav = yaml.safe_load(text)["nav"]
    (guides,) = [entry["Guides"] for entry in nav if "Guides" in entry]
    assert GUIDES.items() <= {title: page for entry in guides for title, page in entry.items()}.items()
    named = set(pages(nav))
    assert named == {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")} | MADE


def test_each_entry_of_the_log_has_a_kind_and_a_verdict_in_a_line() -> None:
    text = (ROOT / "experiments" / "LOG.md").read_text()
    entries = re.findall(r"^- (\d{4}-\d\d-\d\d.*)$", text, flags=re.M)
    with_verdict = [match[0] for match in docs_pages.ENTRY.finditer(text)]
    assert [f"- {entry}" for entry in entries] == with_verdict
    assert max(len(line) for line in with_verdict) <= 150, "a verdict is a line"


def test_the_site_has_each_entry_of_the_log_under_its_day() -> None:
    page = docs_pages.log_page()
    for match in docs_pages.ENTRY.finditer((ROOT / "experiments" / "LOG.md").read_text()):
        day = page[page.index(f"## {match[1]}") :].partition("\n## ")[0]
        assert match[3].replace('"', "'") in day


def test_the_table_of_events_has_every_kind_with_its_fields() -> None:
    def kinds(of: type[events.Event]) -> Iterator[type[events.Event]]:
        for kind in of.__subclasses__():
            yield kind
            yield from kinds(kind)

    text = (DOCS / "api.md").read_text()
    rows = [line.split("|")[1:-1] for line in text.splitlines() if re.match(r"\| `\w+`", line)]
    named = {kind: set(re.findall(r"`(\w+)`", row[-1])) for row in rows for kind in re.findall(r"`(\w+)`", row[0])}
    for event in set(kinds(events.Event)) - {events.Gone}:  # That one is the base of others.
        tag = str(event.__struct_config__.tag)
        assert named[tag] == set(event.__struct_fields__) - {"slot", "uid"}, tag


def defined(package: Path) -> tuple[dict[str, set[str]], dict[str, set[str]]]:
    """What is defined in each class (methods, fields, attributes), and in each module, by its name alone."""
    classes: dict[str, set[str]] = {}
    modules: dict[str, set[str]] = {}
    for path in package.rglob("*.py"):
        tree = ast.parse(path.read_text())
        modules.setdefault(path.stem, set()).update(_names(tree.body))
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                stored = [n for n in ast.walk(node) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)]
                own = [n.attr for n in stored if isinstance(n.value, ast.Name) and n.value.id == "self"]
                classes.setdefault(node.name, set()).update(_names(node.body), own)
    return classes, modules


def _names(body: list[ast.stmt]) -> Iterator[str]:
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        for target in node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]:
            if isinstance(target, ast.Name):
                yield target.id


@pytest.mark.parametrize("page", ["step.md", "protocol.md"])
def test_the_code_has_the_names_that_the_concepts_tell_of(page: str) -> None:
    text = re.sub(r"^```.*?^```", "", (DOCS / page).read_text(), flags=re.M | re.S)
    package = ROOT / "raytrain_het"
    classes, modules = defined(package)
    for owner, name in re.findall(r"`([A-Z]\w+)\.(\w+)`", text):
        assert name in classes.get(owner, ()), f"{owner}.{name}"
    for owner, name in re.findall(r"`([a-z_]+)\.(\w+)`", text):
        assert owner not in modules or name in modules[owner] or name == "py", f"{owner}.{name}"
    for name in re.findall(r"`(?!RAY_)([A-Z_]{4,})`", text):
        assert any(name in names for names in modules.values()), name
    for path in re.findall(r"`([\w/]+/[\w.]*)`", text):
        assert (package / path).exists(), path
