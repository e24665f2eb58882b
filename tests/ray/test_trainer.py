"""What the trainer checks before any worker starts, and what it gives the driver."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray

from raytrain_het.config import HetConfig
from raytrain_het.errors import CheckpointError, ConfigError, ResourceError, RunFailedError
from raytrain_het.ray_train.scaling import HetScalingConfig, WorkerSpec
from raytrain_het.ray_train.trainer import HetTrainer
from raytrain_het.worker.checks.unsupported import TABLE


def nothing() -> None:
    pass


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"datasets": {"train": 1}}, "prepare_data_loader"),
        ({"scaling_config": ray.train.ScalingConfig(num_workers=2)}, "HetScalingConfig"),
        ({"het_config": {"codec": "none"}}, "HetConfig()"),
    ],
)
def test_wrong_arguments_are_refused_with_what_to_write(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        HetTrainer(nothing, **arguments)
    assert says in str(caught.value)


def test_a_training_function_with_two_arguments_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"takes 2 required arguments \(a, b\)"):
        HetTrainer(lambda a, b: None)
    with pytest.raises(ConfigError, match="not callable"):
        HetTrainer(None)  # type: ignore[arg-type]


def test_shares_must_be_as_many_as_workers(start: Any) -> None:
    with pytest.raises(ConfigError, match=r"3 numbers, the run has 2 workers.*shares=\[1, 1\]"):
        start(workers=[WorkerSpec(count=2)], het_config=HetConfig(shares=(3, 2, 1)))
    run = start(workers="auto", het_config=HetConfig(shares=tuple(range(1, 100))))
    with pytest.raises(ConfigError, match="99 numbers, the run has"):
        run.join()


def test_a_spec_that_no_node_can_satisfy_fails_before_any_worker_starts(start: Any) -> None:
    run = start(workers=[WorkerSpec(resources={"GPU": 4})])
    with pytest.raises(ResourceError, match=r"GPU: 4 \(the most any one node has is 1\)"):
        run.join(20)


def test_a_storage_path_that_cannot_be_written_is_named(start: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    run = start(run_config=ray.train.RunConfig(name="r", storage_path=str(tmp_path / "file")))
    with pytest.raises(CheckpointError, match=r"storage_path='.*/file'.*cannot be written"):
        run.join(20)


@dataclass
class AutoRun:
    """A run with a worker on each node, which its membership actor has declared failed."""

    members: dict[int, dict[str, Any]]
    error: BaseException | None


@pytest.fixture(scope="module")
def auto_run(start_shared: Callable[..., Any]) -> AutoRun:
    run = start_shared(workers="auto")
    members = run.members(2)
    run.call("set", state="failed", failure="three workers died on samples 3 to 5")
    with pytest.raises(Exception):  # noqa: B017 - which one it is, and what it says, is a test of its own
        run.join()
    return AutoRun(members, run.error)


def test_auto_takes_the_gpu_node_and_the_cpu_node(auto_run: AutoRun) -> None:
    assert [len(auto_run.members[i]["gpu_ids"]) for i in range(2)] == [1, 0]
    assert [auto_run.members[i]["threads"] for i in range(2)] == ["2", "2"]


def test_the_reason_of_a_failed_run_is_raised(auto_run: AutoRun) -> None:
    with pytest.raises(RunFailedError, match="samples 3 to 5"):
        raise auto_run.error or AssertionError("the run has not failed")


@pytest.fixture(scope="module")
def failure(start_shared: Callable[..., Any]) -> str:
    """What a run says whose worker has raised what Ray's own functions told it, in an exception that cannot be sent."""
    run = start_shared(train_fn=call_rays_own, workers=[WorkerSpec()])
    with pytest.raises(ray.train.TrainingFailedError) as caught:
        run.join()
    return str(caught.value)


def test_what_ray_has_for_equal_workers_is_refused_by_name(failure: str) -> None:
    for row in ("ray.train.report", "ray.train.get_checkpoint", "ray.train.torch.prepare_model"):
        assert TABLE[row].what in failure
        assert TABLE[row].way_out in failure


def test_the_text_and_the_traceback_of_an_exception_that_cannot_be_sent_arrive(failure: str) -> None:
    assert "SeveralArguments: 404: no labels for shard 7" in failure
    assert 'raise SeveralArguments(404, "no labels for shard 7", said)' in failure


class SeveralArguments(Exception):
    def __init__(self, code: int, detail: str, said: list[str]) -> None:
        super().__init__("\n".join([f"{code}: {detail}", *said]))


def call_rays_own() -> None:
    from ray.train.torch import prepare_model

    said = []
    for call in (lambda: ray.train.report({"loss": 1.0}), ray.train.get_checkpoint, lambda: prepare_model(None)):
        try:
            call()
        except RuntimeError as error:
            said.append(str(error))
    raise SeveralArguments(404, "no labels for shard 7", said)


def test_a_scaling_config_prints_its_workers() -> None:
    assert repr(HetScalingConfig()) == "HetScalingConfig(workers='auto')"
