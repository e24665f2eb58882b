"""`raytrain-het probe` on this machine, without Ray."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from raytrain_het.balance.batch_shares import StepCost
from raytrain_het.balance.profile import Measurement, Profile
from raytrain_het.cli import main
from raytrain_het.codec_options import AUTO_CODECS
from raytrain_het.errors import HetError
from raytrain_het.jobs import probe
from raytrain_het.jobs.probe_places import LocalProcess
from raytrain_het.jobs.probe_report import print_probe
from raytrain_het.jobs.table import load_job
from raytrain_het.probing.links import Link
from raytrain_het.probing.prediction import Machine, advice

JOBS = Path(__file__).parents[2] / "experiments" / "jobs"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("os.getloadavg", lambda: (0.0, 0.0, 0.0))
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


def test_a_machine_that_others_keep_busy_is_said_to_be(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.getloadavg", lambda: (900.0, 0.0, 0.0))
    assert main(["probe"]) == 0
    assert capsys.readouterr().err.startswith("others keep this machine busy (load 900 on ")


def test_a_jobs_workers_are_measured_together_and_advice_follows(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", str(JOBS / "tabular.yaml"), "--set", "rows=1000", "--set", "global_batch_size=64"]
    assert main(["probe", *arguments, "--compression", "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    model = found["model"]
    assert [entry["codec"] for entry in model["compression"]["codecs"]] == list(AUTO_CODECS)
    assert model["compression"]["chosen"] == ["none", "none"]
    assert model["compression"]["why"].startswith("every parameter is too small")
    assert [w["num_threads"] for w in model["workers"]] == [1, 1]
    assert sum(w["share"] for w in model["workers"]) == model["global_batch_size"] == 64
    assert model["gradient_bytes"] == 4 * 11
    assert model["samples_per_s"] == pytest.approx(64 / model["step_s"])
    assert all(w["per_sample_s"] > 0 and w["gain"] > 0 for w in model["workers"])
    assert model["best_global_batch_size"] <= model["max_global_batch_size"] == 8 * 64
    assert len(found["links"]) == 1 and found["links"][0]["send"]["median"] > 0
    assert "measuring its training step on all workers at once" in err


def test_tables_fit_in_80_columns_and_name_who_costs_more_than_it_gives(capsys: pytest.CaptureFixture[str]) -> None:
    measured = Measurement(1.234e12, 0.1, 5)
    costs = [StepCost(0.001, 1e-5), StepCost(0.002, 2e-5), StepCost(3.0, 0.5)]
    gpu, *cpus = (
        Profile(
            hardware=name,
            device=device,
            cores=13.5,
            num_threads=16,
            flops=dict.fromkeys(dtypes, measured),
            memory_bandwidth=measured,
            host_to_device=measured if device != "cpu" else None,
            step=cost,
        )
        for (name, device, *dtypes), cost in zip(
            [("NVIDIA H200 NVL Tensor Core", "cuda:0", "fp32", "bf16", "fp16")]
            + [("Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz (13.5 cores)", "cpu", "fp32", "bf16")] * 2,
            costs,
            strict=True,
        )
    )
    devices = [probe.Device(f"192.168.100.{i}", profile) for i, profile in enumerate([gpu, *cpus])]
    link = Link(*[Measurement(1.234e-3, 0.1, 5)] * 3)
    machines = [Machine(cost=cost) for cost in costs]
    job = load_job(JOBS / "digits.yaml", ["workers=auto", "het.shares=[3, 2, 1]", "global_batch_size=1024"])
    given = advice(machines, global_batch_size=1024, gradient_bytes=1e6, max_batch_size=8192)
    links = {("192.168.100.0", "192.168.100.1"): link, ("192.168.100.1", "192.168.100.2"): None}
    print_probe(probe.ProbeResult(devices, links, probe.ModelResult(job, 1024, 10**6, devices, given)), as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    for words in (
        "1.23T",
        "1.23m ±10%",
        "worker 2 (cpu on 192.168.100.2) costs more than it gives",
        "firewall",
        "het.shares=auto",
        "best global batch up to 8 times the job's: 8192 or more",
    ):
        assert words in text, text
    assert "…" not in text


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


def test_without_a_cluster_no_ray_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setattr(ray, "init", lambda *_, **__: sys.exit("Ray was started"))
    assert main(["probe", "--json"]) == 0
