"""A small training whose result shows every sample that was lost, used twice or weighted wrongly.

It stays finite and has no dropout. :meth:`Regression.plain` does the same with torch alone in one process, and the two
results are compared.
"""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import raytrain_het as het
from raytrain_het.config import HetConfig
from raytrain_het.membership.cursor import Cursor
from raytrain_het.worker import session as sessions
from raytrain_het.worker.data.data_plan import DataPlan
from raytrain_het.worker.step.step_record import StepRecord

SMALL_BUCKETS = HetConfig(bucket_mib=0.0002, shares=None)
"""Settings with several buckets even for a model of this size: a fault may come between two of them."""


@dataclass(frozen=True, kw_only=True)
class Regression:
    """A training function; call it with a lab's directory, or :meth:`plain` for the same without raytrain_het."""

    num_samples: int = 120
    global_batch_size: int = 12
    epochs: int = 4
    drop_last: bool = False
    dtype: torch.dtype = torch.float64
    lr: float = 0.05
    momentum: float = 0.9
    batch_norm: bool = False
    clip: float | None = None
    """The training function clips gradients to this norm, between ``backward()`` and ``step()``."""
    scheduled: bool = False
    """Whether a registered scheduler lowers the rate after every step."""
    nan_steps: tuple[int, ...] = ()
    """Steps (0 is the first) in which the loss of ``nan_slot`` is not a number."""
    nan_slot: int = 1
    """A slot whose worker is there in those steps, whatever happens to others."""
    report: bool = True
    micro_batch_size: int | None = None
    pace_s: float = 0.0
    """Each step takes at least so long."""
    patience_s: float = 0.0
    """A step pauses for so long while a slot is not filled: the slot's next worker comes before the end of the run."""
    waits_at: tuple[int, ...] = ()
    """No worker begins these steps (0 is the first) before :func:`go_on` has named them. So what the lab does at a step
    happens before the end of the run, even if the lab is late."""

    @property
    def plan(self) -> DataPlan:
        """The run's order of samples."""
        return DataPlan(
            dataset_size=self.num_samples,
            global_batch_size=self.global_batch_size,
            shuffle=True,
            drop_last=self.drop_last,
            seed=0,
        )

    @property
    def num_steps(self) -> int:
        """Steps of the whole run."""
        return self.epochs * self.plan.steps_per_epoch

    def build(self) -> tuple[torch.nn.Module, TensorDataset]:
        """The model and the data, the same in every process."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(self.num_samples, 6, dtype=torch.float64, generator=generator)
        y = torch.sin(x @ torch.randn(6, 2, dtype=torch.float64, generator=generator))
        with torch.random.fork_rng():
            torch.manual_seed(0)
            middle = [torch.nn.BatchNorm1d(8)] if self.batch_norm else []
            model = torch.nn.Sequential(torch.nn.Linear(6, 8), *middle, torch.nn.Tanh(), torch.nn.Linear(8, 2))
        return model.to(self.dtype), TensorDataset(x.to(self.dtype), y.to(self.dtype))

    def __call__(self, directory: str) -> dict[str, Any]:
        """Train as a worker. Returns ``parameters`` and ``buffers`` (flat), and ``rates``: pairs (step, learning
        rate)."""
        session = sessions.current()
        trace_steps(session, directory)
        model, dataset = self.build()
        model = het.prepare_model(model)
        optimizer = het.prepare_optimizer(torch.optim.SGD(model.parameters(), lr=self.lr, momentum=self.momentum))
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.97) if self.scheduled else None
        if scheduler is not None:
            het.register_state("scheduler", scheduler)
        loader = het.prepare_data_loader(
            DataLoader(dataset, shuffle=True, drop_last=self.drop_last),
            global_batch_size=self.global_batch_size,
            micro_batch_size=self.micro_batch_size,
        )
        rates: list[tuple[int, float]] = []
        session.listeners.append(lambda note: rates.append((note.step, optimizer.param_groups[0]["lr"])))
        loss = torch.zeros(())
        for _ in loader.epochs(self.epochs):
            for x, y in loader:
                self._wait_for_the_lab(session, directory)
                time.sleep(max(self.pace_s, self.patience_s if het.num_participants() < session.num_slots else 0.0))
                loss = F.mse_loss(model(x), y)
                if session.slot == self.nan_slot and self._step(session) in self.nan_steps:
                    loss = loss * math.nan
                optimizer.zero_grad()
                loss.backward()
                self._update(model, optimizer, scheduler)
            if self.report:
                het.report({"loss": loss.item()})
        return {"parameters": flat(model.parameters()), "buffers": flat(model.buffers()), "rates": rates}

    @staticmethod
    def _step(session: sessions.Session) -> int | None:
        return session.worker.engine.cursor.step if session.worker is not None else None

    def plain(self) -> torch.Tensor:
        """The parameters (flat) after the same training with torch alone, each global batch in one piece."""
        model, dataset = self.build()
        optimizer = torch.optim.SGD(model.parameters(), lr=self.lr, momentum=self.momentum)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.97) if self.scheduled else None
        plan, cursor = self.plan, Cursor()
        while cursor.epoch < self.epochs:
            batch = plan.batch_at(cursor)
            x, y = dataset[torch.from_numpy(plan.permutation(cursor.epoch)[batch.start : batch.stop].copy())]
            optimizer.zero_grad()
            F.mse_loss(model(x), y).backward()
            if cursor.step not in self.nan_steps:
                self._update(model, optimizer, scheduler)
            cursor = plan.advance(cursor)
            if plan.is_epoch_end(cursor):
                cursor = plan.next_epoch(cursor)
        return flat(model.parameters())

    def _wait_for_the_lab(self, session: sessions.Session, directory: str) -> None:
        if session.worker is not None and (step := session.worker.engine.cursor.step) in self.waits_at:
            while not _mark(directory, step).exists():
                time.sleep(0.002)

    def _update(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
        if self.clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), self.clip)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def go_on(directory: str | os.PathLike[str], step: int) -> None:
    """Let all workers begin a step that :attr:`Regression.waits_at` names."""
    _mark(directory, step).touch()


def _mark(directory: str | os.PathLike[str], step: int) -> Path:
    return Path(directory) / f"go_on_{step}"


def flat(tensors: Any) -> torch.Tensor:
    """All tensors as one, in fp64."""
    return torch.cat([torch.zeros(0, dtype=torch.float64), *(t.detach().double().flatten() for t in tensors)])


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, relative to the largest expected value."""
    return float((got - expected).abs().max() / expected.abs().max())


