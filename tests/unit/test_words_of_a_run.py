"""What a run says of itself: names, resuming, checkpoints, disks and addresses."""

from __future__ import annotations

import errno
import functools
import json
import logging
import math
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ray.train.v2._internal.execution.storage import StorageContext

from raytrain_het.cli import main
from raytrain_het.config import HetConfig
from raytrain_het.errors import ConfigError
from raytrain_het.files import write_whole
from raytrain_het.jobs import runner
from raytrain_het.jobs.display import waiting_line
from raytrain_het.jobs.ray_session import check_address
from raytrain_het.jobs.runner import check_reuse, check_writable, resolve
from raytrain_het.jobs.summary import checkpoint_line
from raytrain_het.jobs.table import load_job
from raytrain_het.membership import events
from raytrain_het.ray_train import monitor, narration
from raytrain_het.ray_train.monitor import Monitor
from raytrain_het.ray_train.narration import event_line, number, sentences
from raytrain_het.ray_train.run_folder import LastCheckpoint, RunFolder, last_checkpoint_of
from raytrain_het.ray_train.scaling import HetScalingConfig, WorkerSpec

ROOT = Path(__file__).parents[2]
JOBS = ROOT / "experiments" / "jobs"


def make_checkpoint(storage: Path, name: str, *, epoch: int, step: int = 92) -> Path:
    """As Ray Train and this package leave one behind."""
    path = storage / name / f"checkpoint_{step:09d}_0"
    path.mkdir(parents=True)
    (path / "het.json").write_text(json.dumps({"cursor": {"epoch": epoch, "offset": 0, "step": step}}))
    latest = {"checkpoint_dir_name": path.name, "metrics": {"accuracy": 0.9}}
    snapshot = StorageContext(str(storage), name, read_only=True).checkpoint_manager_snapshot_path
    Path(snapshot).write_text(json.dumps({"latest_checkpoint_result": latest}))
    return path


def leave_run(storage: Path, file: str, *overrides: str, epoch: int = 4) -> None:
    make_checkpoint(storage, "mine", epoch=epoch)
    job = load_job(JOBS / file, ["name=mine", f"storage={storage}", *overrides])
    (storage / "mine" / "job.yaml").write_text(job.to_yaml())


