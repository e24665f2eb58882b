"""What a batch weighs, where the user says so: a number that a sum of weights can hold."""

from __future__ import annotations

import math
from typing import Any

from raytrain_het.errors import ConfigError


def checked_weight(value: Any) -> float:
    """What ``prepare_data_loader(weight=fn)``'s function has returned for a batch, as a number.

    0 is allowed: nothing in the batch counts (it is all padding, say).

    Raises:
        ConfigError: it is negative, infinite, not a number, or no single number at all. A sum of weights would not
            exceed 0 then, and no update would be applied.
    """
    try:
        weight = float(value)
    except (TypeError, ValueError, RuntimeError):  # The last is torch's, for a tensor of several elements.
        weight = math.nan
    if not (math.isfinite(weight) and weight >= 0):
        raise ConfigError(
            f"prepare_data_loader(weight=...) returned {value!r} for a batch: allowed is a finite number from 0. "
            "Return what the loss is a mean over, for example weight=lambda batch: float(batch['mask'].sum())."
        )
    return weight
