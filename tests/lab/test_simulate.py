"""``raytrain-het train --simulate`` as a person runs it: whole runs, with and without quotas."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raytrain_het.jobs.summary import RUN_KEYS
from raytrain_het.testing.cgroups import PREFIX, ROOT, available

COMMAND = "import sys; from raytrain_het.cli import main; sys.exit(main())"
WITHOUT_ROOT = "import raytrain_het.testing.cgroups as t; t.available = lambda: False; " + COMMAND
MARK = "RAYTRAIN_HET_TEST_SIMULATE"


class Command:
    """The command in a process of its own; whatever it starts carries a mark."""

    def __init__(self, code: str, folder: Path, *arguments: str) -> None:
        self.mark = uuid.uuid4().hex
        environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {MARK: self.mark}
        self.log = folder / "stderr"
        with self.log.open("w") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-c", code, "train", "--storage", str(folder / "runs"), *arguments],
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=environment,
                start_new_session=True,
            )

    def left(self) -> list[int]:
        """Processes that it started, or that those started."""
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                if f"{MARK}={self.mark}".encode() in path.read_bytes().split(b"\0"):
                    found.append(int(path.parent.name))
            except OSError:
                continue
        return found

    def nothing_left(self) -> bool:
        deadline = time.monotonic() + 20
        while self.left() and time.monotonic() < deadline:
            time.sleep(0.1)
        return not self.left() and not list(ROOT.rglob(f"{PREFIX}_{self.process.pid}_*"))


@pytest.fixture
def command(tmp_path: Path) -> Iterator[Any]:
    started: list[Command] = []

    def start(code: str, *arguments: str) -> Command:
        started.append(Command(code, tmp_path, *arguments))
        return started[-1]

    yield start
    for one in started:
        for pid in one.left():
            os.kill(pid, signal.SIGKILL)


@pytest.mark.skipif(not available(), reason="needs root and a CPU controller")
def test_the_faster_of_two_simulated_workers_gets_more_and_nothing_is_left(command: Any) -> None:
    run = command(COMMAND, "--simulate", "1,0.25", "--json", "--set", "epochs=12")
    out, _ = run.process.communicate(timeout=200)
    said = run.log.read_text()
    assert run.process.returncode == 0, said
    summary = json.loads(out)
    assert tuple(summary) == RUN_KEYS
    fast, slow = summary["workers"]
    assert fast["batch_share"] > 1.2 * slow["batch_share"]
    assert fast["score"] > slow["score"]
    assert said.splitlines()[0].startswith("simulating 2 workers")
    assert "computed from the scores, not run: with equal shares" in " ".join(said.split())
    assert run.nothing_left()


def test_a_refilled_worker_is_slow_too_and_ctrl_c_leaves_neither_a_group_nor_a_process(command: Any) -> None:
    run = command(WITHOUT_ROOT, "--simulate", "1,0.5", "--set", "epochs=10000")

    def slowed() -> set[int]:
        """Workers that are stopped and continued, each by two processes."""
        owners = []
        for pid in run.left():
            with contextlib.suppress(OSError):  # It has ended since.
                line = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                owners += [int(line[4])] if len(line) > 4 and line[3].endswith(b"stop_and_go.py") else []
        return {pid for pid in owners if owners.count(pid) == 2}

    def two_slowed_but(gone: set[int]) -> set[int]:
        """As soon as they are: the second of the two processes is there a moment after the first."""
        deadline = time.monotonic() + 20
        while len(found := slowed() - gone) != 2 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert len(found) == 2, (found, gone, run.log.read_text())
        return found

    read_until(run, "step ")
    killed = min(two_slowed_but(set()))
    os.kill(killed, signal.SIGKILL)
    read_until(run, "caught up")
    two_slowed_but({killed})
    run.process.send_signal(signal.SIGINT)
    run.process.communicate(timeout=60)
    assert run.process.returncode == 130, run.log.read_text()
    assert run.nothing_left()


def read_until(run: Command, words: str) -> None:
    assert any(words in line for line in run.process.stdout), run.log.read_text()
