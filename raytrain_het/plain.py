"""Values of numpy and torch as Python's own, without knowing either."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def plain(value: Any) -> Any:
    """A scalar, an array or a tensor as Python's numbers, also inside of dictionaries, lists and tuples.

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
