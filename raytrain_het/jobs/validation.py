"""From plain dicts to frozen dataclasses. An error names every mistake by its path.

pydantic checks types and ranges. Unknown keys are found here: the message has the nearest right key, and pydantic
would ignore unknown keys of a stdlib dataclass.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar, Union

import pydantic

from raytrain_het.errors import ConfigError
from raytrain_het.plain import nearest

T = TypeVar("T")
Where = tuple[str | int, ...]

RUN_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
_PATTERNS = {RUN_NAME: "letters, digits, . _ -, no slash, a letter or digit first"}


def build(cls: type[T], data: dict[str, Any], *, source: Callable[[str], str] = str) -> T:
    """Make a ``cls`` of ``data``, and check all of it.

    Args:
        cls: A dataclass, possibly of dataclasses.
        data: As read from YAML.
        source: Says where a dotted path was written, for the messages.

    Raises:
        ConfigError: One line per mistake: where, the value received, what is allowed, and the fix.
    """
    problems = [(path, text) for path, text in _structure(cls, data, ())]
    if not problems:
        try:
            kind: Any = cls
            found: T = _adapter(kind).validate_python(data)
            return found
        except pydantic.ValidationError as error:
            problems = [_explain(cls, details) for details in error.errors(include_url=False)]
            # A list whose item is wrong is also "too short" to pydantic: the deeper mistake is the one.
            paths = [path for path, _ in problems]
            problems = [p for p in problems if not any(len(o) > len(p[0]) and o[: len(p[0])] == p[0] for o in paths)]
    # One line for each place: of the branches of a union, the first.
    lines = {path: f"{source(dotted(path))}{text}" for path, text in reversed(problems)}
    lines = {path: lines[path] for path, _ in problems}
    raise ConfigError("\n".join(dict.fromkeys(lines.values())))


@functools.cache
def _adapter(cls: Any) -> pydantic.TypeAdapter[Any]:
    """pydantic's adapter of a class, made once: a sweep checks thousands of jobs."""
    return pydantic.TypeAdapter(cls)


def yaml_text(value: Any) -> str:
    """A value as a job file writes it: null, true, lists."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(yaml_text, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {yaml_text(v)}" for k, v in value.items()) + "}"
    return repr(value)


def plural(count: int, noun: str) -> str:
    """``1 number``, ``2 numbers``."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def dotted(path: Where) -> str:
    """``("workers", 0, "count")`` as ``workers.0.count``."""
    return ".".join(str(part) for part in path)


def _structure(kind: Any, value: Any, path: Where) -> Iterator[tuple[Where, str]]:
    """Unknown keys, and true/false where a number belongs (pydantic would read them as 1 and 0)."""
    cls, item = _dataclass_in(kind), _item_in(kind)
    if cls is not None and isinstance(value, dict):
        hints = _fields(cls)
        for key, inner in value.items():
            if key in hints:
                yield from _structure(hints[key], inner, (*path, key))
            else:
                yield (*path, key), _unknown(path, key, inner, list(hints))
    elif item is not None and isinstance(value, list):
        for i, inner in enumerate(value):
            yield from _structure(item, inner, (*path, i))
    elif isinstance(value, bool) and not _allows_bool(kind):
        yield path, f"={yaml_text(value)} is not valid: allowed is {_allowed(kind)}."


def _unknown(path: Where, key: object, value: object, known: list[str]) -> str:
    near = nearest(key, known)
    hint = "remove it"
    if near:
        on_command_line = f"--set {dotted((*path, near))}={yaml_text(value)}"
        hint = f"did you mean {near!r}? Write {on_command_line}, in a file {near}: {yaml_text(value)}"
    return f"={yaml_text(value)}: there is no such key; {hint}. Allowed: {', '.join(known)}."


