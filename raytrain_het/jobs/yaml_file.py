"""Reading a job file, and the `--set` overrides on top of it: text -> plain dicts and lists."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from raytrain_het.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a repeated key, and reads 1e-3 as a number."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: dict[Any, int] = {}
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        line = key_node.start_mark.line + 1
        if not isinstance(key, str):
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {key!r} is not a text; write '{key}' in quotes", key_node.start_mark
            )
        if key in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {key!r} is there twice (first on line {seen[key]})", key_node.start_mark
            )
        seen[key] = line
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_yaml(path: str | Path, *, what: str = "job", example: str = "kind: digits") -> dict[str, Any]:
    """The mapping in a YAML file.

    Args:
        path: The file.
        what: What the file is, for messages.
        example: What it may hold, for messages.

    Raises:
        ConfigError: The file is missing or unreadable, is not YAML (the message has the line), or
            holds something else than a mapping.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        digits = "the digits are in experiments/jobs/digits.yaml, and what `raytrain-het train` trains without a file"
        raise ConfigError(
            f"{what} file {str(path)!r} does not exist. Name a YAML file{'; ' + digits if what == 'job' else ''}"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{what} file {str(path)!r} cannot be read: {error}. Name a YAML text file.") from None
    try:
        data = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{_place(path, error)}: not valid YAML: {_problem(error)}.") from None
    if not isinstance(data, dict):
        received = "nothing" if data is None else f"a {type(data).__name__}"
        raise ConfigError(
            f"{path}: a {what} is a mapping of keys to values, the file holds {received}. Write {example}"
        )
    return data


def apply_overrides(data: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A copy of ``data`` with overrides such as ``het.shares=[7, 1]`` or ``workers.0.count=3``.

    The value is read as YAML; numbers in the key are positions in a list.

    Raises:
        ConfigError: An override has no ``=``, its value is not YAML, or its path leads through
            something that is not a mapping or a list.
    """
    data = copy.deepcopy(data)
    for override in overrides:
        key, equals, text = override.partition("=")
        key = key.strip()
        if not equals or not key:
            raise ConfigError(f"--set {override}: allowed is KEY=VALUE. Write for example --set {key or 'epochs'}=3")
        try:
            value = yaml.load(text, Loader=_Loader)
        except yaml.YAMLError as error:
            raise ConfigError(
                f"--set {override}: the value {text!r} is not valid YAML: {_problem(error)}. "
                "Quote lists for the shell: --set het.shares='[3, 1]'"
            ) from None
        _assign(data, key.split("."), value, override)
    return data


def _assign(data: Any, parts: list[str], value: Any, override: str) -> None:
    at = data
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        where = ".".join(parts[:depth])
        if isinstance(at, list):
            if not part.isdigit() or int(part) >= len(at):
                first = ".".join([*parts[:depth], "0", *parts[depth + 1 :]])
                raise ConfigError(
                    f"--set {override}: {where} is a list of {len(at)}; {part!r} is not a position in it. "
                    f"Allowed is 0 to {len(at) - 1}: write --set {first}=..."
                )
            if last:
                at[int(part)] = value
            else:
                at = at[int(part)]
        elif isinstance(at, dict):
            if last:
                at[part] = value
            else:
                if at.get(part) is None:
                    at[part] = {}
                at = at[part]
        else:
            raise ConfigError(
                f"--set {override}: {where} is {at!r}, it has no keys below it. Write --set {where}=VALUE"
            )


def _place(path: Path, error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return f"{path}, line {mark.line + 1}" if mark else str(path)


def _problem(error: yaml.YAMLError) -> str:
    context, problem = getattr(error, "context", None), getattr(error, "problem", None)
    return ", ".join(part for part in (context, problem) if part) or str(error)
