"""What can be written for ``compression``: the table of codecs, the options of each, and how a record names one.

Settings are checked before torch is loaded, so nothing here imports torch. An entry of the table names the class that
encodes as text, and :func:`raytrain_het.allreduce.codecs.codec_of` imports it. A new codec is one file in
``raytrain_het/allreduce/codecs/`` and one line in :data:`CODECS`; its options, if it has any, are declared here once:
the same object is checked, shown, swept over, and given to the codec.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from raytrain_het.errors import ConfigError
from raytrain_het.named_options import FROM_0_TO_1, TRUE_OR_FALSE, Allowed, option, whole_number_from
from raytrain_het.plain import is_number, nearest

# ---------------------------------------------------------------- options


@dataclass(frozen=True, kw_only=True)
class CodecOptions:
    """The options of one codec. This base class has none."""

    @property
    def used_together(self) -> bool:
        """Whether all workers must use the codec if one does."""
        return False


@dataclass(frozen=True, kw_only=True)
class BlockwiseOptions(CodecOptions):
    """Options of ``int8`` and ``int4``."""

    error_feedback: bool = option(False, TRUE_OR_FALSE)
    """Not needed for convergence. It lessens the noise, and takes one fp32 number of memory an element."""


@dataclass(frozen=True, kw_only=True)
class SparseOptions(CodecOptions):
    """Options of codecs that keep a part of the elements."""

    density: float = option(
        0.01, Allowed("a number from 1e-6 to 1: the kept fraction", lambda x: is_number(x) and 1e-6 <= x <= 1)
    )
    """The kept fraction."""

    warmup_epochs: int = option(
        0,
        Allowed(
            "a whole number from 0 to 1000: the epochs in which the density falls from 0.25",
            lambda x: whole_number_from(0).holds(x) and x <= 1000,
        ),
    )
    """The epochs in which more is kept, see :func:`raytrain_het.allreduce.codecs.warmup.warm_densities`."""


@dataclass(frozen=True, kw_only=True)
class TopKOptions(SparseOptions):
    """Options of ``topk``."""

    all_gather: bool = option(False, TRUE_OR_FALSE)
    """Whether every worker's payload goes to all workers, who all add them up."""

    @property
    def used_together(self) -> bool:
        return self.all_gather


@dataclass(frozen=True, kw_only=True)
class LowRankOptions(CodecOptions):
    """Options of ``lowrank``."""

    rank: int = option(
        4, Allowed("a whole number from 1 to 1024", lambda x: whole_number_from(1).holds(x) and x <= 1024)
    )
    """Rows of each of the two factors of a matrix."""

    @property
    def used_together(self) -> bool:
        return True


@dataclass(frozen=True, kw_only=True)
class AutoOptions(CodecOptions):
    """Options of ``auto``, which is no codec: it chooses one for each worker."""

    error: float = option(0.2, Allowed("a number from 0 to 1: |x - decoded(x)| / |x|", FROM_0_TO_1.holds))
    """The most that a codec may lose of a message."""


# ---------------------------------------------------------------- the table


@dataclass(frozen=True)
class CodecEntry:
    """A codec in the table."""

    implementation: str
    """``module:Class``. The class takes its options as its only argument."""
    options: type[CodecOptions] = CodecOptions


_FOLDER = "raytrain_het.allreduce.codecs"

CODECS: dict[str, CodecEntry] = {
    "none": CodecEntry(f"{_FOLDER}.dense:NoCodec"),
    "bf16": CodecEntry(f"{_FOLDER}.dense:Bf16"),
    "fp16": CodecEntry(f"{_FOLDER}.fp16:Fp16"),
    "int8": CodecEntry(f"{_FOLDER}.blockwise:Int8", BlockwiseOptions),
    "int4": CodecEntry(f"{_FOLDER}.blockwise:Int4", BlockwiseOptions),
    "sign": CodecEntry(f"{_FOLDER}.sign:Sign"),
    "topk": CodecEntry(f"{_FOLDER}.topk:TopK", TopKOptions),
    "randomk": CodecEntry(f"{_FOLDER}.randomk:RandomK", SparseOptions),
    "lowrank": CodecEntry(f"{_FOLDER}.lowrank:LowRank", LowRankOptions),
}
"""All codecs, by the name that is written."""

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
"""What ``auto`` chooses from. The one that loses nothing comes first; codecs that need other hyperparameters are not
among them."""

