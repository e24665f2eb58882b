"""A run in sentences: events and reports, as the log and the command line print them."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

logger = logging.getLogger("raytrain_het")


_NOT_WRITTEN = re.compile(
    r"Checkpoint \S+ could not be written to '(?P<place>[^']*)': (?P<cause>.*?)\.? Checkpoints written before",
    re.DOTALL,
)


def number(value: Any) -> str:
    """A value for people: a number with four digits and without an exponent below 1e15, anything else as it is."""
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int):
        return str(value)
    return f"{value:.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:.4g}"


def report_line(report: Mapping[str, Any]) -> str:
    """``step 23  epoch 0  accuracy 0.9  lr 0.05``."""
    said = dict(report["metrics"])
    if report.get("lr") is not None:
        said.setdefault("lr", report["lr"])
    metrics = "  ".join(f"{name} {number(value)}" for name, value in said.items())
    return f"step {report['step']}  epoch {report['epoch']}  {metrics}"


def _without_class(error: str) -> str:
    """``CheckpointError: text`` as ``text``."""
    name, _, text = error.partition(": ")
    return text if text and name.isidentifier() else error


def _cause(error: str) -> str:
    """Why a checkpoint could not be written, in short. The whole message is the same each time, and in events.jsonl."""
    text = _without_class(error)
    found = _NOT_WRITTEN.match(text)
    if found is None:
        return text
    full = "no space left on device" in text.lower()
    return f"{'no space left on device' if full else found['cause']} ({found['place']})"


def _in_a_line(message: str) -> str:
    """A message without its traceback: the first line, and the error."""
    first, *rest = message.strip().splitlines()
    return f"{first} {rest[-1]}" if rest else first


def _gone_with_it(event: Mapping[str, Any]) -> str:
    if "left_out" not in event:
        return ""
    return f"; what its codec had left out is lost with it (norm {number(event['left_out'])} of the mean gradient's)"


_SENTENCES: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "joined": lambda e: f"worker {e['slot']} is there ({e['device']} on {e['host']})",
    "lost": lambda e: f"worker {e['slot']} is lost: {e['reason']}{_gone_with_it(e)}",
    "evicted": lambda e: f"worker {e['slot']} is dropped: {e['reason']}{_gone_with_it(e)}",
    "suspended": lambda e: f"worker {e['slot']} does not answer, and the others go on without it: {e['reason']}",
    "came_back": lambda e: (
        f"worker {e['slot']} is heard again after {e['away_s']:.1f} s" + (", and catches up" if e["missed"] else "")
    ),
    "draining": lambda e: f"worker {e['slot']} leaves in good order: {e['reason']}",
    "handed_on": lambda e: (
        f"worker {e['slot']} sends what worker {e['by']} has left out of its gradients (norm {number(e['norm'])})"
    ),
    "left": lambda e: f"worker {e['slot']} has left after step {e['step']}",
    "finished": lambda e: f"worker {e['slot']} has finished at step {e['step']}",
    "healed": lambda e: f"worker {e['slot']} has caught up at step {e['step']} by {e['by']}",
    "vacant": lambda e: (
        f"worker {e['slot']} is not there, and nobody comes for its place yet: {e['reason']}"
        if e.get("generation", 1)
        else f"worker {e['slot']} has not started yet: {e['reason']}"
    ),
    "given_up": lambda e: f"worker {e['slot']} is given up: {e['reason']}",
    "checkpoint_failed": lambda e: f"the checkpoint of step {e['step']} is lost: {_cause(e['error'])}",
    "table": lambda e: (
        f"table {e['version']}: shares {', '.join(str(b) for _, b in sorted(e['shares'].items()))}"
        + (f", codecs {', '.join(word for _, word in sorted(e['codecs'].items()))}" if e.get("codecs") else "")
        + f" ({e['reason']})"
    ),
    "empty": lambda e: "no worker is left; the next ones begin from the last checkpoint",
    "recovered": lambda e: f"a restarted hub goes on with generation {e['number']}",
    "skipped": lambda e: (
        f"the update of step {e['step']} is skipped: gradients are not finite, those of "
        f"{', '.join(e['parameters'])} among them"
    ),
    "drift": lambda e: (
        f"after step {e['step']} parameters of unlike devices differed by {number(e['largest_difference'])} at most, "
        "and were sent anew"
    ),
    "warning": lambda e: e["text"],
    "compared": lambda e: (
        f"step {e['step'] + 1}: the mean gradient is that of one process with the whole batch, but for a part of "
        f"{number(e['error'])}"
        + (f", most in {e['parameter']}; {e['explained_by']} makes a difference" if e["explained_by"] else "")
    ),
    "waiting": lambda e: f"somebody has waited for {number(e['waited_s'])} s; {e['reason']}",
    "failed": lambda e: f"the run fails: {_in_a_line(e['message'])}",
    "table_kept": lambda e: f"shares and scores stay as they are: {e['reason']}",
    "formed": lambda e: (
        f"generation {e['number']} from step {e['base']}: workers {', '.join(map(str, e['slots']))}"
        + (f", of which {', '.join(map(str, e['unhealed']))} catch up" if e["unhealed"] else "")
        + f" ({e['reason']})"
    ),
}
_SILENT = ("void", "wanted", "raised")
"""Events that are not printed: the formed generation, or the run's failure, says the same."""


def event_line(event: Mapping[str, Any]) -> str | None:
    """A membership event as a sentence; None if another event says the same."""
    if event["kind"] in _SILENT or event.get("expected"):
        return None
    try:
        return _SENTENCES[event["kind"]](event)
    except KeyError:
        rest = {k: v for k, v in event.items() if k not in ("seq", "time", "kind", "generation", "uid")}
        if "slot" in rest:
            rest = {"worker": rest.pop("slot"), **rest}
        return f"{event['kind']}: " + ", ".join(f"{name} {value}" for name, value in rest.items())


def sentences(events: Sequence[Mapping[str, Any]], reports: Sequence[Mapping[str, Any]]) -> list[str]:
    """Events and reports as sentences, in order of time."""
    lines = [(event.get("time", 0.0), event_line(event)) for event in events]
    lines += [(report.get("time", 0.0), report_line(report)) for report in reports]
    return [line for _, line in sorted(lines, key=lambda timed: timed[0]) if line is not None]


def log_update(events: Sequence[Mapping[str, Any]], reports: Sequence[Mapping[str, Any]]) -> None:
    """Log events and reports as sentences, at INFO. A program with a display leaves the logger at WARNING."""
    for line in sentences(events, reports):
        logger.info(line)


def show_log() -> None:
    """Let the logger's INFO lines reach stderr, unless the program has set up logging itself."""
    if not logger.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s", "%H:%M:%S"))
        logger.addHandler(handler)
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
