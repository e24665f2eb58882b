"""Small questions about values that every layer asks."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from typing import Any


def is_number(value: Any) -> bool:
    """Whether it is a finite number; a flag is none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def nearest(name: Any, known: Iterable[str], cutoff: float = 0.5) -> str | None:
    """Which of the known names somebody may have meant.

    Example:
        >>> nearest("momentun", ["lr", "momentum"])
        'momentum'
    """
    return next(iter(difflib.get_close_matches(str(name), list(known), n=1, cutoff=cutoff)), None)


def plain(value: Any) -> Any:
    """Values of numpy and torch as Python's own, without knowing either.

    A scalar, an array or a tensor becomes numbers, also inside of dictionaries, lists and tuples.

    Anything else is given back as it is. Arrays become tuples.
    """
    if isinstance(value, Mapping):
        return {plain(k): plain(v) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(plain, value))
    if hasattr(value, "tolist") and hasattr(value, "dtype"):
        listed = value.tolist()
        return _tuples(listed)
    return str(value) if isinstance(value, str) and type(value) is not str else value


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
