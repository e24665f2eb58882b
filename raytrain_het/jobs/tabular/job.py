"""The keys of the tabular job."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pydantic

from raytrain_het.errors import ConfigError
from raytrain_het.jobs.config import JobConfig, OptimizerChoice, check_batch_size
from raytrain_het.optim import optimizer_of

if TYPE_CHECKING:
    import torch

    from raytrain_het.jobs.tabular.data import TableData
    from raytrain_het.jobs.training_step import TrainingStep


@dataclass(frozen=True, kw_only=True)
class TabularJob(JobConfig):
    """Regression or classification on a table: linear or logistic (with L1, L2 or both), or a small network.

    Raises:
        ConfigError: Two fields contradict each other.
    """

    model_keys = ("task", "model", "hidden", "data", "target", "features", "columns", "rows")
    optimizer_keys = ("lr", "optimizer", "l1", "l2")
    path_keys = ("data",)

    kind: Literal["tabular"] = "tabular"

    data: Annotated[str, pydantic.Field(min_length=1)] | None = None
    """A CSV or Parquet file that every worker can read: a path, or a URI (``s3://``, ``gs://``, ``hdfs://``).
    Delimiters, decimal commas, encodings and packed files are seen from its contents (docs/jobs.md); the first line
    has the columns' names. ``null`` makes up a linear regression of ``rows`` x ``columns``."""

    rows: Annotated[int, pydantic.Field(ge=10)] = 1_000_000
    """Rows of the made-up table."""

    columns: Annotated[int, pydantic.Field(ge=1)] = 10
    """Columns of the made-up table, besides the target."""

    target: str | None = None
    """The column that is predicted; ``null`` is the last one."""

    features: tuple[str, ...] | None = None
    """The columns it is predicted from; ``null`` is all others."""

    task: Literal["regression", "classification"] = "regression"
    """Regression minimises the squared error; classification the cross-entropy over the target's values."""

    model: Literal["linear", "mlp"] = "linear"
    """``linear`` is linear or logistic regression."""

    hidden: tuple[Annotated[int, pydantic.Field(ge=1)], ...] = (64, 64)
    """Widths of the network's hidden layers."""

    l1: Annotated[float, pydantic.Field(ge=0)] = 0.0
    """L1 penalty: ``l1 * sum |w|`` over weights, not biases: some become exactly 0. With ``l2`` the elastic net."""

    l2: Annotated[float, pydantic.Field(ge=0)] = 0.0
    """L2 penalty: ``l2 / 2 * sum w^2`` over weights, not biases."""

    epochs: Annotated[int, pydantic.Field(ge=1)] = 3
    """Passes over the training part, four fifths of the rows."""

    global_batch_size: Annotated[int, pydantic.Field(ge=1)] = 4096
    """Rows in one step, over all workers. With fewer rows to train on than that, a tenth of them."""

    lr: Annotated[float, pydantic.Field(gt=0)] = 0.05
    """Learning rate, before the schedule, on standardised columns."""

    optimizer: OptimizerChoice = "sgd"
    """``sgd`` (with momentum 0.9), ``adagrad``, ``rmsprop``, ``adam`` or ``adamw``, or one with options
    (docs/training.md has them all). An ``l1`` needs ``sgd``. The decay of weights is ``l2``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_batch_size(self.global_batch_size, self.num_workers)
        optimizer = optimizer_of(self.optimizer)
        if self.l1 and optimizer.name != "sgd":
            raise ConfigError(
                f"l1={self.l1} is not valid with optimizer={optimizer.name!r}: allowed is 0, or optimizer=sgd, whose "
                "steps end with soft thresholding. Write --set optimizer=sgd"
            )
        written = (self.optimizer[optimizer.name] or {}) if isinstance(self.optimizer, dict) else {}
        if {"weight_decay", "decay_all"} & set(written):
            raise ConfigError(
                f"optimizer={self.optimizer!r} is not valid: in this job the penalty on weights is l2, and biases have "
                f"none. Leave weight_decay and decay_all out, and write --set l2={optimizer.weight_decay}"
            )
        self._check_table()

    def _check_table(self) -> None:
        """Refuse keys that do not fit the table, or the lack of one."""
        if self.data is None:
            for name in ("target", "features"):
                if getattr(self, name) is not None:
                    raise ConfigError(
                        f"{name}={getattr(self, name)!r} needs a table: allowed with data=null is null. "
                        "Write --set data=FILE.csv"
                    )
            if self.task == "classification":
                raise ConfigError(
                    "task='classification' needs a table: the made-up one is a regression. Write --set data=FILE.csv"
                )
        elif self.features is not None and (not self.features or self.target in self.features):
            raise ConfigError(
                f"features={list(self.features)!r} is not valid: allowed are one or more columns other than the "
                f"target, {self.target!r}. Leave it out for all others"
            )

    @staticmethod
    def train(config: dict[str, Any]) -> None:
        from raytrain_het.jobs.tabular.training import train_tabular

        train_tabular(config)

    @staticmethod
    def make_step(config: dict[str, Any], device: torch.device) -> TrainingStep:
        from raytrain_het.jobs.tabular.training import make_step

        return make_step(config, device)

    def metrics(self) -> dict[str, Literal["min", "max"]]:
        if self.task == "regression":
            return {"held_out_mse": "min", "train_loss": "min"}
        return {"held_out_accuracy": "max", "held_out_loss": "min", "train_loss": "min"}

    def glance_at_data(self) -> None:
        """Look for the table and its columns. Only the file's beginning is read, however large it is.

        Raises:
            ConfigError: As :func:`raytrain_het.jobs.tabular.reading.names_in`; or a column is not there.
        """
        super().glance_at_data()  # A missing file is found before anything that reads files is loaded.
        if self.data is not None and "://" not in self.data:
            from raytrain_het.jobs.tabular.columns import Source, choose_columns
            from raytrain_het.jobs.tabular.reading import names_in

            choose_columns(Source.of(self.train_loop_config()), names_in(self.data))

    def check_data(self) -> list[str]:
        table = self._table()
        return [*table.notes, *table.unlearnable_classes()]

    def num_samples(self) -> int:
        return self._table().num_train

    def _table(self) -> TableData:
        from raytrain_het.jobs.tabular.columns import Source
        from raytrain_het.jobs.tabular.data import open_table

        return open_table(Source.of(self.train_loop_config()))
