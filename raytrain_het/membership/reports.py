"""Reports and evaluations on the hub's side: pure bookkeeping, keyed so that nothing counts twice."""

from __future__ import annotations

import math
import sys
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from raytrain_het.membership.audit import difference

MAX_EVALUATIONS = 16
"""So many of the last evaluations are remembered, for workers that ask late."""

MAX_REPORTS = 1000
"""So many of the last whole reports are remembered; whoever wants them asks every second or so."""

REDUCTIONS = ("mean", "sum", "max", "min")

Order = tuple[int, ...]


def reduce_metrics(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Merge the workers' metrics: means weighted by samples, unless a part's ``reduce`` says otherwise.

    A value that is no number is taken from the first worker. A worker that trained on nothing since its last report has
    weight 0; if all have, they count the same.
    """
    merged: dict[str, Any] = {}
    names = list(dict.fromkeys(name for part in parts for name in part["metrics"]))
    for name in names:
        having = [p for p in parts if name in p["metrics"]]
        values = [p["metrics"][name] for p in having]
        how = next((p["reduce"][name] for p in having if name in p.get("reduce", {})), "mean")
        if not all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
            merged[name] = values[0]
        elif how == "sum":
            merged[name] = math.fsum(values)
        elif how in ("max", "min"):
            merged[name] = (max if how == "max" else min)(values)
        else:
            weights = [p["samples"] for p in having]
            if sum(weights) == 0:
                weights = [1] * len(values)
            pairs = [(w, v) for w, v in zip(weights, values, strict=True) if w]
            same = len({v for _, v in pairs}) == 1
            merged[name] = pairs[0][1] if same else math.fsum(w * v for w, v in pairs) / sum(w for w, _ in pairs)
    return merged


def add_up(parts: list[dict[str, Any]]) -> dict[str, float]:
    """What all have done since the report before: samples and bytes are added up, the rest is told by who has done the
    most steps. A worker that was lost meanwhile has told nothing."""
    told = [part["since_last"] for part in parts if "since_last" in part]
    if not told:
        return {}
    summed = {name: sum(part[name] for part in told) for name in ("samples", "bytes_sent")}
    return {**max(told, key=lambda part: part["steps"]), **summed}


@dataclass
class _Report:
    step: int
    epoch: int
    parts: dict[int, dict[str, Any]] = field(default_factory=dict)
    checkpoint_wanted: bool = True
    checkpoint: str | None = None
    checkpoint_error: str | None = None
    files: dict[int, str] = field(default_factory=dict)
    taken: bool = False


class ReportBook:
    """Collects every worker's part of each report until it is whole.

    A report is whole when each current member has given its part, or has gone past it, or is no longer there; and when
    its checkpoint is stored, or has failed.
    """

    def __init__(self, first_seq: int = 0) -> None:
        self._next_seq = first_seq
        self._open: dict[str, _Report] = {}
        self._done: deque[dict[str, Any]] = deque(maxlen=MAX_REPORTS)
        self._unacknowledged: dict[str, dict[str, Any]] = {}
        self._acknowledged: dict[str, None] = {}
        self._last_order: dict[int, Order] = {}

    def part(self, slot: int, message: dict[str, Any]) -> str | None:
        """A worker's part. Returns the key if it was acknowledged long ago (so that the worker is told again)."""
        key = message["key"]
        if key in self._acknowledged:
            return key
        if key in self._unacknowledged:
            return None
        report = self._open.setdefault(key, _Report(step=message["step"], epoch=message["epoch"]))
        report.parts[slot] = message
        report.checkpoint_wanted = bool(message["checkpoint"])
        self._last_order[slot] = _order(key)
        return None

    def checkpoint_stored(self, key: str, path: str | None, error: str | None) -> None:
        """The writer has stored the checkpoint of a report, or failed to."""
        report = self._open.get(key)
        if report is not None and report.checkpoint is None:
            report.checkpoint, report.checkpoint_error = path, error

    def uids(self, key: str) -> list[str]:
        """The members that have given their part: they hold a state of their own for the checkpoint."""
        return [part["uid"] for part in self._open[key].parts.values()]

    def writer_wanted(self, slots: list[int]) -> dict[str, int]:
        """For each report that waits for its checkpoint only: the slot that should write it."""
        wanted = {}
        for key, report in self._open.items():
            if self._missing(key, slots):
                continue
            if report.checkpoint_wanted and report.checkpoint is None and report.checkpoint_error is None:
                writers = sorted(s for s, part in report.parts.items() if s in slots and part.get("holds_snapshot"))
                if writers:
                    wanted[key] = writers[0]
        return wanted

    def waiting_for_storage(self, slot: int) -> set[str]:
        """Open reports whose checkpoint a slot holds a snapshot of."""
        return {key for key, report in self._open.items() if report.parts.get(slot, {}).get("holds_snapshot")}

    def are_open(self, keys: Iterable[str]) -> bool:
        """Whether any of these reports is not whole yet."""
        return any(key in self._open for key in keys)

    def settle(self, slots: list[int], *, ended: bool = False) -> list[dict[str, Any]]:
        """Reports that have become whole, given the slots of the current members; oldest first."""
        ready = []
        for key in sorted(self._open, key=_order):
            report = self._open[key]
            if self._missing(key, slots) and not ended:
                break
            waiting = report.checkpoint_wanted and report.checkpoint is None and report.checkpoint_error is None
            if waiting and any(s in slots and p.get("holds_snapshot") for s, p in report.parts.items()):
                break
            del self._open[key]
            audits = {slot: part["audit"] for slot, part in report.parts.items() if "audit" in part}
            if len(audits) > 1 and (what := difference(audits)) is not None:
                ready.append({"step": report.step, "differs": what})
                continue  # It is told to nobody: its checkpoint is not a good one.
            parts = [report.parts[s] for s in sorted(report.parts)]
            entry = {
                "seq": self._next_seq, "key": key, "step": report.step, "epoch": report.epoch,
                "metrics": reduce_metrics(parts), "since_last": add_up(parts), "lr": parts[0].get("lr"),
                "checkpoint": report.checkpoint, "checkpoint_error": report.checkpoint_error,
                "num_workers": len(parts),
            }  # fmt: skip
            if waiting:
                entry["checkpoint_error"] = "every worker that held the snapshot was lost before it was stored"
            self._next_seq += 1
            self._done.append(entry)
            self._unacknowledged[key] = entry
            ready.append(entry)
        return ready

    def _missing(self, key: str, slots: list[int]) -> list[int]:
        """Current members that have neither given their part nor gone past it."""
        parts = self._open[key].parts
        return [s for s in slots if s not in parts and self._last_order.get(s, ()) < _order(key)]

    def forget(self, slot: int) -> None:
        """A slot's process is gone, with the snapshots it held; a new one in its place starts from nothing."""
        self._last_order.pop(slot, None)
        for report in self._open.values():
            if slot in report.parts:
                report.parts[slot] = report.parts[slot] | {"holds_snapshot": False}

    def joined(self, slot: int, life: int, step: int) -> None:
        """A slot's process takes part from after this step: nothing is to be expected of it for reports up to there."""
        self._last_order[slot] = max(self._last_order.get(slot, ()), (life, step, sys.maxsize))

    def untaken(self) -> list[dict[str, Any]]:
        """Whole reports that nobody has acknowledged, oldest first."""
        return list(self._unacknowledged.values())

    def acknowledge(self, keys: list[str]) -> None:
        """The reports are in the hands of whoever asked for them."""
        for key in keys:
            if self._unacknowledged.pop(key, None) is not None:
                self._acknowledged[key] = None
        for key in list(self._acknowledged)[:-MAX_REPORTS]:
            del self._acknowledged[key]

    def since(self, seq: int) -> list[dict[str, Any]]:
        """All whole reports from a sequence number on."""
        return [r for r in self._done if r["seq"] >= seq]


def _order(key: str) -> Order:
    """(life, step, ordinal) of a key."""
    return tuple(map(int, key.split(".")))


class EvaluationBook:
    """Hands the chunks of an evaluation out to whoever is free, and adds up the results exactly.

    A chunk given to a worker that dies is given out again. Sums are taken over chunks in their order with
    ``math.fsum``, so the result depends neither on who computed what nor on when.
    """

    def __init__(self) -> None:
        self._runs: dict[str, dict[str, Any]] = {}

    def next(self, key: str, num_chunks: int, uid: str, result: list[Any] | None) -> dict[str, Any]:
        """Take a finished chunk's result and give the next: ``{"chunk": i}``, ``{"wait": True}`` or ``{"sums":
        ...}``."""
        if key not in self._runs:
            for old in list(self._runs)[: -MAX_EVALUATIONS + 1]:
                del self._runs[old]
        run = self._runs.setdefault(key, {"results": {}, "given": {}, "num_chunks": num_chunks})
        if result is not None:
            chunk, sums = result
            run["results"].setdefault(chunk, sums)
        self.forget(uid)  # Whoever asks is at no chunk any more, even if an answer to it was lost.
        if len(run["results"]) >= run["num_chunks"]:
            names = list(dict.fromkeys(n for c in range(run["num_chunks"]) for n in run["results"][c]))
            chunks = [run["results"][c] for c in range(run["num_chunks"])]
            return {"sums": {n: math.fsum(c.get(n, 0.0) for c in chunks) for n in names}}
        for chunk in range(run["num_chunks"]):
            if chunk not in run["results"] and chunk not in run["given"]:
                run["given"][chunk] = uid
                return {"chunk": chunk}
        return {"wait": True}

    def forget(self, uid: str) -> None:
        """A worker is at nothing, or gone: its chunks are free again."""
        for run in self._runs.values():
            run["given"] = {c: u for c, u in run["given"].items() if u != uid}