def trace_steps(session: sessions.Session, directory: str) -> None:
    """Note every committed step of this process, with the bits of its replica, for :func:`differing_replicas`."""
    path = Path(directory) / f"{session.slot}_{os.getpid()}.trace"
    file = open(path, "ab", buffering=0)  # noqa: SIM115 - it stays open as long as the process lives

    def note_step(note: StepRecord) -> None:
        model = session.joined().replica.model
        bits = [float(b.double().sum()).hex() for b in model.buffers()]
        line = [note.step, note.generation, note.uid, [note.digest(), *bits], time.time()]
        file.write(json.dumps(line).encode() + b"\n")

    session.listeners.append(note_step)


def traces(directory: str | os.PathLike[str]) -> list[tuple[int, int, str, list[Any], float]]:
    """All notes of a run: (step, generation, uid, bits, time)."""
    lines = []
    for path in Path(directory).glob("*.trace"):
        lines += [tuple(json.loads(line)) for line in path.read_text().splitlines()]
    return sorted(lines)


def differing_replicas(directory: str | os.PathLike[str]) -> list[int]:
    """Steps after which the members' replicas were not identical to the bit, in the generation that counts."""
    seen: dict[int, dict[int, set[str]]] = {}
    for step, generation, _, bits, _ in traces(directory):
        seen.setdefault(step, {}).setdefault(generation, set()).add(repr(bits))
    return [step for step, generations in sorted(seen.items()) if len(generations[max(generations)]) > 1]
