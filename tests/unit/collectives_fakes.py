"""Process groups without processes: all ranks of a group in one test, each with its real :class:`Reducer`."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch

from raytrain_het.allreduce.error_feedback import ErrorFeedback
from raytrain_het.allreduce.header import Header
from raytrain_het.allreduce.layout import Layout
from raytrain_het.allreduce.reducers import Reducer, ReducerByEpoch, reducer_for
from raytrain_het.allreduce.step_summary import StepSummary, SummarySoFar
from raytrain_het.allreduce.transport.group import PeerBuffers
from raytrain_het.membership.cursor import Cursor
from raytrain_het.membership.record import Member, Record


def record_of(
    shares: list[float], owners: list[float] | None = None, codec: str = "none", hosts: str | None = None, **values: Any
) -> Record:
    """A generation with a member for each share; with ``hosts`` (a letter for each member) a hierarchical one."""
    members = tuple(
        Member(uid=f"{k}-a", slot=10 + k, host=hosts[k] if hosts else "h", state_port=1, device="cpu")
        for k in range(len(shares))
    )
    values.setdefault("hierarchy", hosts is not None)
    return Record(
        **{
            "number": 3,
            "incarnation": 1,
            "group": "g",
            "members": members,
            "shares": tuple(shares),
            "gradient_weights": (1.0,) * len(shares),
            "normalised": True,
            "table": 0,
            "owners": tuple(owners or [1.0] * len(shares)),
            "codecs": (codec,) * len(shares),
            "cursor": Cursor(step=4),
            "source": "0-a",
            "behind": (),
            "unhealed": (),
            "fresh": (),
            "reset": False,
            "checkpoint": None,
            "backend": "tcp",
            "reason": "a test",
        }
        | values
    )


class FakeGroup:
    """One rank's end; :meth:`Wire.carry` moves the bytes once all ranks have launched."""

    def __init__(self, wire: Wire, rank: int, size: int) -> None:
        self.wire, self.rank, self.size, self.device = wire, rank, size, torch.device("cpu")
        self.key, self.poll_s = "g", None

    def expect(self, out: PeerBuffers) -> None:
        pass

    def all_to_all(self, out: PeerBuffers, inp: PeerBuffers, expected: None = None, *, flush: bool = True) -> None:
        assert out.buffer.numel() == sum(out.lengths)
        assert inp.in_a_row().numel() == sum(inp.lengths)
        self.wire.launched[self.rank] = (out, inp)


class Wire:
    """What connects them. Like TCP groups, it accepts no message of another length than expected."""

    def __init__(self, size: int) -> None:
        self.groups = [FakeGroup(self, rank, size) for rank in range(size)]
        self.launched: dict[int, tuple[PeerBuffers, PeerBuffers]] = {}

    def carry(self) -> None:
        size = len(self.groups)
        assert sorted(self.launched) == list(range(size)), "every rank takes part in every operation"
        for receiver in range(size):
            out, _ = self.launched[receiver]
            parts = []
            for sender in range(size):
                _, inp = self.launched[sender]
                parts.append(inp.in_a_row().split(inp.lengths)[receiver])
                assert parts[-1].numel() == out.lengths[sender], "a message of an unexpected length is an error"
            out.buffer.copy_(torch.cat(parts))
        self.launched.clear()


class Reduction:
    """A whole step's all-reduce of N ranks."""

    def __init__(self, record: Record, layout: Layout, states: list[ErrorFeedback] | None = None) -> None:
        self.record, self.layout = record, layout
        self.wire = Wire(len(record.members))
        self._states = states or [ErrorFeedback(layout) for _ in record.members]
        self._by_epoch = [
            ReducerByEpoch(record, functools.partial(self._reducer, rank)) for rank in range(len(record.members))
        ]

    def _reducer(self, rank: int, epoch: int) -> Reducer:
        group: Any = self.wire.groups[rank]
        return reducer_for(self.record, rank, self.layout, group, self._states[rank], epoch=epoch)

    @property
    def reducers(self) -> list[Reducer]:
        """By rank, those of the last step."""
        return [reducers.current for reducers in self._by_epoch]

    def open(self, epoch: int) -> None:
        """The next step is of this epoch."""
        for reducers in self._by_epoch:
            reducers.open(epoch)

    def run(
        self,
        gradients: list[torch.Tensor | None],
        weights: list[float],
        *,
        at: int = 5,
        num_samples: int | None = None,
        used_bits: list[int] | None = None,
        **headers: list[Any],
    ) -> tuple[list[list[torch.Tensor]], list[StepSummary]]:
        """Reduce ``gradients`` (by rank, all buckets flat, already weighted); returns outs and sums by rank."""
        size = len(weights)
        summary = [SummarySoFar(step=at) for _ in range(size)]
        outs: list[list[torch.Tensor]] = [[] for _ in range(size)]
        place = 0
        for reducer in self.reducers:
            reducer.expect_step()
        for bucket in self.layout.buckets:
            under_way = []
            for rank, reducer in enumerate(self.reducers):
                values = {"want": 3, "digest": 0, "used": 2 ** len(bucket.segments) - 1}
                if used_bits is not None:
                    values["used"] = used_bits[bucket.index]
                values |= {name: by_rank[rank] for name, by_rank in headers.items()}
                if not values.pop("finite", True):
                    values["nonfinite"] = 1 << rank
                header = Header(
                    step=values.pop("step", at),
                    generation=3,
                    bucket=bucket.index,
                    weight=weights[rank],
                    contributes=values.pop("contributes", weights[rank] > 0),
                    **values,
                )
                gradient = gradients[rank]
                part = None if gradient is None else gradient[place : place + bucket.numel]
                samples = num_samples or max(1, round(sum(weights)))
                outs[rank].append(torch.full((bucket.numel,), torch.nan, dtype=bucket.dtype))
                expected = reducer.feedback.expected_weight(samples)
                under_way.append(
                    reducer.all_reduce(bucket, header, part, outs[rank][-1], summary[rank], expected_weight=expected)
                )
            while True:
                launched = [_advance(operations) for operations in under_way]
                assert len(set(launched)) == 1, "all take part in the same operations"
                if not launched[0]:
                    break
                self.wire.carry()
            place += bucket.numel
        self.summary = [so_far.all() for so_far in summary]
        for reducer, seen in zip(self.reducers, self.summary, strict=True):
            reducer.feedback.observe_weight(seen.total_weight, num_samples or max(1, round(sum(weights))))
        return outs, self.summary

    def commit(self) -> None:
        """What was run last is committed by all."""
        for reducer, summary in zip(self.reducers, self.summary, strict=True):
            reducer.feedback.commit(summary.step, summary.total_weight, summary.used)


def _advance(operations: Iterator[Any]) -> bool:
    """Whether another operation was launched."""
    try:
        next(operations)
    except StopIteration:
        return False
    return True
