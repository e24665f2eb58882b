"""`raytrain-het probe` on this machine, without Ray."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from raytrain_het.cli import main
from raytrain_het.errors import HetError
from raytrain_het.jobs import probe
from raytrain_het.jobs.probe_places import LocalProcess

JOBS = Path(__file__).parents[2] / "experiments" / "jobs"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(probe, "run_probe", partial(probe.run_probe, seconds_each=0.01, step_seconds=0.1))


def test_json_is_one_object_and_progress_goes_to_stderr(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["probe", "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    (device, *_) = found["devices"]
    assert device["device"] == "cpu" and device["scores"].keys() == {"flops", "memory_bandwidth"}
    assert device["flops"]["fp32"]["median"] > 0 and device["flops"]["fp32"]["repeats"] == 5
    assert found["links"] == [] and found["model"] is None
    assert err.startswith("measuring cpu of this machine")
    assert len(list((tmp_path / "raytrain_het" / "profiles").glob("*.json"))) == len(found["devices"])


def test_a_jobs_workers_are_measured_together_and_advice_follows(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", str(JOBS / "tabular.yaml"), "--set", "rows=1000", "--set", "global_batch_size=64"]
    assert main(["probe", *arguments, "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    model = found["model"]
    assert [w["num_threads"] for w in model["workers"]] == [1, 1]
    assert sum(w["share"] for w in model["workers"]) == model["global_batch_size"] == 64
    assert model["gradient_bytes"] == 4 * 11
    assert model["samples_per_s"] == pytest.approx(64 / model["step_s"])
    assert all(w["per_sample_s"] > 0 and w["gain"] > 0 for w in model["workers"])
    assert model["best_global_batch_size"] <= model["max_global_batch_size"] == 8 * 64
    assert len(found["links"]) == 1 and found["links"][0]["send"]["median"] > 0
    assert "measuring its training step on all workers at once" in err


def test_tables_fit_in_100_columns(capsys: pytest.CaptureFixture[str]) -> None:
    job = ["--model", str(JOBS / "tabular.yaml"), "--set", "rows=1000", "--set", "workers.0.count=1"]
    assert main(["probe", *job]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    text = "\n".join(lines)
    assert "Devices" in text and "GFLOP" not in text and "best global batch" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--set", "epochs=3"], "--model JOB.yaml"),
        (["--model", "nope.yaml"], "nope.yaml"),
        (["--model", str(JOBS / "digits.yaml"), "--set", "epohcs=3"], "epohcs"),
        (["--model", str(JOBS / "tabular.yaml"), "--set", "data=nope.csv"], "nope.csv"),
        (["--model", str(JOBS / "digits.yaml"), "--set", "workers.0.resources={GPU: 99}"], "GPU, 99"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str
) -> None:
    monkeypatch.setattr(probe, "_local_hardware", lambda *_: [])
    assert main(["probe", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("raytrain-het: ") and words in line


def test_ctrl_c_is_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(**_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(probe, "run_probe", interrupt)
    assert main(["probe"]) == 130
    assert capsys.readouterr().err == "raytrain-het: interrupted\n"


def test_a_worker_that_dies_is_one_error_and_no_hang() -> None:
    worker = LocalProcess(node="here", device="cpu", num_threads=1)
    worker._process.kill()
    worker.start("listen")
    with pytest.raises(HetError, match="exit status -9"):
        worker.result()
    worker.close()


def test_without_a_cluster_no_ray_is_started(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import ray

    monkeypatch.setattr(ray, "init", lambda *_, **__: sys.exit("Ray was started"))
    assert main(["probe", "--json"]) == 0
