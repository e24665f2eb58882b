"""JobConfig: what every job says, whatever it trains. Each kind of job adds its own fields."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pydantic
import yaml

from raytrain_het.config import HetConfig
from raytrain_het.errors import ConfigError
from raytrain_het.jobs.validation import RUN_NAME, plural
from raytrain_het.optim import optimizer_of


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
"""Its name, or one with options: :func:`raytrain_het.optim.optimizer_of`."""


@dataclass(frozen=True, kw_only=True)
class JobConfig:
    """What every job says.

    Raises:
        ConfigError: Two fields contradict each other; the message says which and what to write.
    """

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
        """How many workers, or ``None`` where only the cluster can say."""
        return None if isinstance(self.workers, str) else sum(spec.count for spec in self.workers)

    def metrics(self) -> dict[str, Literal["min", "max"]]:
        """What the job reports, and which way is better."""
        return {}

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
