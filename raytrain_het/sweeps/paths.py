"""Settings by their paths: which a job has, and a job's data with some of them set.

A path is what ``--set`` takes, such as ``lr``, ``het.alpha`` or ``het.compression.topk.density``. Those of ``het`` can
be written without it where the job has no field of that name: ``alpha``, ``compression.topk.density``.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

from raytrain_het.codec_options import AUTO, OPTIONS, parsed
from raytrain_het.config import HetConfig
from raytrain_het.errors import ConfigError
from raytrain_het.jobs.config import JobConfig
from raytrain_het.jobs.validation import yaml_text
from raytrain_het.named_options import name_and_options, option_names
from raytrain_het.optim import OPTIMIZERS, SCHEDULES
from raytrain_het.plain import nearest

_NOT_SWEPT = ("kind", "name", "storage", "het", "workers")
_WORKERS = re.compile(r"workers\.\d+\.(count|resources\.\w+)")

NAMED: dict[str, dict[str, list[str]]] = {
    "het.compression": {name: list(options) for name, options in {**OPTIONS, "auto": AUTO}.items()},
    "het.schedule": {name: option_names(kind) for name, kind in SCHEDULES.items()},
    "optimizer": {name: option_names(kind) for name, kind in OPTIMIZERS.items()},
}
"""Fields that are one of several kinds, with the options of each: ``schedule.cosine.floor``."""


def known_paths(cls: type[JobConfig]) -> dict[str, str]:
    """Every path that can be written for a kind of job, with the whole one."""
    own = [field.name for field in dataclasses.fields(cls) if field.name not in _NOT_SWEPT]
    of_het = [field.name for field in dataclasses.fields(HetConfig)]
    whole = [*own, *(f"het.{name}" for name in of_het), "het.clip.norm", "het.clip.value"]
    for field, kinds in NAMED.items():
        if field in whole:
            whole += [f"{field}.{kind}.{option}" for kind, options in kinds.items() for option in options]
    short = {path.removeprefix("het."): path for path in whole if path.removeprefix("het.").split(".")[0] not in own}
    return short | {path: path for path in whole}


def whole_path(cls: type[JobConfig], path: str) -> str:
    """The path with ``het.`` before it, where that was left out.

    Raises:
        ConfigError: the job has no such setting; the message has the nearest right one.
    """
    known = known_paths(cls)
    if path in known:
        return known[path]
    if _WORKERS.fullmatch(path):
        return path
    near = nearest(path, known)
    hint = f"did you mean {near!r}?" if near else "raytrain-het train --keys lists them all."
    raise ConfigError(f"there is no such setting; {hint}")


def kind_of(path: str) -> tuple[str, str] | None:
    """``("het.compression", "topk")`` of ``het.compression.topk.density``; None for what is no option of a kind."""
    for field in NAMED:
        if path.startswith(f"{field}."):
            return field, path.removeprefix(f"{field}.").split(".")[0]
    return None


def with_settings(given: Mapping[str, Any], settings: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A job's data with settings in it, and the paths of those that count for nothing.

    Args:
        given: as a job file has it.
        settings: by whole path.

    An option of one kind (``schedule.cosine.floor``) makes it that kind; unless the settings choose the kind
    (``schedule``) and have chosen another one: then the option counts for nothing.

    Raises:
        ConfigError: a path leads through what is no mapping.
    """
    data, idle = copy.deepcopy(dict(given)), list[str]()
    for path in sorted(settings, key=lambda path: path.count(".")):
        value, kind = settings[path], kind_of(path)
        if path.startswith("het.clip.") and settings.get("het.clip", value) is None:
            idle.append(path)
            continue
        if kind is None:
            # By its name alone, a kind keeps the options that the job gives it.
            if path not in NAMED or value is None or _kind_and_options(_get(data, path.split(".")))[0] != value:
                _put(data, path.split("."), value)
            continue
        field, name = kind
        now, options = _kind_and_options(_get(data, field.split(".")))
        if now != name and field in settings:
            idle.append(path)
            continue
        option = path.removeprefix(f"{field}.{name}.")
        _put(data, field.split("."), {name: {**(options if now == name else {}), option: value}})
    return data, idle


def conflicting(paths: Iterable[str]) -> tuple[str, list[str]] | None:
    """A field of which options of several kinds are set, and nothing that chooses between them."""
    paths, kinds = set(paths), dict[str, set[str]]()
    for path in paths:
        kind = kind_of(path)
        if kind is not None:
            kinds.setdefault(kind[0], set()).add(kind[1])
    return next(((f, sorted(names)) for f, names in kinds.items() if len(names) > 1 and f not in paths), None)


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings by path, each a number, a text, a flag or nothing; what is a list or a kind with options is a
    text, as a job file has it."""
    found: dict[str, Any] = {}
    for key, inner in value.items():
        path = f"{prefix}{key}"
        if isinstance(inner, Mapping) and path not in NAMED and path != "het.clip":
            found |= flat(inner, f"{path}.")
        else:
            found[path] = inner if inner is None or isinstance(inner, bool | int | float | str) else yaml_text(inner)
    return found


def _kind_and_options(value: Any) -> tuple[str | None, dict[str, Any]]:
    if isinstance(value, str):
        return parsed(value)
    name, options = name_and_options(value)
    return name, options or {}


def _get(data: Any, parts: list[str]) -> Any:
    for part in parts:
        data = data.get(part) if isinstance(data, Mapping) else None
    return data


def _put(data: Any, parts: list[str], value: Any) -> None:
    *way, last = parts
    for k, part in enumerate(way):
        if isinstance(data, list) and part.isdigit() and int(part) < len(data):
            data = data[int(part)]
            continue
        if not isinstance(data, dict):
            raise ConfigError(f"{'.'.join(parts[:k])} is {yaml_text(data)}: it has no {part!r} below it.")
        inner = data.get(part)
        if inner is None:
            inner = data[part] = {}
        data = inner
    if not isinstance(data, dict):
        raise ConfigError(f"{'.'.join(way)} is {yaml_text(data)}: it has no {last!r} below it.")
    data[last] = value
