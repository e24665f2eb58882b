"""``--simulate``: which workers, how much of a core each, and what is said of it in the end."""

from __future__ import annotations

import contextlib
import math
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import raytrain_het as het
from raytrain_het.cli import main
from raytrain_het.errors import ConfigError
from raytrain_het.jobs import runner
from raytrain_het.jobs.simulation import LEFT_CORES, fitting_cores, parse_speeds, verdict
from raytrain_het.jobs.table import default_job
from raytrain_het.probing.cores import CpuLimit
from raytrain_het.testing.cgroups import PREFIX, ROOT
from raytrain_het.testing.throttle import SlowWorkers


@given(st.lists(st.floats(0.5, 2.0), min_size=1, max_size=16), st.integers(2, 64))
def test_cores_are_in_proportion_to_speeds_and_fit(speeds: list[float], num_cores: int) -> None:
    cores = fitting_cores(speeds, num_cores)
    assert math.fsum(cores) <= num_cores - LEFT_CORES + 1e-9
    assert max(cores) <= 1 + 1e-9
    assert [c * speeds[0] for c in cores] == pytest.approx([s * cores[0] for s in speeds])
    # As fast as one of the two bounds allows.
    assert max(cores) == pytest.approx(1) or math.fsum(cores) == pytest.approx(num_cores - LEFT_CORES)


@pytest.mark.parametrize("text", ["1,0", "1,x", "", " ", "1,,2", "1,-1", "nan", "inf,1", ",".join(["1"] * 17)])
def test_speeds_that_are_none_are_named(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_speeds(text)
    message = str(caught.value)
    assert repr(text) in message
    assert "1 to 16 numbers above 0" in message
    assert "Write --simulate 1,0.5,0.25" in message


def test_a_worker_that_would_be_taken_for_dead_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"the speed 0\.001 would be 0\.001 of a core.*allowed is 0\.02"):
        fitting_cores([1, 0.001], 2)


def worker(rank: int, score: float | None, share: int) -> dict[str, Any]:
    return {"world_rank": rank, "score": score, "batch_share": share}


def test_the_verdict_is_the_slowest_score_over_the_mean() -> None:
    workers = [worker(0, 1.7, 37), worker(1, 0.9, 18), worker(2, 0.4, 9)]
    text = verdict({"workers": workers, "fraction_of_aggregate": 0.8}, [0.91, 0.46, 0.23])
    assert "computed from the scores, not run" in text
    assert "the pace of worker 2, about 40% of the sum" in text
    assert text.endswith("2.0 times as fast")


def test_scores_that_are_not_known_or_not_as_simulated_are_no_verdict() -> None:
    assert "not known" in verdict({"workers": [worker(0, 1.0, 2), worker(1, None, 1)]}, [1, 0.5])
    odd = {"workers": [worker(0, 1.9, 60), worker(1, 0.1, 4)], "fraction_of_aggregate": 0.5}
    text = verdict(odd, [1, 0.5])
    assert "about 10% of the sum" in text
    assert "the simulated speeds say 67%" in text
    assert "times as fast" not in text


class StubTrainer:
    """Takes what HetTrainer takes, and looks whether the quotas' groups are there."""

    made: list[StubTrainer] = []

    def __init__(self, train_fn: Any, **arguments: Any) -> None:
        self.train_fn, self.arguments = train_fn, arguments
        self.summary = {
            "metrics": {},
            "steps": 1,
            "samples": 64,
            "throughput_samples_per_s": 1.0,
            "workers": [worker(0, 1.5, 48), worker(1, 0.5, 16)],
        }
        self.made.append(self)

    def fit(self) -> None:
        run = self.arguments["run_config"]
        (Path(run.storage_path) / run.name).mkdir(parents=True)
        self.arguments["on_update"]({"step": 1}, [], [])
        groups = self.train_fn.at_start.groups
        assert groups is None or all(group.exists() for group in groups)


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> type[StubTrainer]:
    @contextlib.contextmanager
    def no_ray(address: str | None, *, num_cpus: float) -> Iterator[None]:
        assert address == "local"
        yield

    monkeypatch.setattr(runner, "ray_session", no_ray)
    monkeypatch.setattr(het, "HetTrainer", StubTrainer)
    monkeypatch.setattr(het, "WorkerSpec", lambda **spec: spec)
    monkeypatch.setattr(het, "HetScalingConfig", lambda workers: workers)
    monkeypatch.setattr(StubTrainer, "made", [])
    monkeypatch.chdir(tmp_path)
    return StubTrainer


