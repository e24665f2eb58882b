"""Settings by their paths: which paths a job has, and a job's data with some of its settings replaced.

A path is what ``--set`` takes, such as ``lr``, ``het.alpha`` or ``het.compression.topk.density``. The prefix ``het.``
can be left out if the job has no field of that name: ``alpha``, ``compression.topk.density``.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

from raytrain_het.codec_options import options_by_name, parsed
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
    "het.compression": {name: option_names(kind) for name, kind in options_by_name(auto=True).items()},
    "het.schedule": {name: option_names(kind) for name, kind in SCHEDULES.items()},
    "optimizer": {name: option_names(kind) for name, kind in OPTIMIZERS.items()},
}
"""Fields that choose one of several kinds, and the options of each kind: ``schedule.cosine.floor``."""


def known_paths(cls: type[JobConfig]) -> dict[str, str]:
    """Every path that can be written for a job, with the whole path that it stands for."""
    own = [field.name for field in dataclasses.fields(cls) if field.name not in _NOT_SWEPT]
    of_het = [field.name for field in dataclasses.fields(HetConfig)]
    whole = [*own, *(f"het.{name}" for name in of_het), "het.clip.norm", "het.clip.value"]
    for field, kinds in NAMED.items():
        if field in whole:
            whole += [f"{field}.{kind}.{option}" for kind, options in kinds.items() for option in options]
    short = {path.removeprefix("het."): path for path in whole if path.removeprefix("het.").split(".")[0] not in own}
    return short | {path: path for path in whole}


def whole_path(cls: type[JobConfig], path: str) -> str:
    """The whole path, also if ``het.`` was left out.

    Raises:
        ConfigError: The job has no such setting; the message has the nearest right one.
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
    """``("het.compression", "topk")`` of ``het.compression.topk.density``; None if the path is not an option of a
    kind."""
    for field in NAMED:
        if path.startswith(f"{field}."):
            return field, path.removeprefix(f"{field}.").split(".")[0]
    return None


def with_settings(given: Mapping[str, Any], settings: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A job's data with some settings replaced, and the paths of settings that have no effect.

    An option of a kind, such as ``schedule.cosine.floor``, also chooses that kind. If the settings choose another kind,
    such as ``schedule: step``, the option has no effect.

    Args:
        given: The data of a job file.
        settings: By whole path.

    Raises:
        ConfigError: A path leads through something that is not a mapping.
    """
    data, idle = copy.deepcopy(dict(given)), list[str]()
    for path in sorted(settings, key=lambda path: path.count(".")):
        value, kind = settings[path], kind_of(path)
        if path.startswith("het.clip.") and settings.get("het.clip", value) is None:
            idle.append(path)
            continue
        if kind is None:
            # A kind that is only named keeps the options that the job file gives it.
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
    """A field with options of several kinds among the paths, and no path that chooses between them; and those kinds."""
    paths, kinds = set(paths), dict[str, set[str]]()
    for path in paths:
        kind = kind_of(path)
        if kind is not None:
            kinds.setdefault(kind[0], set()).add(kind[1])
    return next(((f, sorted(names)) for f, names in kinds.items() if len(names) > 1 and f not in paths), None)


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings by path. A number, a text, a bool or None stays; a list, or a kind with options, becomes a text
    as in a job file."""
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
