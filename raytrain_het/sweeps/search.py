"""Searches and schedulers by name, as a sweep's file writes them, and Ray Tune's objects for them."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from raytrain_het.errors import ConfigError
from raytrain_het.named_options import Allowed, NamedOptions, choose, option
from raytrain_het.plain import is_number
from raytrain_het.sweeps.objective import Objective

_WHOLE_FROM_1 = Allowed("a whole number from 1", lambda value: is_number(value) and value == int(value) >= 1)
_ABOVE_1 = Allowed("a number above 1", lambda value: is_number(value) and value > 1)


@dataclass(frozen=True, kw_only=True)
class Search(NamedOptions):
    """How the settings of trials are found."""

    field = "search"
    example = "{'optuna': {'startup_trials': 10}}"
    takes_ranges = True
    """Whether it can draw from a range; else it tries every value of a list."""
    takes_grids = True
    """Whether the space may have a ``grid``."""

    def searcher(self, objective: Objective, *, seed: int, max_concurrent: int) -> Any:
        """Tune's searcher."""
        from ray.tune.search.basic_variant import BasicVariantGenerator

        # Every point of a grid is tried with the same draws.
        return BasicVariantGenerator(constant_grid_search=True, random_state=seed, max_concurrent=max_concurrent)


@dataclass(frozen=True, kw_only=True)
class Grid(Search):
    """Every combination."""

    name = "grid"
    takes_ranges = False


@dataclass(frozen=True, kw_only=True)
class Random(Search):
    """Draws each setting by itself. If the space has a ``grid``, every draw is tried at all of its points."""

    name = "random"


@dataclass(frozen=True, kw_only=True)
class Optuna(Search):
    """Optuna's tree-structured Parzen estimator. (Bergstra et al. 2011.)"""

    name = "optuna"
    takes_grids = False

    startup_trials: int = option(10, _WHOLE_FROM_1)
    """The first so many trials are drawn at random."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if importlib.util.find_spec("optuna") is None:
            raise ConfigError(
                "search='optuna' needs optuna, which is not installed. Write: "
                "python -m pip install 'raytrain-het[sweeps]'"
            )

    def searcher(self, objective: Objective, *, seed: int, max_concurrent: int) -> Any:
        import optuna
        from ray.tune.search import ConcurrencyLimiter
        from ray.tune.search.optuna import OptunaSearch

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=self.startup_trials)
        search = OptunaSearch(sampler=sampler, metric=FOR_SEARCH, mode=objective.best)
        return ConcurrencyLimiter(search, max_concurrent=max_concurrent)


@dataclass(frozen=True, kw_only=True)
class Scheduler(NamedOptions):
    """Which trials are stopped early."""

    field = "scheduler"
    example = "{'asha': {'grace_epochs': 1}}"

    def check_epochs(self, epochs: int) -> None:
        """Refuse options that make no sense for trials of so many epochs.

        Raises:
            ConfigError: An option is too large.
        """

    def scheduler(self, objective: Objective, *, epochs: int) -> Any:
        """Tune's scheduler."""
        from ray.tune.schedulers import FIFOScheduler

        return FIFOScheduler()


@dataclass(frozen=True, kw_only=True)
class RunToTheEnd(Scheduler):
    """No trial is stopped early."""

    name = "none"


@dataclass(frozen=True, kw_only=True)
class ASHA(Scheduler):
    """Asynchronous successive halving. (Li et al. 2020, arXiv:1810.05934.)

    A trial is judged after ``grace_epochs``, then after ``reduction_factor`` times as many epochs, and so on. It goes
    on only if its metric is among the best ``1 / reduction_factor`` of the trials that have come so far.
    """

    name = "asha"

    grace_epochs: int = option(1, _WHOLE_FROM_1)
    reduction_factor: float = option(3.0, _ABOVE_1)

    def check_epochs(self, epochs: int) -> None:
        self.check("grace_epochs", self.grace_epochs < epochs, f"less than the job's {epochs} epochs")

    def scheduler(self, objective: Objective, *, epochs: int) -> Any:
        from raytrain_het.sweeps.asha import RememberingASHA

        return RememberingASHA(
            time_attr="epoch",
            metric=FOR_SCHEDULER,
            mode=objective.mode,
            max_t=epochs,
            grace_period=self.grace_epochs,
            reduction_factor=self.reduction_factor,
            brackets=1,
        )


FOR_SEARCH, FOR_SCHEDULER = "for_search", "for_scheduler"
"""Keys in each result of a trial: the numbers that searchers and schedulers compare."""
SEARCHES: dict[str, type[Search]] = {kind.name: kind for kind in (Grid, Random, Optuna)}
SCHEDULERS: dict[str, type[Scheduler]] = {kind.name: kind for kind in (RunToTheEnd, ASHA)}


def search_of(written: str | Mapping[str, Any]) -> Search:
    """``"random"``, or ``{"optuna": {"startup_trials": 5}}``.

    Raises:
        ConfigError: no such search or option, or a value that is not allowed.
    """
    return choose(SEARCHES, written)


def scheduler_of(written: str | Mapping[str, Any]) -> Scheduler:
    """``"none"``, or ``{"asha": {"grace_epochs": 2}}``.

    Raises:
        ConfigError: no such scheduler or option, or a value that is not allowed.
    """
    return choose(SCHEDULERS, written)
