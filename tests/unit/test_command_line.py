"""The command line, over a trainer that does not train."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.train import TrainingFailedError

import raytrain_het as het
from raytrain_het.cli import main
from raytrain_het.jobs import runner
from raytrain_het.jobs.summary import RUN_KEYS

SUMMARY = {"metrics": {"accuracy": 0.99}, "steps": 1, "samples": 64, "throughput_samples_per_s": 1.0, "workers": []}


class StubTrainer:
    """Takes what HetTrainer takes, reports once, and ends as it is told."""

    made: list[StubTrainer] = []
    end: BaseException | None = None

    def __init__(self, train_fn: Any, **arguments: Any) -> None:
        self.train_fn, self.arguments = train_fn, arguments
        self.summary: dict[str, Any] = {}
        self.made.append(self)

    def fit(self) -> None:
        run = self.arguments["run_config"]
        (Path(run.storage_path) / run.name).mkdir(parents=True)
        self.arguments["on_update"]({"step": 1}, [], [{"step": 1, "epoch": 0, "metrics": {"accuracy": 0.99}}])
        if self.end is not None:
            raise self.end
        self.summary = SUMMARY


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> type[StubTrainer]:
    @contextlib.contextmanager
    def no_ray(address: str | None, *, num_cpus: float) -> Iterator[None]:
        yield

    monkeypatch.setattr(runner, "ray_session", no_ray)
    monkeypatch.setattr(het, "HetTrainer", StubTrainer, raising=False)
    monkeypatch.setattr(het, "WorkerSpec", lambda **spec: spec, raising=False)
    monkeypatch.setattr(het, "HetScalingConfig", lambda workers: workers, raising=False)
    monkeypatch.setattr(StubTrainer, "made", [])
    monkeypatch.setattr(StubTrainer, "end", None)
    monkeypatch.chdir(tmp_path)
    return StubTrainer


def test_train_hands_the_job_to_the_trainer(stub: type[StubTrainer], tmp_path: Path) -> None:
    assert main(["train", "--name", "mine", "--set", "epochs=3", "--set", "het.compression=bf16"]) == 0
    (trainer,) = stub.made
    arguments = trainer.arguments
    assert trainer.train_fn.job.kind == "digits"
    assert arguments["train_loop_config"]["epochs"] == 3
    assert arguments["het_config"].compression == "bf16"
    assert arguments["scaling_config"] == [{"count": 2, "resources": {"CPU": 1.0}, "labels": {}}]
    assert arguments["run_config"].name == "mine"
    assert arguments["run_config"].storage_path == str(tmp_path / "runs")


def test_train_prints_the_folder_and_leaves_a_job_file_that_runs_again(
    stub: type[StubTrainer], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--name", "mine", "--set", "lr=0.2"]) == 0
    assert f"run folder: {tmp_path}/runs/mine" in capsys.readouterr().out
    (tmp_path / "runs/mine").rename(tmp_path / "runs/before")
    assert main(["train", str(tmp_path / "runs/before/job.yaml")]) == 0
    first, second = (trainer.arguments for trainer in stub.made)
    assert first["train_loop_config"] == second["train_loop_config"]
    assert first["run_config"].name == second["run_config"].name


def test_json_leaves_stdout_to_the_result(stub: type[StubTrainer], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--json"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert tuple(result) == RUN_KEYS
    assert {key: result[key] for key in SUMMARY} == SUMMARY
    assert result["run_folder"].endswith(f"/runs/{result['name']}")
    assert "run folder:" in err


@pytest.mark.parametrize(
    "arguments",
    [["--set", "epohcs=3"], ["nope.yaml"], ["--set", "epochs=none"], ["--storage", "file/below"], ["--name", "a b"]],
)
def test_bad_input_is_one_message_status_2_and_no_folder(
    stub: type[StubTrainer], tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert main(["train", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("raytrain-het: ")
    assert "Traceback" not in err
    assert stub.made == []
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_storage_is_refused(
    stub: type[StubTrainer], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    assert main(["train", "--storage", str(tmp_path / "locked" / "runs")]) == 2
    assert "nothing can be written" in capsys.readouterr().err


def test_a_missing_extra_is_named(
    stub: type[StubTrainer], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["train"]) == 2
    assert "pip install 'raytrain-het[jobs]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("end", "status"), [(KeyboardInterrupt(), 130), (SystemExit(0), 130), (SystemExit(1), 130), (SystemExit(15), 143)]
)
def test_an_interrupted_run_ends_with_one_line(
    stub: type[StubTrainer],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    end: BaseException,
    status: int,
) -> None:
    monkeypatch.setattr(stub, "end", end)
    assert main(["train"]) == status
    assert capsys.readouterr().err.splitlines() == ["raytrain-het: interrupted; all workers are gone"]


def test_a_training_function_that_raises_is_shown_before_anything_else(
    stub: type[StubTrainer], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Failed(TrainingFailedError):
        def __str__(self) -> str:
            return "Traceback (most recent call last):\n  theirs\nValueError: oh no"

    monkeypatch.setattr(stub, "end", Failed())
    assert main(["train"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("Traceback (most recent call last):\n  theirs\nValueError: oh no")
    assert err.splitlines()[-1].startswith("raytrain-het: the run failed")
    assert err.count("Traceback") == 1


def test_checking_a_job_needs_neither_torch_nor_ray() -> None:
    code = "import sys, raytrain_het.jobs.table as t; t.load_job(); sys.exit(bool({'torch', 'ray'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_half_an_options_name_is_a_mistake_and_starts_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["sweep", "s.yaml", "--nam", "x"])
    assert "unrecognized arguments: --nam" in capsys.readouterr().err
