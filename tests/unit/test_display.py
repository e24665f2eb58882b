"""What a person, or a program, sees of a run."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
import torch
from rich.console import Console

from raytrain_het.jobs.display import JsonDisplay, LiveDisplay, PlainDisplay, Rate, make_display
from raytrain_het.jobs.summary import RUN_KEYS, WORKER_KEYS, size

STATUS = {
    "generation": 2,
    "step": 23,
    "epoch": 1,
    "samples": 1472,
    "state": "running",
    "vacant": [1],
    "members": [{"slot": 0, "device": "cpu", "node_ip": "10.0.0.1", "batch_share": 48, "compute_s": None}],
}
EVENTS = [
    {"seq": 4, "time": 1.0, "kind": "lost", "generation": 2, "step": 23, "slot": 1, "reason": "its connection closed"}
]
REPORTS = [{"key": "a", "time": 2.0, "step": 23, "epoch": 0, "metrics": {"accuracy": 0.91234}, "checkpoint": None}]


def summary() -> dict[str, Any]:
    worker = {
        "world_rank": 0,
        "device": "cpu",
        "node_ip": "10.0.0.1",
        "batch_share": 48,
        "compute_s": 1.5,
        "wait_s": 0.5,
        "bytes_sent": 2048,
        "bytes_received": 0,
        "pid": 17,
    }
    return {
        "metrics": {"accuracy": torch.tensor(0.5), "loss": float("nan")},
        "steps": 23,
        "samples": 1472,
        "throughput_samples_per_s": 100.0,
        "workers": [worker, {**worker, "world_rank": 1}],
        "generations": 3,
    }


def test_json_is_one_object_with_exactly_the_promised_keys() -> None:
    stdout, stderr = io.StringIO(), io.StringIO()
    with make_display(as_json=True, stdout=stdout, stderr=stderr) as display:
        display.say("run folder: runs/a")
        display.on_update(STATUS, EVENTS, REPORTS)
        display.finish(summary(), "runs/a")
    lines = stdout.getvalue().splitlines()
    assert len(lines) == 1
    run = json.loads(lines[0])
    assert tuple(run) == RUN_KEYS
    assert [tuple(worker) for worker in run["workers"]] == [WORKER_KEYS, WORKER_KEYS]
    assert run["metrics"] == {"accuracy": 0.5, "loss": None}
    assert "accuracy 0.9123" in stderr.getvalue()


def test_without_a_terminal_there_is_a_line_per_report_and_event() -> None:
    stream = io.StringIO()
    with make_display(stdout=stream) as display:
        assert isinstance(display, PlainDisplay)
        display.on_update(STATUS, [], [])
        assert stream.getvalue() == ""
        display.on_update(STATUS, EVENTS, REPORTS)
    assert stream.getvalue().splitlines() == [
        "worker 1 is lost: its connection closed",
        "step 23  epoch 0  accuracy 0.9123",
    ]


@pytest.mark.parametrize("kind", [PlainDisplay, LiveDisplay])
def test_the_end_shows_every_worker_the_metrics_and_the_folder(kind: Any) -> None:
    stream = io.StringIO()
    with kind(stream) as display:
        display.on_update(STATUS, EVENTS, REPORTS)
        display.finish(summary(), "runs/a")
    text = stream.getvalue()
    for part in ("share", "received", "10.0.0.1", "2.0 KiB", "accuracy", "1472 samples", "run folder: runs/a"):
        assert part in text


def test_scales_and_speeds_are_shown_while_it_runs_and_at_the_end_in_80_columns() -> None:
    known = {
        "node_ip": "255.255.255.255",
        "device": "cuda:0",
        "score": 12.34,
        "lr_scale": 0.71,
        "batch_share": 65536,
        "compute_s": 12345.6,
        "wait_s": 1234.5,
        "bytes_sent": 1000 * 2**30,
        "bytes_received": 1000 * 2**30,
    }
    status = {
        **STATUS,
        "step": 10**6,
        "samples": 10**9,
        "epoch": 99,
        "fraction_of_aggregate": 0.914,
        "members": [{"slot": 15, **known}],
    }
    console = Console(file=io.StringIO(), width=80)
    console.print(LiveDisplay(io.StringIO()).picture(status))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for part in ("91% of solo speeds", "scale", "0.71", "65536", "12345.6", "1000.0 GiB 1000.0 GiB"):
        assert part in text
    assert "…" not in text
    stream = io.StringIO()
    end = {**summary(), "effective_batch_size": 471.2, "workers": [{"world_rank": 0, **known}]}
    PlainDisplay(stream).finish(end, "runs/a")
    assert "effective batch size 471" in stream.getvalue() and "0.71" in stream.getvalue()


def test_what_was_known_of_a_workers_speed_stays_when_it_has_gone() -> None:
    display = LiveDisplay(io.StringIO())
    known = {"slot": 0, "score": 1.25, "lr_scale": 0.71}
    display.picture({"members": [known]})
    console = Console(file=io.StringIO(), width=80)
    console.print(display.picture({"members": [{"slot": 0, "score": None, "lr_scale": None}]}))
    assert "1.25" in console.file.getvalue() and "0.71" in console.file.getvalue()


def picture(display: LiveDisplay, status: dict[str, Any]) -> str:
    console = Console(file=io.StringIO(), width=80)
    console.print(display.picture(status))
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


def test_at_the_start_seconds_count_and_nobody_is_missing_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("raytrain_het.jobs.display.time.monotonic", lambda: now[0])
    display, plain = LiveDisplay(io.StringIO()), PlainDisplay(io.StringIO())
    now[0] += 12.3
    assert picture(display, {}).strip() == "starting, 12 s"
    now[0] += 1
    waiting = {"generation": 0, "vacant": [0, 1], "members": []}
    assert picture(display, waiting).strip() == "starting, 13 s: 0 of 2 workers are there"
    one = {"generation": 0, "vacant": [1], "members": [{"slot": 0}]}
    joined = {"seq": 0, "kind": "joined", "slot": 0, "device": "cpu", "host": "h"}
    plain.on_update(one, [joined], [])
    assert plain.stream.getvalue().splitlines()[-1] == "starting, 13 s: 1 of 2 workers are there"  # type: ignore[attr-defined]
    begun = {"generation": 1, "state": "running", "vacant": [1], "members": [{"slot": 0, "device": "cpu"}]}
    assert "starting" not in picture(display, begun) and "worker 1 is not there" in picture(display, begun)


def test_a_terminal_gets_the_live_table_and_json_never_does() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    assert isinstance(make_display(stdout=Terminal()), LiveDisplay)
    assert isinstance(make_display(as_json=True, stdout=Terminal()), JsonDisplay)


def test_the_rate_is_over_the_last_seconds() -> None:
    rate = Rate(window_s=10)
    assert rate.of(0, now=0.0) == 0
    assert rate.of(100, now=1.0) == 100
    assert rate.of(100, now=20.0) == pytest.approx(0)


def test_sizes_are_in_powers_of_1024() -> None:
    assert [size(n) for n in (0, 1023, 1024, 3 * 1024**2, 2048 * 1024**3)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "3.0 MiB",
        "2048.0 GiB",
    ]
