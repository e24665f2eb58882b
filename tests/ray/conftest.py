"""One Ray cluster for the session: a head without CPUs, a node with a fake GPU, a node without."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

_HERE = Path(__file__).parent
sys.path.insert(0, str(_HERE))

ray = pytest.importorskip("ray")
import ray_fakes  # noqa: E402
from ray.cluster_utils import Cluster  # noqa: E402
from ray_waiting import eventually, free  # noqa: E402

from raytrain_het.ray_train.hub import Parts, hub_name  # noqa: E402
from raytrain_het.ray_train.scaling import HetScalingConfig, WorkerSpec  # noqa: E402
from raytrain_het.ray_train.trainer import HetTrainer  # noqa: E402

_GPU_AND_TWO_CPU = (WorkerSpec(resources={"GPU": 1, "CPU": 1}), WorkerSpec(count=2))


@pytest.fixture(scope="session")
def cluster() -> Iterator[Any]:
    paths = [str(_HERE), str(_HERE.parent.parent), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(p for p in paths if p)
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 0,
            # A killed node is to be noticed within seconds, not after the default 15.
            "_system_config": {"health_check_period_ms": 1000, "health_check_failure_threshold": 3},
        },
    )
    cluster.add_node(num_cpus=2, num_gpus=1, labels={"kind": "gpu-box"})
    cluster.add_node(num_cpus=2, labels={"kind": "cpu-box"})
    ray.init(address=cluster.address, logging_level="WARNING")
    yield cluster
    ray.shutdown()
    cluster.shutdown()


class FakeRun:
    """``fit`` in a thread, and the fake membership actor to steer it by."""

    def __init__(self, trainer: HetTrainer) -> None:
        self.trainer, self.result, self.error = trainer, None, None
        before = trainer.train_run_context.run_id
        self._thread = threading.Thread(target=self._fit, daemon=True)
        self._thread.start()
        eventually(
            lambda: trainer.train_run_context.run_id != before or not self._thread.is_alive(), "fit did not begin"
        )
        self.run_id = trainer.train_run_context.run_id
        self._handle: Any = None

    def _fit(self) -> None:
        try:
            self.result = self.trainer.fit()
        except BaseException as error:
            self.error = error

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        def find() -> Any:
            try:
                return ray.get_actor(hub_name(self.run_id, 0))
            except ValueError:
                assert self._thread.is_alive(), f"fit ended early: {self.error!r}"
                return None

        self._handle = self._handle or eventually(find, "no membership actor")
        return ray.get(getattr(self._handle, method).remote(*args, **kwargs))

    def members(self, count: int, *, joins: int | None = None, timeout_s: float = 60) -> dict[int, dict[str, Any]]:
        """Wait until so many workers are there (and have come so often in all)."""

        def there() -> Any:
            members = self.call("peek", "members")
            return members if len(members) == count and len(self.call("peek", "joins")) >= (joins or 0) else None

        return eventually(there, f"{count} workers", timeout_s)

    def is_under_way(self) -> bool:
        """Whether ``fit`` has not ended yet."""
        return self._thread.is_alive()

    def join(self, timeout_s: float = 60) -> Any:
        self._thread.join(timeout_s)
        assert not self._thread.is_alive(), "fit did not end"
        if self.error is not None:
            raise self.error
        return self.result

    def clear_away(self) -> None:
        """End the run, if it has not ended by itself, by force if its test has failed: the next ones need its place."""
        if self._thread.is_alive():
            self.call("tell", "finish")
            self._thread.join(30)
        if self._thread.is_alive():
            for member in self.call("peek", "joins"):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(member["pid"], signal.SIGKILL)
            self._thread.join(30)


@contextlib.contextmanager
def fake_runs(folder: Path) -> Iterator[Callable[..., FakeRun]]:
    """Starts runs with the fakes; each must give back all it took."""
    before = eventually(lambda: free() if free()["CPU"] >= 4 else None, "the last test's resources")
    runs: list[FakeRun] = []

    def start(
        train_fn: Any = ray_fakes.obey,
        workers: Any = _GPU_AND_TWO_CPU,
        name: str = "run",
        **kwargs: Any,
    ) -> FakeRun:
        run_config = kwargs.pop("run_config", None) or ray.train.RunConfig(name=name, storage_path=str(folder))
        trainer = HetTrainer(train_fn, scaling_config=HetScalingConfig(workers), run_config=run_config, **kwargs)
        trainer.parts = Parts(actor=ray_fakes.FakeMembership, run_worker=ray_fakes.run_fake_worker)
        runs.append(FakeRun(trainer))
        return runs[-1]

    yield start
    for run in runs:
        run.clear_away()
    eventually(lambda: free() == before, f"free resources as before ({before})", 30)


@pytest.fixture
def start(cluster: Any, tmp_path: Path) -> Iterator[Callable[..., FakeRun]]:
    """Starts runs that end with the test."""
    with fake_runs(tmp_path) as start:
        yield start


@pytest.fixture(scope="module")
def start_shared(cluster: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., FakeRun]]:
    """Starts runs that several tests of a module make use of. :func:`start` waits until such runs have ended."""
    with fake_runs(tmp_path_factory.mktemp("shared")) as start:
        yield start