def _explain(cls: type, details: Any) -> tuple[Where, str]:
    path, kind, field = _walk(cls, details["loc"])
    if details["type"] == "missing":
        return path, f" is missing: allowed is {_allowed(kind)}. Write {dotted(path)}: VALUE"
    cause = (details.get("ctx") or {}).get("error")
    if isinstance(cause, ValueError):
        # A dataclass's own check has raised this. The message is complete, and begins with its field.
        message = _in_yaml_words(str(cause))
        name, equals, rest = message.partition("=")
        if equals and name.partition(".")[0] in _fields(_dataclass_in(kind) or cls):
            return (*path, *name.split(".")), f"={rest}"
        return path, f"{': ' if path else ''}{message}"
    received, default = details["input"], None if field is None else field.default
    text = f"={yaml_text(received)} is not valid: allowed is "
    if isinstance(received, str) and _item_in(kind) is not None:
        items = ", ".join(part.strip() for part in received.split(",") if part.strip())
        return path, f"{text}{_allowed(kind)}. Write --set {dotted(path)}='[{items}]'"
    text += f"{_range(details) or _allowed(kind)}."
    if isinstance(default, (bool, int, float, str)):
        plain = default if isinstance(default, str) else yaml_text(default)
        text += f" The default is {plain}: write --set {dotted(path)}={plain}"
    return path, text


def _in_yaml_words(text: str) -> str:
    """A message with Python's values, in YAML's spelling."""
    for python, yaml in ((r"\bNone\b", "null"), (r"\bTrue\b", "true"), (r"\bFalse\b", "false")):
        text = re.sub(python, yaml, text)
    return re.sub(r"=\(([^()]*?),?\)", r"=[\1]", text)


def _range(details: Any) -> str | None:
    """What a constraint allows, in words; None if the type is wrong."""
    ctx = details.get("ctx") or {}
    words = {
        "greater_than": "a number above {gt}",
        "greater_than_equal": "a number from {ge}",
        "less_than": "a number below {lt}",
        "less_than_equal": "a number up to {le}",
        "too_short": "{min_length} or more",
        "string_too_short": "a text of {min_length} character or more",
        "string_pattern_mismatch": "what matches {pattern}",
        "literal_error": "{expected}",
    }
    form = words.get(details["type"])
    if ctx.get("pattern") in _PATTERNS:
        return _PATTERNS[ctx["pattern"]]
    return form.format(**ctx) if form else None


def _walk(cls: Any, loc: tuple[Any, ...]) -> tuple[Where, Any, dataclasses.Field[Any] | None]:
    """The path that a user would write for pydantic's location, which also has the names of unions' branches."""
    path: list[str | int] = []
    kind: Any = cls
    field = None
    for part in loc:
        inner, item = _dataclass_in(kind), _item_in(kind)
        if inner is not None and part in (hints := _fields(inner)):
            field = next(f for f in dataclasses.fields(inner) if f.name == part)
            kind = hints[part]
        elif isinstance(part, int) and item is not None:
            field, kind = None, item
        elif typing.get_origin(_bare(kind)) in (dict, Mapping):
            field, kind = None, typing.get_args(_bare(kind))[1]
        else:
            continue  # the name of a union's branch
        path.append(part)
    return tuple(path), kind, field


@functools.cache
def _fields(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls, include_extras=True)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.init}


def _bare(kind: Any) -> Any:
    return typing.get_args(kind)[0] if typing.get_origin(kind) is typing.Annotated else kind


def _branches(kind: Any) -> list[Any]:
    kind = _bare(kind)
    if typing.get_origin(kind) in (Union, types.UnionType):
        return [b for arg in typing.get_args(kind) for b in _branches(arg)]
    return [kind]


def _dataclass_in(kind: Any) -> Any:
    return next((b for b in _branches(kind) if dataclasses.is_dataclass(b)), None)


def _item_in(kind: Any) -> Any:
    for branch in _branches(kind):
        if typing.get_origin(branch) in (tuple, list):
            return typing.get_args(branch)[0]
    return None


def _allows_bool(kind: Any) -> bool:
    return any(b in (bool, Any) for b in _branches(kind))


def _allowed(kind: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "a text", type(None): "null", bool: "true or false"}
    out = []
    for branch in _branches(kind):
        if typing.get_origin(branch) is typing.Literal:
            out += [repr(a) for a in typing.get_args(branch)]
        elif branch in names:
            out.append(names[branch])
        else:
            out.append("a list" if _item_in(branch) is not None else "a mapping")
    return " or ".join(out)
