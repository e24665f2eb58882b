"""One of several kinds by its name, with options: how job files and sweeps write schedules and optimizers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

from raytrain_het.errors import ConfigError
from raytrain_het.plain import nearest


@dataclasses.dataclass(frozen=True, kw_only=True)
class Named:
    """A kind: its fields are its options."""

    field: ClassVar[str]
    """Of the configuration, in messages."""
    name: ClassVar[str]

    def check(self, option: str, ok: bool, allowed: str) -> None:
        """Raises:
        ConfigError: not ``ok``.
        """
        if not ok:
            raise ConfigError(
                f"{self.field} {self.name!r}: {option}={getattr(self, option)!r} is not valid: allowed is {allowed}. "
                f"Write {self.field}={{{self.name!r}: {{{option!r}: ...}}}}, or leave it out."
            )


N = TypeVar("N", bound=Named)


def pick(kinds: Mapping[str, type[N]], value: str | Mapping[str, Any], *, field: str, example: str) -> N:
    """``"cosine"``, or ``{"cosine": {"floor": 0.01}}``.

    Args:
        kinds: by name.
        value: what was written.
        field: where.
        example: one with options, for messages.

    Raises:
        ConfigError: no such kind or option, or a value that is not allowed.
    """
    name: Any = None
    options: Any = {}
    if isinstance(value, str):
        name = value
    elif isinstance(value, Mapping) and len(value) == 1:
        ((name, options),) = value.items()
        options = {} if options is None else options
    if not isinstance(name, str) or name not in kinds or not isinstance(options, Mapping):
        near = nearest(name, kinds)
        several = ": these are several" if isinstance(value, Mapping) and len(value) > 1 else ""
        raise ConfigError(
            f"{field}={value!r} is not valid{several}: allowed is {', '.join(kinds)}, or one of them with options. "
            f"Write {field}={near or list(kinds)[0]!r}, or {field}={example}."
        )
    known = option_names(kinds[name])
    for option in options:
        if option not in known:
            near = nearest(option, known)
            fix = (
                f"allowed is {', '.join(known)}. Write {near or known[0]!r}, or leave it out."
                if known
                else (f"it has none. Write {field}={name!r}.")
            )
            raise ConfigError(f"{field}={value!r} is not valid: {name!r} has no option {option!r}; {fix}")
    return kinds[name](**options)


def option_names(kind: type[Named]) -> list[str]:
    """What can be written for a kind."""
    return [option.name for option in dataclasses.fields(kind)]
