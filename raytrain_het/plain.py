"""Small functions on plain values, which every layer uses."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from typing import Any


def is_number(value: Any) -> bool:
    """Whether a value is a finite number. A bool is not a number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def nearest(name: Any, known: Iterable[str], cutoff: float = 0.5) -> str | None:
    """The known name that is most like a misspelt one; None if none is like it.

    Example:
        >>> nearest("momentun", ["lr", "momentum"])
        'momentum'
    """
    return next(iter(difflib.get_close_matches(str(name), list(known), n=1, cutoff=cutoff)), None)


def plain(value: Any) -> Any:
    """Convert numpy's and torch's values to Python's own, without importing either.

    A scalar becomes a number, an array or a tensor becomes nested tuples of numbers; also inside dictionaries, lists
    and tuples. Any other value is returned as it is.
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