def test_simulated_workers_replace_the_jobs_and_shares_follow_speeds(
    stub: type[StubTrainer], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")  # It is for this machine, whatever else there is.
    before = set(ROOT.rglob(f"{PREFIX}_*"))
    assert main(["train", "--simulate", "1,0.5,0.5", "--set", "epochs=3"]) == 0
    (trainer,) = stub.made
    assert trainer.arguments["scaling_config"] == [{"count": 3, "resources": {"CPU": 1}, "labels": {}}]
    assert trainer.arguments["het_config"].shares == "auto"
    # Larger batches than the default job's, so that steps can be measured; what was given stays.
    assert trainer.arguments["train_loop_config"]["global_batch_size"] == 512
    assert trainer.arguments["train_loop_config"]["epochs"] == 3
    prepared = pickle.loads(pickle.dumps(trainer.train_fn))
    assert isinstance(prepared.at_start, SlowWorkers)
    assert prepared.job.kind == "digits"
    assert set(ROOT.rglob(f"{PREFIX}_*")) <= before
    out = capsys.readouterr().out
    assert out.startswith("simulating 3 workers with ")
    assert "equal shares" in " ".join(out.split())


def test_what_a_quota_leaves_of_the_machine_is_what_is_shared_out(
    stub: type[StubTrainer], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container's cores are fewer than it sees."""
    monkeypatch.setattr("raytrain_het.probing.cores.cpu_limit", lambda: CpuLimit(1.4, 0.1))
    monkeypatch.setattr(runner, "cpu_limit", lambda: CpuLimit(1.4, 0.1))
    assert main(["train", "--simulate", "1,1"]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith("simulating 2 workers with 0.50, 0.50 of a core")
    assert "2 workers on 1.4 cores: they share them" in lines


def test_a_job_that_was_named_keeps_its_batches(stub: type[StubTrainer]) -> None:
    assert main(["train", str(default_job()), "--simulate", "1,0.5"]) == 0
    assert stub.made[0].arguments["train_loop_config"]["global_batch_size"] == 64


@pytest.mark.parametrize(("given_shares", "expected"), [("[3, 1]", (3.0, 1.0)), ("null", None)])
def test_shares_that_were_given_stay(stub: type[StubTrainer], given_shares: str, expected: Any) -> None:
    assert main(["train", "--simulate", "1,0.5", "--set", f"het.shares={given_shares}"]) == 0
    assert stub.made[0].arguments["het_config"].shares == expected


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--simulate", "1,0"], ["'1,0'", "'0'", "above 0", "Write --simulate"]),
        (["--simulate", "1,x"], ["'1,x'", "'x'", "above 0", "Write --simulate"]),
        (["--simulate", ""], ["''", "1 to 16", "Write --simulate"]),
        (["--simulate", ",".join("1" * 17)], ["17 workers", "1 to 16", "Write --simulate"]),
        (["--simulate", "1,0.5", "--address", "auto"], ["--address auto", "Leave out --address"]),
        (["--simulate", "1,0.5", "--set", "workers=auto"], ["workers='auto'", "Write --set workers="]),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    stub: type[StubTrainer], tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], parts: list[str]
) -> None:
    assert main(["train", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert err.startswith("raytrain-het: --simulate")
    for part in parts:
        assert part in err
    assert stub.made == []
    assert list(tmp_path.iterdir()) == []
