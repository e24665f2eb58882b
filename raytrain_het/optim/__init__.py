"""Decay schedules. A new one is one file, and one line in the table."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from raytrain_het.errors import ConfigError
from raytrain_het.optim.constant import Constant
from raytrain_het.optim.cosine import Cosine
from raytrain_het.optim.exponential import Exponential
from raytrain_het.optim.inverse_time import InverseTime
from raytrain_het.optim.linear import Linear
from raytrain_het.optim.schedule import Schedule
from raytrain_het.optim.step import Step

SCHEDULES: dict[str, type[Schedule]] = {
    kind.name: kind for kind in (Constant, Step, Exponential, InverseTime, Cosine, Linear)
}

__all__ = ["SCHEDULES", "Schedule", "schedule_of"]


def schedule_of(value: str | Mapping[str, Any]) -> Schedule:
    """``"cosine"``, or ``{"cosine": {"floor": 0.01, "warmup_epochs": 1}}``.

    Raises:
        ConfigError: no such schedule or option, or a value that is not allowed.
    """
    name: Any = None
    options: Any = {}
    if isinstance(value, str):
        name = value
    elif isinstance(value, Mapping) and len(value) == 1:
        ((name, options),) = value.items()
        options = {} if options is None else options
    if not isinstance(name, str) or name not in SCHEDULES or not isinstance(options, Mapping):
        near = difflib.get_close_matches(str(name), list(SCHEDULES), n=1, cutoff=0.5)
        raise ConfigError(
            f"schedule={value!r} is not valid: allowed is {', '.join(SCHEDULES)}, or one of them with options. Write "
            f"schedule={(near or ['cosine'])[0]!r}, or schedule={{'cosine': {{'floor': 0.01}}}}."
        )
    known = [field.name for field in dataclasses.fields(SCHEDULES[name])]
    for option in options:
        if option not in known:
            near = difflib.get_close_matches(str(option), known, n=1, cutoff=0.5)
            raise ConfigError(
                f"schedule={value!r} is not valid: {name!r} has no option {option!r}; allowed is {', '.join(known)}. "
                f"Write {(near or known)[0]!r}, or leave it out."
            )
    return SCHEDULES[name](**options)