def test_another_kind_of_job_under_a_used_name_is_refused_and_nothing_is_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    leave_run(tmp_path, "digits.yaml")
    before = (tmp_path / "mine" / "job.yaml").read_text()
    assert main(["train", str(JOBS / "char_lm.yaml"), "--name", "mine", "--storage", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "mine is a 'digits' run" in line and "Write another --name" in line
    assert (tmp_path / "mine" / "job.yaml").read_text() == before


def test_another_model_under_a_used_name_is_refused_and_other_epochs_are_not(tmp_path: Path) -> None:
    leave_run(tmp_path, "char_lm.yaml")
    mine = ["name=mine", f"storage={tmp_path}"]
    check_reuse(resolve(load_job(JOBS / "char_lm.yaml", [*mine, "epochs=9", "workers=[{count: 1}]"])))
    with pytest.raises(ConfigError, match="width=64, this job has width=32.*another --name"):
        check_reuse(resolve(load_job(JOBS / "char_lm.yaml", [*mine, "width=32"])))
    with pytest.raises(ConfigError, match="het.seed=0, this job has het.seed=1"):
        check_reuse(resolve(load_job(JOBS / "char_lm.yaml", [*mine, "het.seed=1"])))


@pytest.mark.parametrize(
    ("file", "keys"),
    [
        ("digits.yaml", ["lr", "optimizer"]),
        ("tabular.yaml", ["lr", "optimizer", "l1", "l2"]),
        ("char_lm.yaml", ["lr", "optimizer"]),
    ],
)
def test_a_setting_that_a_checkpoint_would_bring_back_is_refused(tmp_path: Path, file: str, keys: list[str]) -> None:
    leave_run(tmp_path, file)
    for key in keys:
        value = "rmsprop" if key == "optimizer" else "0.123"
        others = ["optimizer=sgd"] if key == "l1" else []
        job = load_job(JOBS / file, ["name=mine", f"storage={tmp_path}", f"{key}={value}", *others])
        with pytest.raises(ConfigError, match=f"this job has {key}='?{value}'?: .*bring it back.*another --name"):
            check_reuse(resolve(job))


def test_a_complete_run_says_so_without_starting_ray(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runner, "ray_session", None)
    leave_run(tmp_path, "digits.yaml", epoch=20)
    arguments = ["train", "--name", "mine", "--storage", str(tmp_path)]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "mine is complete (20 of 20 epochs" in out and "nothing left to do" in out and "--set epochs=40" in out
    assert main([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["checkpoint"] == result["resumed_from"] == str(tmp_path / "mine" / "checkpoint_000000092_0")
    assert (result["name"], result["metrics"]) == ("mine", {"accuracy": 0.9})


def test_the_last_checkpoint_is_named_with_its_step_and_epoch(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "mine", epoch=4)
    assert str(last_checkpoint_of(str(tmp_path), "mine")) == "checkpoint_000000092_0 (step 92, epoch 4)"
    assert last_checkpoint_of(str(tmp_path), "other") is None
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(("start", "expected"), [(0, 100.0), (5000, 100.0)])
def test_throughput_counts_what_this_process_has_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: int, expected: float
) -> None:
    now = [0.0]
    monkeypatch.setattr(monitor.time, "monotonic", lambda: now[0])
    resumed = LastCheckpoint(path="c", epoch=1, step=50, offset=0, metrics={}) if start else None
    folder = RunFolder(StorageContext(str(tmp_path), "run"))
    watch = Monitor("id", folder, None, resumed)
    for second, samples in enumerate([0, start, start + 100, start + 200]):
        now[0] = float(second)
        watch._take_in({"samples": samples, "step": 60, "members": []}, [], [])
    assert watch.summary(None)["throughput_samples_per_s"] == pytest.approx(expected)
    assert watch.summary(None)["steps_now"] == (10 if start else 60)


def test_lost_checkpoints_are_counted_and_the_last_stored_one_is_named(tmp_path: Path) -> None:
    watch = Monitor("id", RunFolder(StorageContext(str(tmp_path), "run")))
    reports = [{"checkpoint": "a/c1", "checkpoint_error": None}, {"checkpoint": None, "checkpoint_error": "full"}]
    watch._take_in({}, [], [{"seq": i, "step": i, "epoch": 0, "metrics": {}, **r} for i, r in enumerate(reports)])
    summary = watch.summary(None)
    assert (summary["checkpoint"], summary["num_checkpoints_failed"]) == ("a/c1", 1)
    assert checkpoint_line(summary) == "1 of 2 checkpoints could not be written; the last one stored is a/c1"
    assert checkpoint_line(summary | {"checkpoint": None}).endswith("; the run has none")


class Broken:
    def __str__(self) -> str:
        raise RuntimeError("no text")


def test_settings_and_metrics_of_every_kind_are_written_down(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    folder = RunFolder(StorageContext(str(tmp_path), "run"))
    loop: dict[Any, Any] = {
        np.int64(0): "cat",
        ("a", "b"): 1.0,
        None: torch.tensor([1, 2]),
        "large": np.zeros((200, 200)),
        "set": {3},
        "broken": Broken(),
        "half": torch.tensor(0.5, dtype=torch.bfloat16),
        "lock": threading.Lock(),
    }
    loop["itself"] = loop
    policy = functools.partial(lambda lock, profile: 1.0, threading.Lock())
    folder.write_config(HetConfig(score_policy=policy), HetScalingConfig(workers=[WorkerSpec()]), loop)
    written = json.loads((tmp_path / "run" / "config.json").read_text())["train_loop_config"]
    assert written["0"] == "cat"
    assert written["('a', 'b')"] == 1.0
    assert written["null"] == [1, 2]
    assert written["large"] == "ndarray of shape (200, 200), float64"
    assert (written["set"], written["half"]) == ([3], 0.5)
    assert "cannot be made" in written["broken"]
    metrics = {"inf": math.inf, "nan": math.nan, "huge": 10**400, "text": "a", "none": None, "flag": True}
    folder.add_reports([{"step": 1, "epoch": 0, "metrics": metrics}])
    folder.close()
    (line,) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["metrics"]["inf"] == math.inf


def test_who_waits_for_whom_is_a_sentence() -> None:
    event = {"kind": "waiting", "slots": [1], "waited_s": 6.2, "reason": "worker 0: in step 6; worker 1: after step 5"}
    assert event_line(event) == "somebody has waited for 6.2 s; worker 0: in step 6; worker 1: after step 5"


def test_a_display_on_a_full_disk_is_told_of_once_in_a_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    watch = Monitor("id", RunFolder(StorageContext(str(tmp_path), "run")), full)
    for _ in range(3):
        watch._take_in({}, [], [])
    (record,) = caplog.records
    assert "No space left" in record.getMessage() and record.exc_info is None


def test_a_full_disk_is_refused_and_leaves_no_empty_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("old")

    def full(self: Path, *_: Any, **__: Any) -> None:
        self.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        write_whole(path, "new")
    with pytest.raises(ConfigError, match="the disk is full"):
        check_writable(tmp_path / "runs")
    assert [p.name for p in tmp_path.iterdir()] == ["job.yaml"] and path.read_text() == "old"


def test_an_address_where_nobody_listens_is_refused_at_once() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]  # bound, and not listening
        start = time.monotonic()
        with pytest.raises(ConfigError, match=f"no Ray cluster at 127.0.0.1:{port}"):
            check_address(f"127.0.0.1:{port}")
        assert time.monotonic() - start < 6
    for address in ("local2", "host:", ":6379", "host:99999"):
        with pytest.raises(ConfigError, match="allowed is HOST:PORT, auto or local"):
            check_address(address)


def test_a_run_that_is_terminated_says_no_more_than_it_wants_to(tmp_path: Path) -> None:
    """Ray's handler in C prints stacks and has the process aborted; faulthandler's stands for it here."""
    code = """
import faulthandler, os, signal, sys, types

def init(**options):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(15))
    faulthandler.register(signal.SIGTERM, file=sys.stderr, chain=True)

sys.modules["ray"] = types.SimpleNamespace(init=init, shutdown=lambda: None, is_initialized=lambda: False)
from raytrain_het.jobs.interrupted import Interrupted, interruptible
from raytrain_het.jobs.ray_session import ray_session

try:
    with interruptible(), ray_session("local", num_cpus=1):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
        except SystemExit:
            sys.exit(1)  # As `ray.get` turns it into.
except Interrupted as end:
    print(end.exit_code)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("143\n", "")


def test_an_error_with_json_is_one_object_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--json", "--set", "epohcs=3"]) == 2
    out, err = capsys.readouterr()
    assert json.loads(out)["error"].startswith("--set epohcs=3")
    assert err.startswith("raytrain-het: --set epohcs=3")


def test_a_forgotten_equals_sign_is_guessed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--set", "epochs", "3"]) == 2
    assert "did you mean --set epochs=3?" in capsys.readouterr().err


def test_keys_are_listed_with_defaults_and_meanings(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--keys", str(JOBS / "char_lm.yaml")]) == 0
    out = capsys.readouterr().out
    for part in ("width = 64", "Size of the embeddings.", "het.compression = none", "workers.0.count = 1"):
        assert part in out
    assert "    \n" not in out  # a key without a meaning


def test_waiting_names_how_many_are_there() -> None:
    status = {"generation": 0, "vacant": list(range(3, 16)), "members": [{"slot": i} for i in range(3)]}
    assert waiting_line(status) == "3 of 16 workers are there"
    assert waiting_line(status | {"generation": 1}) is None


def test_large_numbers_are_written_out_and_a_failed_checkpoint_is_a_sentence() -> None:
    assert [number(x) for x in (17568.4, 0.91234, 5)] == ["17568", "0.9123", "5"]
    event = {"seq": 1, "kind": "checkpoint_failed", "slot": 0, "step": 46, "error": "CheckpointError: No space left"}
    assert event_line(event) == "the checkpoint of step 46 is lost: No space left"
    for cause, said in (
        ("[Errno 28] Error writing. Detail: [errno 28] No space left on device.", "no space left on device"),
        ("Permission denied.", "Permission denied"),
    ):
        text = (
            f"Checkpoint c_0 could not be written to '/d/runs': {cause} Checkpoints written before are unharmed. Free"
        )
        lost = event_line(event | {"error": f"CheckpointError: {text} space there, or take a storage."})
        assert lost == f"the checkpoint of step 46 is lost: {said} (/d/runs)"


def test_a_function_that_raised_is_told_in_a_line_and_who_goes_then_is_not() -> None:
    message = "the training function of worker 1 raised:\nTraceback ...\n  raise\nValueError: bad\n"
    events = [
        {"seq": 0, "kind": "raised", "slot": 1, "error": "ValueError: bad", "time": 1.0},
        {"seq": 1, "kind": "failed", "message": message, "time": 1.0},
        {"seq": 2, "kind": "lost", "slot": 0, "reason": "its connection closed", "expected": True, "time": 2.0},
    ]
    assert sentences(events, []) == ["the run fails: the training function of worker 1 raised: ValueError: bad"]


def test_a_trainer_without_a_display_logs_what_happens(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "raytrain_het")
    watch = Monitor("id", RunFolder(StorageContext(str(tmp_path), "run")))
    event = {"seq": 0, "kind": "lost", "slot": 1, "reason": "its connection closed", "time": 7.0}
    more = "; what its codec had left out is lost with it (norm 0.25 of the mean gradient's)"
    assert event_line(event | {"left_out": 0.25}) == f"worker 1 is lost: its connection closed{more}"
    reports = [{"seq": k, "step": 5 + k, "epoch": 0, "metrics": {"loss": 1.0}, "time": 6.0 + 2 * k} for k in range(2)]
    watch._take_in({}, [event], reports)
    lost = "worker 1 is lost: its connection closed"
    assert caplog.messages == ["step 5  epoch 0  loss 1", lost, "step 6  epoch 0  loss 1"]


def test_the_script_of_the_docs_is_complete() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "start.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {"__name__": "start"}
    exec(compile(block, "start.md", "exec"), names)  # imports resolve; training needs Ray
    function = names["train_fn"].__code__
    assert {name for name in function.co_names if name in ("torch", "F", "het", "DataLoader", "TensorDataset")} <= set(
        names
    )


def test_every_kind_of_event_is_a_sentence_or_said_by_another_one() -> None:
    told = {*narration._SENTENCES, *narration._SILENT}
    assert {kind.__struct_config__.tag for kind in all_kinds(events.Event)} - {"gone"} == told


def all_kinds(of: type[events.Event]) -> Iterator[type[events.Event]]:
    for kind in of.__subclasses__():
        yield kind
        yield from all_kinds(kind)
