"""What can be written for ``compression``: the codecs' names and options, and how a record says them in one word."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from raytrain_het.errors import ConfigError
from raytrain_het.plain import is_number, nearest


@dataclass(frozen=True)
class Option:
    """One option of a codec."""

    default: Any
    allowed: str
    fits: Callable[[Any], bool]


def _is_density(value: Any) -> bool:
    return is_number(value) and 1e-6 <= value <= 1


def _is_number_of_epochs(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 1000


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 1024


_DENSITY = Option(0.01, "a number from 1e-6 to 1: the kept fraction", _is_density)
_WARMUP = Option(
    0, "a whole number from 0 to 1000: the epochs in which the density falls from 0.25", _is_number_of_epochs
)
_SWITCH = Option(False, "true or false", lambda value: isinstance(value, bool))

OPTIONS: dict[str, dict[str, Option]] = {
    "none": {},
    "bf16": {},
    "fp16": {},
    "int8": {"error_feedback": _SWITCH},
    "int4": {"error_feedback": _SWITCH},
    "sign": {},
    "topk": {"density": _DENSITY, "warmup_epochs": _WARMUP, "all_gather": _SWITCH},
    "randomk": {"density": _DENSITY, "warmup_epochs": _WARMUP},
    "lowrank": {"rank": Option(4, "a whole number from 1 to 1024", _is_rank)},
}
"""By codec: its options."""
TOGETHER = frozenset({"lowrank"})
"""Codecs of which all workers add up the parts: used by all of them or by none, as is what they all gather."""

_ERROR = Option(0.2, "a number from 0 to 1: |x - decoded(x)| / |x|", lambda value: is_number(value) and 0 <= value <= 1)
AUTO: dict[str, Option] = {"error": _ERROR}
"""Options of ``auto``, which is no codec: it chooses one for each worker."""
AUTO_CODECS = (
    "none",
    "bf16",
    "int8(error_feedback=true)",
    "int4(error_feedback=true)",
    "lowrank(rank=16)",
    "lowrank",
    "topk(density=0.1)",
    "topk(density=0.03)",
    "topk",
)
"""What ``auto`` chooses from: what loses nothing first. Those that need other hyperparameters are not among them."""


def one_word(value: str | Mapping[str, Any], *, auto: bool = False) -> str:
    """``int8``, or ``topk(density=0.01)``: the codec with those of its options that are not the default.

    Args:
        value: a codec's name, ``{name: {option: value}}``, or what this function has returned.
        auto: whether it may be ``auto``, too.

    Raises:
        ConfigError: no such codec or option, or a value that is not allowed.
    """
    name, options = _taken_apart(value)
    choices = {**OPTIONS, "auto": AUTO} if auto else OPTIONS
    if name not in choices:
        near = nearest(name, choices)
        raise ConfigError(
            f"compression={value!r} is not valid: allowed is {', '.join(choices)}, or one of them with options. Write "
            f"compression={near or 'int8'!r}, or compression={{'topk': {{'density': 0.01}}}}."
        )
    known = choices[name]
    for option, chosen in options.items():
        if option not in known:
            right = {name: {k: o.default for k, o in known.items()}} if known else name
            raise ConfigError(
                f"compression={value!r} is not valid: {name!r} has no option {option!r}; allowed is "
                f"{' and '.join(known) or 'none'}. Write compression={right!r}."
            )
        if not known[option].fits(chosen):
            raise ConfigError(
                f"compression={value!r} is not valid: allowed for {option!r} is {known[option].allowed}. "
                f"The default is {known[option].default!r}."
            )
    said = [
        f"{k}={json.dumps(type(option.default)(options[k]))}"
        for k, option in known.items()
        if k in options and options[k] != option.default
    ]
    return f"{name}({', '.join(said)})" if said else name


def used_together(word: str) -> bool:
    """Whether all workers have to use it, if one does."""
    name, options = parsed(word)
    return name in TOGETHER or bool(options.get("all_gather"))


def parsed(word: str) -> tuple[str, dict[str, Any]]:
    """The inverse: name and options of a codec, defaults left out."""
    return _taken_apart(word)


def _taken_apart(value: Any) -> tuple[str, dict[str, Any]]:
    if isinstance(value, str):
        word = re.fullmatch(r"(\w+)\((.*)\)", value)
        try:
            pairs = [pair.split("=") for pair in word[2].split(", ")] if word else []
            return (word[1] if word else value), {option: json.loads(chosen) for option, chosen in pairs}
        except ValueError:
            return value, {}
    if isinstance(value, Mapping) and len(value) == 1:
        ((name, options),) = value.items()
        named = options is None or (isinstance(options, Mapping) and all(isinstance(key, str) for key in options))
        if isinstance(name, str) and named:
            return name, dict(options or {})
    raise ConfigError(
        f"compression={value!r} is not valid: allowed is the name of one codec ({', '.join(OPTIONS)}), or one "
        "with its options. Write compression={'topk': {'density': 0.01}}."
    )
