"""``raytrain-het train --keys``: every key of a job, its default and its meaning, from the dataclasses."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any

from raytrain_het.config import HetConfig
from raytrain_het.jobs.config import JobConfig, Workers
from raytrain_het.jobs.lines import COLUMNS, wrapped
from raytrain_het.jobs.validation import yaml_text

_BELOW: dict[str, tuple[str, type]] = {"workers": ("workers.0", Workers), "het": ("het", HetConfig)}


def key_lines(cls: type[JobConfig]) -> Iterator[str]:
    """Lines for people: ``key = default``, and below it the key's meaning."""
    for key, default, meaning in key_rows(cls):
        yield from wrapped(f"{key} = {default}", COLUMNS)
        yield from textwrap.wrap(
            meaning, COLUMNS, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False
        )


def key_rows(cls: type[JobConfig]) -> Iterator[tuple[str, str, str]]:
    """(key, default, meaning) of every key, those below ``workers`` and ``het`` included."""
    yield from _rows(cls, "")


def _rows(cls: Any, prefix: str) -> Iterator[tuple[str, str, str]]:
    meanings = _meanings(cls)
    for field in dataclasses.fields(cls):
        below = _BELOW.get(field.name) if not prefix else None
        if field.name != "het":
            value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            yield f"{prefix}{field.name}", _default(value), " ".join(meanings.get(field.name, "").split())
        if below is not None:
            yield from _rows(below[1], f"{below[0]}.")


def _default(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
        return yaml_text([dataclasses.asdict(item) for item in value])
    return yaml_text(value)


def _meanings(cls: type) -> dict[str, str]:
    """The texts below the fields of a class and of those it inherits from."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        (node,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(node, ast.ClassDef)
        for field, text in zip(node.body, node.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
            ):
                found[field.target.id] = (
                    inspect.cleandoc(str(text.value.value)).replace("``", "").replace("None", "null")
                )
    return found
