"""Ray Tune's searchers and schedulers, by what a sweep says."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from raytrain_het.errors import ConfigError
from raytrain_het.optim.named import Named, pick
from raytrain_het.plain import is_number
from raytrain_het.sweeps.objective import Objective


@dataclass(frozen=True, kw_only=True)
class Search(Named):
    """How settings are found."""

    field = "search"
    takes_ranges = True
    """Whether it can draw from a range, or only try all of a list."""
    takes_grids = True

    def searcher(self, objective: Objective, *, seed: int, max_concurrent: int) -> Any:
        """Tune's."""
        from ray.tune.search.basic_variant import BasicVariantGenerator

        # What is drawn is the same for every point of a grid beside it.
        return BasicVariantGenerator(constant_grid_search=True, random_state=seed, max_concurrent=max_concurrent)


@dataclass(frozen=True, kw_only=True)
class Grid(Search):
    """Every combination."""

    name = "grid"
    takes_ranges = False


@dataclass(frozen=True, kw_only=True)
class Random(Search):
    """Each drawn by itself; with a ``grid`` in the space, what is drawn is tried with all of it."""

    name = "random"


@dataclass(frozen=True, kw_only=True)
class Optuna(Search):
    """Optuna's tree-structured Parzen estimator. (Bergstra et al. 2011.)"""

    name = "optuna"
    takes_grids = False

    startup_trials: int = 10
    """So many are drawn at random first; from 1."""

    def __post_init__(self) -> None:
        ok = is_number(self.startup_trials) and self.startup_trials == int(self.startup_trials) >= 1
        self.check("startup_trials", ok, "a whole number from 1")
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
class Scheduler(Named):
    """Which trials are stopped early."""

    field = "scheduler"

    def check_epochs(self, epochs: int) -> None:
        """Raises:
        ConfigError: it makes no sense for trials of so many.
        """

    def scheduler(self, objective: Objective, *, epochs: int) -> Any:
        """Tune's."""
        from ray.tune.schedulers import FIFOScheduler

        return FIFOScheduler()


@dataclass(frozen=True, kw_only=True)
class RunToTheEnd(Scheduler):
    """None is."""

    name = "none"


@dataclass(frozen=True, kw_only=True)
class ASHA(Scheduler):
    """Asynchronous successive halving: after ``grace_epochs``, and again after each ``reduction_factor`` times as many,
    a trial goes on only if its metric is among the best ``1 / reduction_factor`` of those that have come so far.
    (Li et al. 2020.)"""

    name = "asha"

    grace_epochs: int = 1
    """From 1."""
    reduction_factor: float = 3.0
    """Above 1."""

    def __post_init__(self) -> None:
        ok = is_number(self.grace_epochs) and self.grace_epochs == int(self.grace_epochs) >= 1
        self.check("grace_epochs", ok, "a whole number from 1")
        self.check(
            "reduction_factor", is_number(self.reduction_factor) and self.reduction_factor > 1, "a number above 1"
        )

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
"""The numbers in each of a trial's results that searchers and schedulers go by."""
SEARCHES: dict[str, type[Search]] = {kind.name: kind for kind in (Grid, Random, Optuna)}
SCHEDULERS: dict[str, type[Scheduler]] = {kind.name: kind for kind in (RunToTheEnd, ASHA)}


def search_of(written: str | Mapping[str, Any]) -> Search:
    """``"random"``, or ``{"optuna": {"startup_trials": 5}}``.

    Raises:
        ConfigError: no such search or option, or a value that is not allowed.
    """
    return pick(SEARCHES, written, field="search", example="{'optuna': {'startup_trials': 10}}")


def scheduler_of(written: str | Mapping[str, Any]) -> Scheduler:
    """``"none"``, or ``{"asha": {"grace_epochs": 2}}``.

    Raises:
        ConfigError: no such scheduler or option, or a value that is not allowed.
    """
    return pick(SCHEDULERS, written, field="scheduler", example="{'asha': {'grace_epochs': 1}}")
