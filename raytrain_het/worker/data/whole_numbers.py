"""Whole numbers as users have them: of Python's, numpy's and torch's kinds."""

from __future__ import annotations

import operator
from typing import Any

from raytrain_het.errors import ConfigError


def whole_number(value: Any, what: str, *, low: int = 1, fix: str = "") -> int:
    """``value`` as an int.

    Args:
        value: what the user gave.
        what: names it, as in ``global_batch_size={}``; the value is put in.
        low: least that is allowed.
        fix: what to write, if that helps.

    Raises:
        ConfigError: it is no whole number (``16.0`` and ``True`` are none), or below ``low``.
    """
    try:
        number = operator.index(value)
        if isinstance(value, bool) or "bool" in str(getattr(value, "dtype", "")):
            raise TypeError
    except (TypeError, ValueError, RuntimeError):
        number = low - 1
    if number < low:
        raise ConfigError(f"{what.format(repr(value))} is not valid: allowed is a whole number from {low}.{fix}")
    return number
