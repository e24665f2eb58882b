"""Plots and tables of the pages in docs/benchmarks, made from the raw data when the site is built.

A page ``docs/benchmarks/NAME.md`` shows what ``PLOTS["NAME"]`` returns. A new page is a function here and a file there.
"""

from __future__ import annotations

from collections.abc import Callable

from experiments.docs_plots import costs, faults, fleets, links, training
from experiments.docs_plots.raw import Shown

PLOTS: dict[str, Callable[[], Shown]] = {
    "adapting": fleets.adapting,
    "alpha": training.alpha,
    "codec_speed": costs.codec_speed,
    "false_alarms": faults.false_alarms,
    "faults": faults.faults,
    "hooks": costs.hooks,
    "hub": costs.hub,
    "leaks": faults.leaks,
    "one_process": training.one_process,
    "predictions": fleets.predictions,
    "protocol_cost": costs.protocol_cost,
    "quality": links.quality,
    "recovery": faults.recovery,
    "slow_links": links.slow_links,
    "step_time": costs.step_time,
    "unequal_workers": fleets.unequal_workers,
    "worker_cpu": costs.worker_cpu,
}
"""By the name of a page: its plot and its table."""
