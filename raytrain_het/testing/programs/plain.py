"""The reference: a stand-in for raytrain_het that does the same with torch alone, in one process, on whole batches.

Where what is computed depends on the passes (``Program.by_pass``: batch norm's statistics, for one) it makes the passes
that the workers made, one after the other: from each the gradient and the changes of buffers are kept, and their
weighted mean is what the step applies. The body of the loop then runs once for each pass, as it does in the workers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler, default_collate

from raytrain_het.balance.batch_shares import apportion
from raytrain_het.config import HetConfig
from raytrain_het.membership.cursor import Cursor
from raytrain_het.testing.programs.passes import ReferencePasses
from raytrain_het.testing.programs.program import Program
from raytrain_het.testing.programs.traces import Outcome, StepNote, bits_of, state_of
from raytrain_het.worker.data.data_plan import DataPlan, micro_batches
from raytrain_het.worker.data.sample_source import SampleSource
from raytrain_het.worker.step.clipping import Clipping
from raytrain_het.worker.step.rates import Rates


@dataclass(frozen=True, kw_only=True)
class Used:
    """The samples of one step of a run, by member, in order."""

    epoch: int
    parts: tuple[tuple[int, ...], ...]


class PlainHet:
    """The ``het`` of a program in the reference.

    Args:
        program: how it is run.
        config: the run's settings.
        used: by step, what a run of the same program has used; where it says nothing, the order is the loader's own.
    """

    def __init__(self, program: Program, config: HetConfig, used: dict[int, Used]) -> None:
        self.program, self.config, self.used = program, config, used
        self.model: nn.Module | None = None
        self.optimizer: torch.optim.Optimizer | None = None
        self.registered: dict[str, Any] = {}
        self.loader: PlainLoader | None = None
        self.outcome = Outcome(kind="gone")
        self.step, self.epoch = 0, 0

    def prepare_model(self, model: nn.Module) -> nn.Module:
        self.model = self.model or model
        return model

    def prepare_optimizer(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        if self.optimizer is not None:
            return optimizer
        self.optimizer = optimizer
        cls = type(optimizer)
        plain = self

        def step(self: torch.optim.Optimizer, closure: Any = None) -> Any:
            if plain.loader is not None and not plain.loader.whole:
                return None
            if plain.config.clip and plain.model is not None:
                Clipping(**plain.config.clip).clip([p for group in self.param_groups for p in group["params"]])
            result = cls.step(self, closure) if closure is not None else cls.step(self)
            plain.note()
            return result

        if "step" in vars(optimizer):  # A scheduler was made before: it counts the steps of what it has wrapped.
            inner = optimizer.step

            def noted(*args: Any) -> None:
                inner(*args)
                plain.note()

            optimizer.step = noted  # type: ignore[method-assign, assignment]
        else:
            optimizer.__class__ = type(cls.__name__, (cls,), {"step": step})
        return optimizer

    def note(self) -> None:
        """Note that the optimizer has made a step."""
        state = state_of(self.model, self.optimizer)
        self.outcome.notes.append(StepNote(step=self.step, epoch=self.epoch, state=state, bits=bits_of(state)))

    def prepare_data_loader(self, loader: DataLoader, **settings: Any) -> PlainLoader:
        self.loader = self.loader or PlainLoader(self, loader, **settings)
        return self.loader

    def register_state(self, name: str, obj: Any) -> None:
        self.registered[name] = obj

    def report(self, metrics: dict[str, Any], **_: Any) -> None:
        plain = {k: v.item() if isinstance(v, torch.Tensor) else v for k, v in metrics.items()}
        self.outcome.reports.append({"epoch": self.epoch, "metrics": plain})

    def evaluate(self, fn: Callable[[Any], dict[str, Any]], data: Any, *, batch_size: int = 256) -> dict[str, float]:
        assert self.model is not None
        collate = default_collate if self.loader is None else self.loader.inner.collate_fn
        if isinstance(data, DataLoader):
            data, collate = data.dataset, data.collate_fn
        modes = {module: module.training for module in self.model.modules()}
        self.model.eval()
        with torch.no_grad():
            batch = collate([data[k] for k in range(len(data))])
            sums = {k: float(v) for k, v in fn(batch).items()}
        for module, mode in modes.items():
            module.training = mode
        return {k: v / len(data) for k, v in sums.items()}


class PlainLoader:
    """Whole batches, in the order that a run has used, or else in the loader's own."""

    def __init__(
        self,
        het: PlainHet,
        loader: DataLoader,
        *,
        global_batch_size: int | None = None,
        micro_batch_size: int | None = None,
        weight: Callable[[Any], float] | None = None,
        loss: str = "mean",
    ) -> None:
        self.het, self.inner, self.weight, self.sums = het, loader, weight, loss == "sum"
        self.micro = None if micro_batch_size is None else int(micro_batch_size)
        global_batch_size = None if global_batch_size is None else int(global_batch_size)
        self.batch_size = global_batch_size
        self.whole = True
        """Whether the pass under way is the step's last."""
        self._source = SampleSource(loader.dataset, het.config.seed)
        plain_order = type(loader.sampler) in (RandomSampler, SequentialSampler) and (
            not isinstance(loader.sampler, RandomSampler)
            or not loader.sampler.replacement
            and len(loader.sampler) == len(loader.dataset)  # type: ignore[arg-type]
            and loader.generator is None
        )
        self.plan: DataPlan | None = None
        if plain_order and global_batch_size is not None:
            self.plan = DataPlan(
                dataset_size=len(loader.dataset),  # type: ignore[arg-type]
                global_batch_size=global_batch_size,
                shuffle=isinstance(loader.sampler, RandomSampler),
                drop_last=loader.drop_last,
                seed=het.config.seed,
            )

    def __len__(self) -> int:
        return len(self.batches(0))

    def batches(self, epoch: int) -> list[list[int]]:
        """The loader's own batches of an epoch."""
        if self.batch_size is None:
            assert self.inner.batch_sampler is not None
            return [list(batch) for batch in self.inner.batch_sampler]
        order = list(self.inner.sampler) if self.plan is None else self.plan.permutation(epoch).tolist()
        size = self.batch_size
        cut = [order[k : k + size] for k in range(0, len(order), size)]
        return [part for part in cut if len(part) == size or not self.inner.drop_last]

    def epochs(self, count: int) -> Iterator[int]:
        decay = self.het.config.decay
        plan = self.plan or DataPlan(dataset_size=1, global_batch_size=1, shuffle=False, drop_last=False, seed=0)
        self._rates = Rates(decay, plan, count) if decay is not None else None
        for epoch in range(int(count)):
            self.het.epoch = epoch
            yield epoch

    def __iter__(self) -> Iterator[Any]:
        het, done = self.het, 0
        self._times: Counter[int] = Counter()
        for batch in self.batches(het.epoch):
            parts = self._parts(batch, het.epoch)
            if self._rates is not None and het.optimizer is not None:
                self._rates.set(het.optimizer, Cursor(epoch=het.epoch, offset=done, step=het.step))
            done += len(batch)
            if het.program.by_pass:
                yield from self._by_pass(parts)
            else:
                yield self._fetch([index for part in parts for index in part])
            het.step += 1

    def _parts(self, batch: list[int], epoch: int) -> tuple[tuple[int, ...], ...]:
        """What each member had of this step's batch: what was used, if it is a batch that the loader may have made."""
        used = self.het.used.get(self.het.step)
        if used is None:
            counts = apportion(len(batch), self.het.program.shares or (1.0,) * self.het.program.workers)
            starts = [sum(counts[:k]) for k in range(len(counts))]
            return tuple(tuple(batch[s : s + n]) for s, n in zip(starts, counts, strict=True))
        flat = [index for part in used.parts for index in part]
        if used.epoch != epoch or len(flat) != len(batch):
            self.het.outcome.complaints.append(
                f"step {self.het.step} used {len(flat)} samples of epoch {used.epoch}: {flat}; the loader's batch has "
                f"{len(batch)}, in epoch {epoch}: {batch}"
            )
        return used.parts

    def _fetch(self, indices: list[int]) -> Any:
        repeats = [self._again(index) for index in indices]
        return self.inner.collate_fn(self._source.fetch(self.het.epoch, indices, repeats))

    def _again(self, index: int) -> int:
        """How often a sample was used before in the epoch: its own random numbers are others each time."""
        self._times[index] += 1
        return self._times[index] - 1

    def _by_pass(self, parts: tuple[tuple[int, ...], ...]) -> Iterator[Any]:
        het = self.het
        assert het.model is not None and het.optimizer is not None
        cut = [[part[s.start : s.stop] for s in micro_batches(range(len(part)), self.micro)] for part in parts]
        passes = ReferencePasses(het.model, het.optimizer, het.registered, sums=self.sums)
        todo = [list(one) for own in cut for one in own]
        with passes:
            for number, indices in enumerate(todo):
                batch = self._fetch(indices)
                weight = float(self.weight(batch)) if self.weight is not None else float(len(indices))
                self.whole = number == len(todo) - 1
                passes.begin(weight, last=self.whole)
                yield batch
        self.whole = True


def run_plain(program: Program, text: str, config: HetConfig, used: dict[int, Used]) -> Outcome:
    """Run a program's text with torch alone."""
    het = PlainHet(program, config, used)
    space: dict[str, Any] = {"__name__": "__main__", "het": het, "RANK": 0, "WORLD": program.workers}
    outcome = het.outcome
    try:
        exec(compile(text, "<program>", "exec"), space)
        outcome.value = space["train_fn"]()
        outcome.kind = "result"
    except Exception as error:
        outcome.kind, outcome.error, outcome.error_class = (
            "error",
            f"{type(error).__name__}: {error}",
            type(error).__name__,
        )
    outcome.final = state_of(het.model, het.optimizer)
    return outcome
