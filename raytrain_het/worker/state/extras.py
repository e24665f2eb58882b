"""What checkpoints hold besides model, optimizer and registered state, each thing under a name.

Preprocessing, the names of features and classes, averaged weights: whoever has such a thing adds it to its session, and
it gets a file of its own, or, if each worker has one of its own, a place in that worker's file. It is stored and comes
back with a resume. It does not heal: what peers must agree on is registered (``register_state``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from raytrain_het.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Extra:
    """One thing."""

    save: Callable[[], Any]
    """Makes what is stored: nothing in it changes afterwards."""
    load: Callable[[Any], None]
    """Takes it back. Not called where a checkpoint has none."""
    own: bool = False
    """Whether each worker has another one. A worker that a checkpoint has none of, being new, gets the writer's."""


@dataclass
class Extras:
    """Those of a run, by name."""

    known: dict[str, Extra] = field(default_factory=dict)

    def add(self, name: str, extra: Extra) -> None:
        """Keep one.

        Raises:
            ConfigError: the name is taken, or cannot be part of a file's name.
        """
        if name in self.known or not (name.isidentifier() and name.isascii()):
            raise ConfigError(
                f"extra {name!r}: allowed is a name of letters, digits and underscores that no other has; taken are "
                f"{sorted(self.known)}."
            )
        self.known[name] = extra

    def save(self) -> dict[str, Any]:
        """All, by name."""
        return {name: extra.save() for name, extra in self.known.items()}

    def save_own(self) -> dict[str, Any]:
        """This worker's own."""
        return {name: extra.save() for name, extra in self.known.items() if extra.own}

    def load(self, values: dict[str, Any]) -> None:
        """Give back what is there."""
        for name, extra in self.known.items():
            if name in values:
                extra.load(values[name])
