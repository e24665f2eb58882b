"""The programs that the README names, as a person starts them, on the session's cluster."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


def test_the_default_job_learns_the_digits_on_unequal_workers(cluster: Any, tmp_path: Path) -> None:
    code = "import sys; from raytrain_het.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", code, "train", "--json", "--storage", str(tmp_path), "--name", "digits"],
        env={**os.environ, "RAY_ADDRESS": cluster.address},
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads(done.stdout)
    assert summary["metrics"]["accuracy"] >= 0.97
    assert [w["world_rank"] for w in summary["workers"]] == [0, 1]
    # On a machine that stood still one may have been taken for lost: then the other has all of the batch.
    events = [json.loads(line) for line in (tmp_path / "digits" / "events.jsonl").read_text().splitlines()]
    formed = [event["slots"] for event in events if event["kind"] == "formed"]
    assert formed[0] == [0, 1]
    last = [next(slots for slots in reversed(formed) if slot in slots) for slot in (0, 1)]
    shares = [w["batch_share"] for w in summary["workers"]]
    assert shares == [share if len(slots) == 2 else 64 for share, slots in zip((48, 16), last, strict=True)]
    times = [json.loads(line)["time"] for line in (tmp_path / "digits" / "metrics.jsonl").read_text().splitlines()]
    assert times[-1] - times[0] < 120
    kept = {path.name for path in (tmp_path / "digits").iterdir()}
    assert {"job.yaml", "config.json", "metrics.jsonl", "events.jsonl"} <= kept
    (board,) = (tmp_path / "digits").glob("events.out.tfevents*")
    assert b"worker_0/bytes_sent_per_step" in board.read_bytes()


QUICKSTARTS = ("quickstart_ray.py", "quickstart_het.py")


@pytest.fixture(scope="module")
def quickstarts(cluster: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """The exit code and the output of both, which run side by side: the cluster has a CPU for each worker."""
    programs = {}
    for script in QUICKSTARTS:
        home = tmp_path_factory.mktemp(Path(script).stem)
        programs[script] = subprocess.Popen(
            [sys.executable, str(EXPERIMENTS / script)],
            env={**os.environ, "RAY_ADDRESS": cluster.address, "HOME": str(home)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=home,
        )
    try:
        said = {script: program.communicate(timeout=120)[0] for script, program in programs.items()}
    finally:
        for program in programs.values():
            program.kill()
    return {script: (programs[script].returncode, said[script]) for script in QUICKSTARTS}


@pytest.mark.parametrize("script", QUICKSTARTS)
def test_both_quickstarts_run(quickstarts: dict[str, tuple[int, str]], script: str) -> None:
    status, said = quickstarts[script]
    assert status == 0, said[-3000:]
    assert "epoch 4" in said
