"""What a person sees during a run. The driver draws it: progress bars of several workers would garble each other."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import IO, Any, Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live

from raytrain_het.jobs.lines import Sentence, print_tables, print_text, wrapped
from raytrain_het.jobs.summary import final_tables, to_json, worker_table
from raytrain_het.ray_train.narration import event_line, number, report_line, sentences

Status = Mapping[str, Any]
Records = Sequence[Mapping[str, Any]]


class Display(Protocol):
    """A context manager that shows what the driver learns of a run, and its summary at the end."""

    def __enter__(self) -> Display: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def say(self, line: str) -> None:
        """Show a line, such as where the run's folder is."""

    def on_update(self, status: Status, events: Records, reports: Records) -> None:
        """Show the membership actor's status, and the events and reports since the last call."""

    def finish(self, summary: Mapping[str, Any], folder: str) -> None:
        """Show the summary of a run that succeeded."""

    def end_at_once(self, summary: Mapping[str, Any], line: str) -> None:
        """Show that the run had nothing left to do."""


def make_display(*, as_json: bool = False, stdout: IO[str] | None = None, stderr: IO[str] | None = None) -> Display:
    """The display that suits the reader.

    A live table if stdout is a terminal, plain lines if it is not. With ``as_json`` stdout gets one
    JSON object at the end and nothing else; progress goes to stderr.
    """
    stdout, stderr = stdout or sys.stdout, stderr or sys.stderr
    if as_json:
        return JsonDisplay(progress=stderr, result=stdout)
    return LiveDisplay(stdout) if stdout.isatty() else PlainDisplay(stdout)


class PlainDisplay:
    """A line per report and per membership event."""

    def __init__(self, stream: IO[str]) -> None:
        self.stream = stream
        self.began = time.monotonic()

    def __enter__(self) -> Display:
        self.began = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stream.flush()

    def say(self, line: str) -> None:
        print_text(line, self.stream)

    def on_update(self, status: Status, events: Records, reports: Records) -> None:
        for line in sentences(events, reports):
            self.say(line)
        if any(event["kind"] == "joined" for event in events):
            self.say_if_waiting(status)

    def say_if_waiting(self, status: Status) -> None:
        waiting = waiting_line(status)
        if waiting is not None:
            self.say(f"{starting_line(time.monotonic() - self.began)}: {waiting}")

    def finish(self, summary: Mapping[str, Any], folder: str) -> None:
        print_tables(final_tables(summary, folder), self.stream)

    def end_at_once(self, summary: Mapping[str, Any], line: str) -> None:
        self.say(line)


class JsonDisplay(PlainDisplay):
    """Progress as plain lines on one stream, the result as one JSON object on another."""

    def __init__(self, *, progress: IO[str], result: IO[str]) -> None:
        super().__init__(progress)
        self.result = result

    def finish(self, summary: Mapping[str, Any], folder: str) -> None:
        print(to_json(summary), file=self.result, flush=True)

    def end_at_once(self, summary: Mapping[str, Any], line: str) -> None:
        self.say(line)
        self.finish(summary, "")


class LiveDisplay:
    """A table that is redrawn in place, with the reports scrolling by above it."""

    def __init__(self, stream: IO[str], *, num_events: int = 5) -> None:
        self.stream, self.console = stream, Console(file=stream, highlight=False)
        self.began = time.monotonic()
        self.status: Status = {}
        self.events: deque[str] = deque(maxlen=num_events)
        self.rate = Rate()
        self.speeds: dict[int, dict[str, Any]] = {}
        """By slot, the last known speeds. They stay when a worker is gone."""
        self.live = Live(console=self.console, refresh_per_second=4, transient=True, get_renderable=self.picture)

    def __enter__(self) -> Display:
        self.began = time.monotonic()
        self.live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.live.__exit__(kind, error, trace)

    def say(self, line: str) -> None:
        for part in wrapped(line, self.console.width):
            self.console.print(part, markup=False, soft_wrap=True)

    def on_update(self, status: Status, events: Records, reports: Records) -> None:
        for report in reports:
            self.say(report_line(report))
        self.events.extend(filter(None, map(event_line, events)))
        self.status = status
        self.rate.of(status.get("samples", 0))

    def picture(self, status: Status | None = None) -> RenderableType:
        """The table, drawn several times a second; the seconds in it count on while nothing else happens."""
        status = self.status if status is None else status
        waiting = waiting_line(status)
        if waiting is not None or not (status.get("members") or status.get("generation")):
            starting = starting_line(time.monotonic() - self.began)
            return Group(*map(Sentence, [f"{starting}: {waiting}" if waiting else starting, *self.events]))
        rate = self.rate.of(status.get("samples", 0))
        heading = (
            f"{status.get('state', 'starting')}: step {status.get('step', 0)}, epoch {status.get('epoch', 0)}, "
            f"{number(round(rate))} samples/s{_together(status)}, generation {status.get('generation', 0)}"
        )
        members = []
        for member in status.get("members", ()):
            speeds = self.speeds.setdefault(member["slot"], {})
            speeds |= {key: member[key] for key in ("score", "lr_scale") if member.get(key) is not None}
            members.append({**member, **speeds, "world_rank": member["slot"]})
        vacant = [f"worker {slot} is not there" for slot in status.get("vacant", ())]
        return Group(Sentence(heading), worker_table(members), *map(Sentence, [*vacant, *self.events]))

    def finish(self, summary: Mapping[str, Any], folder: str) -> None:
        self.live.stop()
        print_tables(final_tables(summary, folder), self.stream)

    def end_at_once(self, summary: Mapping[str, Any], line: str) -> None:
        self.live.stop()
        self.say(line)


def starting_line(seconds: float) -> str:
    """``starting, 12 s``."""
    return f"starting, {seconds:.0f} s"


def waiting_line(status: Status) -> str | None:
    """``3 of 16 workers are there``; None once training has begun."""
    missing = len(status.get("vacant", ()))
    if not missing or status.get("generation", 0):
        return None
    there = sum(bool(member.get("alive", True)) for member in status.get("members", ()))
    return f"{there} of {there + missing} workers are there"


def _together(status: Status) -> str:
    fraction = status.get("fraction_of_aggregate")
    return "" if fraction is None else f", {fraction:.0%} of solo speeds"


class Rate:
    """Samples per second over the last few seconds of a counter that only grows."""

    def __init__(self, window_s: float = 10.0) -> None:
        self.window_s = window_s
        self.seen: deque[tuple[float, float]] = deque()

    def of(self, count: float, now: float | None = None) -> float:
        """The rate when the counter stands at ``count``, at time ``now``."""
        now = time.monotonic() if now is None else now
        self.seen.append((now, count))
        while len(self.seen) > 2 and now - self.seen[0][0] > self.window_s:
            self.seen.popleft()
        (start, first), (end, last) = self.seen[0], self.seen[-1]
        return (last - first) / (end - start) if end > start else 0.0
