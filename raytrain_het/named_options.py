"""One of several kinds, chosen by its name and set by its options: a schedule, an optimizer, a score policy, a search.

A kind is a frozen dataclass in a file of its own, and a line in a table. Its fields are its options: each is declared
once, with its default and the values that it may have::

    @dataclass(frozen=True, kw_only=True)
    class Exponential(Schedule):
        name = "exponential"

        gamma: float = option(0.95, ABOVE_0_TO_1)

:func:`choose` makes a kind of what a configuration says, ``"exponential"`` or ``{"exponential": {"gamma": 0.9}}``.
Nothing here needs torch or Ray, so a typo is refused at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

from raytrain_het.errors import ConfigError
from raytrain_het.plain import is_number, nearest


@dataclasses.dataclass(frozen=True)
class Allowed:
    """Which values an option may have."""

    words: str
    """For messages, after "allowed is"."""
    holds: Callable[[Any], bool]
    """Whether a value is one of them."""


def whole_number_from(least: int) -> Allowed:
    """Whole numbers, of type int, that are not below ``least``."""

    def holds(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= least

    return Allowed(f"a whole number from {least}", holds)


def one_of(*values: str) -> Allowed:
    """A few texts."""
    *others, last = map(repr, values)
    return Allowed(f"{', '.join(others)} or {last}", lambda value: isinstance(value, str) and value in values)


FINITE = Allowed("a finite number", is_number)
FROM_0 = Allowed("a number from 0", lambda x: is_number(x) and x >= 0)
ABOVE_0 = Allowed("a number above 0", lambda x: is_number(x) and x > 0)
FROM_0_TO_1 = Allowed("a number from 0 to 1", lambda x: is_number(x) and 0 <= x <= 1)
ABOVE_0_TO_1 = Allowed("a number above 0 and at most 1", lambda x: is_number(x) and 0 < x <= 1)
FROM_0_BELOW_1 = Allowed("a number from 0, below 1", lambda x: is_number(x) and 0 <= x < 1)
TRUE_OR_FALSE = Allowed("true or false", lambda x: isinstance(x, bool))


def option(default: Any, allowed: Allowed) -> Any:
    """A field of a kind: an option with its default and the values that it may have."""
    return dataclasses.field(default=default, metadata={Allowed: allowed})


@dataclasses.dataclass(frozen=True, kw_only=True)
class NamedOptions:
    """The base of every kind.

    Raises:
        ConfigError: An option has a value that is not allowed.
    """

    field: ClassVar[str]
    """The key of the configuration that holds a kind, such as ``schedule``."""
    example: ClassVar[str]
    """What that key may hold, for messages: a kind with an option."""
    name: ClassVar[str]
    """The kind's own name, such as ``cosine``."""

    def __post_init__(self) -> None:
        for declared in dataclasses.fields(self):
            allowed = declared.metadata.get(Allowed)
            if allowed is not None:
                self.check(declared.name, allowed.holds(getattr(self, declared.name)), allowed.words)

    def check(self, option: str, ok: bool, allowed: str) -> None:
        """Refuse an option's value.

        Args:
            option: The option's name.
            ok: Whether its value is allowed.
            allowed: What is allowed, in words.

        Raises:
            ConfigError: ``ok`` is false.
        """
        if not ok:
            raise ConfigError(
                f"{self.field} {self.name!r}: {option}={getattr(self, option)!r} is not valid: allowed is {allowed}. "
                f"Write {self.field}={{{self.name!r}: {{{option!r}: ...}}}}, or leave it out."
            )


Kind = TypeVar("Kind", bound=NamedOptions)


def choose(kinds: Mapping[str, type[Kind]], written: str | Mapping[str, Any]) -> Kind:
    """The kind that a configuration asks for.

    Args:
        kinds: The table of all kinds, by name. It has one at least.
        written: A name such as ``"cosine"``, or a name with options such as ``{"cosine": {"floor": 0.01}}``.

    Raises:
        ConfigError: There is no such kind or option, or a value is not allowed.
    """
    name, options = name_and_options(written)
    if name is None or name not in kinds or options is None:
        raise _no_such_kind(kinds, written, name)
    kind = kinds[name]
    for option_name in options:
        if option_name not in option_names(kind):
            raise _no_such_option(kind, written, option_name)
    return kind(**options)


def name_and_options(written: Any) -> tuple[str | None, dict[Any, Any] | None]:
    """Take apart what a configuration says of a kind, without knowing any kind.

    Returns:
        The name, or None where the value is neither a text nor a mapping with a text as its only key; and the options,
        or None where they are no mapping.

    Example:
        >>> name_and_options({"cosine": {"floor": 0.01}})
        ('cosine', {'floor': 0.01})
    """
    if isinstance(written, str):
        return written, {}
    if not isinstance(written, Mapping) or len(written) != 1:
        return None, {}
    ((name, options),) = written.items()
    if options is not None and not isinstance(options, Mapping):
        return (name if isinstance(name, str) else None), None
    return (name if isinstance(name, str) else None), dict(options or {})


def option_names(kind: type[Any]) -> list[str]:
    """The options of a kind, which is a dataclass, in their order."""
    return [declared.name for declared in dataclasses.fields(kind)]


def _no_such_kind(kinds: Mapping[str, type[NamedOptions]], written: Any, name: str | None) -> ConfigError:
    first, kind = next(iter(kinds.items()))
    near = (nearest(name, kinds) if name is not None else None) or first
    several = ": these are several" if isinstance(written, Mapping) and len(written) > 1 else ""
    return ConfigError(
        f"{kind.field}={written!r} is not valid{several}: allowed is {', '.join(kinds)}, or one of them with options. "
        f"Write {kind.field}={near!r}, or {kind.field}={kind.example}."
    )


def _no_such_option(kind: type[NamedOptions], written: Any, option_name: Any) -> ConfigError:
    known = option_names(kind)
    fix = f"it has none. Write {kind.field}={kind.name!r}."
    if known:
        near = nearest(option_name, known) or known[0]
        fix = f"allowed is {', '.join(known)}. Write {near!r}, or leave it out."
    return ConfigError(f"{kind.field}={written!r} is not valid: {kind.name!r} has no option {option_name!r}; {fix}")
