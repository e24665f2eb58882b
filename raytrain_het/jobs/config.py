"""JobConfig: the base of every job. It has the keys of all jobs, and says what a job has to know to be run.

No job's class needs torch or Ray, so a mistake in a job file is answered at once. What trains is imported in the
methods that need it.
"""

from __future__ import annotations

import abc
import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import pydantic
import yaml

from raytrain_het.config import HetConfig
from raytrain_het.errors import ConfigError
from raytrain_het.jobs.validation import RUN_NAME, plural
from raytrain_het.optim import optimizer_of

if TYPE_CHECKING:
    import torch

    from raytrain_het.jobs.training_step import TrainingStep


@dataclass(frozen=True, kw_only=True)
class Workers:
    """So many workers of one kind."""

    count: Annotated[int, pydantic.Field(ge=1)] = 1
    """How many of them."""

    resources: dict[str, Annotated[float, pydantic.Field(ge=0)]] = field(default_factory=lambda: {"CPU": 1.0})
    """What each reserves, by Ray's names: CPU, GPU, or a custom resource."""

    labels: dict[str, str] = field(default_factory=dict)
    """A label selector for its node, as Ray's."""


def _branch(value: object) -> str:
    return "auto" if isinstance(value, str) else "list"


WorkerList = Annotated[
    # Told apart beforehand, so that a mistake in the list is not also reported as "not 'auto'".
    Annotated[tuple[Workers, ...], pydantic.Tag("list"), pydantic.Field(min_length=1)]
    | Annotated[Literal["auto"], pydantic.Tag("auto")],
    pydantic.Discriminator(_branch),
]


OptimizerChoice = str | dict[str, dict[str, Any] | None]
"""An optimizer's name, or its name with options: :func:`raytrain_het.optim.optimizer_of`."""


@dataclass(frozen=True, kw_only=True)
class JobConfig(abc.ABC):
    """A job: its fields are the keys of its file, its class is a line in :data:`raytrain_het.jobs.table.JOBS`.

    Raises:
        ConfigError: Two fields contradict each other; the message says which and what to write.
    """

    requires: ClassVar[tuple[str, ...]] = ()
    """Modules of the extra ``jobs`` that the training imports."""

    model_keys: ClassVar[tuple[str, ...]] = ()
    """Fields that change the model or the samples: a run of the same name cannot go on with others."""

    optimizer_keys: ClassVar[tuple[str, ...]] = ()
    """Fields that are part of the optimizer's state, which a resumed run takes from its checkpoint."""

    path_keys: ClassVar[tuple[str, ...]] = ()
    """Fields that name a file, or a URI. Workers have other working directories: a path is made absolute."""

    kind: str
    """Which job: a name in the table of :mod:`raytrain_het.jobs.table`."""

    name: Annotated[str, pydantic.Field(pattern=RUN_NAME)] | None = None
    """The run's folder below ``storage``. The same name again goes on from its last checkpoint.
    ``null`` is the kind and the time of day."""

    storage: Annotated[str, pydantic.Field(min_length=1)] = "runs"
    """A folder, or a URI such as ``s3://bucket/path``."""

    workers: WorkerList = (Workers(count=2),)
    """The workers, or ``auto``: one per GPU, and one per CPU-only node."""

    het: HetConfig = field(default_factory=HetConfig)
    """The step protocol and membership."""

    keep_checkpoints: Annotated[int, pydantic.Field(ge=1)] | None = 2
    """So many of the latest checkpoints are kept; ``null`` keeps all."""

    def __post_init__(self) -> None:
        shares, workers = self.het.given_shares, self.num_workers
        if shares is not None and workers is not None and len(shares) != workers:
            raise ConfigError(
                f"het.shares={[int(s) if s == int(s) else s for s in shares]} has {plural(len(shares), 'number')}, "
                f"`workers` has {workers}: allowed is one number per worker. Write --set het.shares='{[1] * workers}', "
                "or --set het.shares=auto"
            )
        if workers is not None:
            self.het.codecs_for(workers)
        if hasattr(self, "optimizer"):
            optimizer_of(self.optimizer)
        decay, epochs = self.het.decay, getattr(self, "epochs", None)
        if decay is not None and epochs is not None:
            decay.check_run(epochs)

    @property
    def num_workers(self) -> int | None:
        """How many workers, or None where only the cluster can say."""
        return None if isinstance(self.workers, str) else sum(spec.count for spec in self.workers)

    @property
    def run_name(self) -> str:
        """``name``, once :func:`raytrain_het.jobs.runner.resolve` has given the job one.

        Raises:
            ValueError: The job has no name yet.
        """
        if self.name is None:
            raise ValueError(f"this {self.kind!r} job has no name yet: resolve(job) gives it one")
        return self.name

    @staticmethod
    @abc.abstractmethod
    def train(config: dict[str, Any]) -> None:
        """The training function, which every worker calls.

        Args:
            config: What :meth:`train_loop_config` gives.
        """

    @staticmethod
    @abc.abstractmethod
    def make_step(config: dict[str, Any], device: torch.device) -> TrainingStep:
        """The job's training step by itself, for measurements.

        Args:
            config: What :meth:`train_loop_config` gives.
            device: Where the step runs.
        """

    def metrics(self) -> dict[str, Literal["min", "max"]]:
        """What the job reports, and which way is better."""
        return {}

    def glance_at_data(self) -> None:
        """See in a moment whether the data is there at all. Loads neither torch nor Ray.

        Raises:
            ConfigError: A file on this machine does not exist.
        """
        for key in self.path_keys:
            path = getattr(self, key)
            if path is not None and "://" not in path and not Path(path).expanduser().exists():
                raise ConfigError(f"{key}={path!r} does not exist: allowed is a CSV or Parquet file. Look at its path.")

    def check_data(self) -> list[str]:
        """Read the data before any worker is started. Loads neither torch nor Ray.

        Returns:
            Warnings, a line each.

        Raises:
            ConfigError: The data is not what the job needs.
        """
        return []

    def num_samples(self) -> int | None:
        """How many samples the job trains on, once its data is checked; None if that is unknown."""
        return None

    def train_loop_config(self) -> dict[str, Any]:
        """The fields of this kind of job, and the seed: what the training function is given."""
        common = {f.name for f in dataclasses.fields(JobConfig)}
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in common}
        return {**own, "seed": self.het.seed}

    def to_yaml(self) -> str:
        """The resolved job, which :func:`raytrain_het.jobs.table.load_job` reads again."""
        return yaml.safe_dump(plain(dataclasses.asdict(self)), sort_keys=False)


def check_batch_size(global_batch_size: int, num_workers: int | None) -> None:
    """Refuse a batch that cannot give every worker a sample.

    Raises:
        ConfigError: The batch is smaller than the number of workers.
    """
    if num_workers is not None and global_batch_size < num_workers:
        raise ConfigError(
            f"global_batch_size={global_batch_size} is smaller than the number of workers, {num_workers}: allowed is "
            f"one sample per worker or more. Write --set global_batch_size={num_workers}, or fewer workers"
        )


def plain(value: Any) -> Any:
    """What YAML has for it: mappings, lists and what they hold."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    return value