# ---------------------------------------------------------------- words


def options_by_name(*, auto: bool = False) -> dict[str, type[CodecOptions]]:
    """The options class of each codec, and of ``auto`` if that is asked for."""
    found = {name: entry.options for name, entry in CODECS.items()}
    return {**found, "auto": AutoOptions} if auto else found


def one_word(value: str | Mapping[str, Any], *, auto: bool = False) -> str:
    """``int8``, or ``topk(density=0.002)``: the codec with those of its options that are not the default.

    Args:
        value: a codec's name, ``{name: {option: value}}``, or what this function has returned.
        auto: whether ``auto`` is allowed, too.

    Raises:
        ConfigError: there is no such codec or option, or a value is not allowed.

    Example:
        >>> one_word({"topk": {"density": 0.002}})
        'topk(density=0.002)'
    """
    name, options = parsed(value)
    choices = options_by_name(auto=auto)
    if name not in choices:
        near = nearest(name, choices)
        raise ConfigError(
            f"compression={value!r} is not valid: allowed is {', '.join(choices)}, or one of them with options. Write "
            f"compression={near or 'int8'!r}, or compression={{'topk': {{'density': 0.01}}}}."
        )
    known: dict[str, dataclasses.Field[Any]] = {field.name: field for field in dataclasses.fields(choices[name])}
    defaults: dict[str, Any] = {key: field.default for key, field in known.items()}
    for key, chosen in options.items():
        if key not in known:
            right = {name: defaults} if known else name
            raise ConfigError(
                f"compression={value!r} is not valid: {name!r} has no option {key!r}; allowed is "
                f"{' and '.join(known) or 'none'}. Write compression={right!r}."
            )
        allowed: Allowed = known[key].metadata[Allowed]
        if not allowed.holds(chosen):
            raise ConfigError(
                f"compression={value!r} is not valid: allowed for {key!r} is {allowed.words}. "
                f"The default is {defaults[key]!r}."
            )
    said = [
        f"{key}={json.dumps(type(default)(options[key]))}"
        for key, default in defaults.items()
        if key in options and options[key] != default
    ]
    return f"{name}({', '.join(said)})" if said else name


def parsed(value: str | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The name of a codec, and the options that are written.

    Args:
        value: a codec's name, ``{name: {option: value}}``, or what :func:`one_word` has returned.

    Raises:
        ConfigError: it is none of these.
    """
    if isinstance(value, str):
        word = re.fullmatch(r"(\w+)\((.*)\)", value)
        try:
            pairs = [pair.split("=") for pair in word[2].split(", ")] if word else []
            return (word[1] if word else value), {key: json.loads(chosen) for key, chosen in pairs}
        except ValueError:
            return value, {}
    if isinstance(value, Mapping) and len(value) == 1:
        ((name, options),) = value.items()
        named = options is None or (isinstance(options, Mapping) and all(isinstance(key, str) for key in options))
        if isinstance(name, str) and named:
            return name, dict(options or {})
    raise ConfigError(
        f"compression={value!r} is not valid: allowed is the name of one codec ({', '.join(CODECS)}), or one "
        "with its options. Write compression={'topk': {'density': 0.01}}."
    )


def options_of(word: str) -> CodecOptions:
    """The options that a word says, those left out at their defaults.

    Args:
        word: what :func:`one_word` has returned.
    """
    name, options = parsed(word)
    return options_by_name(auto=True)[name](**options)


def used_together(word: str) -> bool:
    """Whether all workers must use this codec if one does. False for a name that is not in the table: a choice by cost
    is among names of any kind."""
    name, _ = parsed(word)
    return name in CODECS and options_of(word).used_together
