"""The protocol's own work in a step: CPU time of a worker's threads outside of compute, transfer and waiting for peers.

Four processes, one torch thread each, no Ray, twice: with the model of 1.3 million parameters and with a tiny
one. CPU time does not count waiting. In every worker:

- *main*: CPU time of the training thread in a step of ours, less that in the same step (same batch, same optimizer,
  without any hooks) of a second copy of the model, in blocks that take turns, and less the tensor work on gradients;
- *communication*: CPU time of the communication thread, less the tensor work on messages, and less the calls in which
  it waits for peers' messages (*waiting*: what falling asleep and waking up takes). Waiting for its own training thread
  is not taken off;
- *reader*: CPU time of the thread that listens to the hub.

Tensor work is weighting gradients into buckets, the check for finiteness, encoding, summing, decoding: what DDP does
too, and what grows with the model; so is what sends and receives. It is timed by wrapping the functions that do it, and
listed as *transfer*.

Blocks with and without the wrapping take turns: what threads take in all is from those without, for a wrapper takes
1 us when it is called in a loop, but several once caches are cold, and some 40 are called in a step. What of that lies
between its looks at the clock is one look: that is timed in every call, and taken off. The protocol's work is the sum
of the three parts: 2 ms or less, at the median over workers.

A block is an epoch: its end, where all confirm it, is part of the steps.
"""

from __future__ import annotations

import functools
import selectors
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

import raytrain_het as het
from experiments.benchmarks import common
from raytrain_het.allreduce.reducers.owner_shards import OwnerShardsReducer
from raytrain_het.allreduce.reducers.to_owners import ShardsToOwners
from raytrain_het.allreduce.transport.tcp import TcpGroup
from raytrain_het.allreduce.waiting import Waiter
from raytrain_het.testing.lab_worker import WorkerFiles
from raytrain_het.testing.processes import LabSlots, ProcessLab
from raytrain_het.worker.step import buckets as buckets_module

WORKERS = 4


class Stopwatch:
    """CPU time that some functions take in whatever thread calls them, while it is on."""

    def __init__(self, *functions: tuple[Any, str]) -> None:
        self.counts = True
        """Whether calls are timed now."""
        self._bare = [(owner, name, getattr(owner, name)) for owner, name in functions]
        self._timed = [(owner, name, self._wrapped(inner)) for owner, name, inner in self._bare]
        self._inner_s = 0.0

    def switch(self, on: bool) -> None:
        """Put the wrapped functions in place, or the bare ones."""
        for owner, name, function in self._timed if on else self._bare:
            setattr(owner, name, function)

    def take_s(self) -> float:
        """Of all calls since the last time."""
        taken_s, self._inner_s = self._inner_s, 0.0
        return taken_s

    def _wrapped(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        clock = time.thread_time

        @functools.wraps(inner)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if not self.counts:
                return inner(*args, **kwargs)
            first, began = clock(), clock()
            try:
                return inner(*args, **kwargs)
            finally:
                self._inner_s += (clock() - began) - (began - first)

        return timed


class PeersStopwatch(Stopwatch):
    """The calls in which the communication thread waits for peers, and not for its own training thread."""

    def __init__(self) -> None:
        super().__init__((selectors.DefaultSelector, "select"))
        self.counts = False
        wait = Waiter.until

        def told_apart(waiter: Waiter, *args: Any, peers: bool) -> None:
            self.counts = peers
            try:
                wait(waiter, *args, peers=peers)
            finally:
                self.counts = False

        self._bare.append((Waiter, "until", wait))
        self._timed.append((Waiter, "until", told_apart))


def thread_cpu_s() -> dict[str, float]:
    """CPU time of this process's Python threads by name, from the kernel's scheduler."""
    return {
        thread.name: int(Path(f"/proc/self/task/{thread.native_id}/schedstat").read_text().split()[0]) / 1e9
        for thread in threading.enumerate()
    }


def train(directory: str, *, size: str, batch: int, blocks: int, steps: int) -> dict[str, float]:
    """Runs in every worker; milliseconds per step by part."""
    on_gradients = Stopwatch((buckets_module.Buckets, "add"), (buckets_module, "is_finite"))
    on_messages = Stopwatch(
        (ShardsToOwners, "_encode"),
        *((OwnerShardsReducer, name) for name in ("_encode_own_mean", "decode")),
        *((TcpGroup, name) for name in ("_serve", "_give")),
    )
    on_waiting = PeersStopwatch()
    stopwatches = {"gradients": on_gradients, "messages": on_messages, "waiting": on_waiting}
    data = common.make_data(steps * WORKERS * batch)
    plain = common.make_model(size)
    plain_optimizer = torch.optim.SGD(plain.parameters(), lr=0.01, momentum=0.9)
    model = het.prepare_model(common.make_model(size))
    optimizer = het.prepare_optimizer(torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9))
    loader = het.prepare_data_loader(DataLoader(data, shuffle=True, drop_last=True), global_batch_size=WORKERS * batch)
    indices = torch.randint(0, len(data), (steps, batch)).tolist()

    def plain_block() -> float:
        began = time.thread_time()
        for picked in indices:
            x, y = (tensor[picked] for tensor in data.tensors)
            loss = F.cross_entropy(plain(x), y)
            plain_optimizer.zero_grad()
            loss.backward()
            plain_optimizer.step()
        return time.thread_time() - began

    def endless() -> Iterator[Any]:
        for _ in loader.epochs(10**9):
            yield from loader

    threads_of = {"communication": "het-communication", "reader": "het-member"}
    totals: dict[str, list[float]] = {part: [] for part in ("main", *threads_of)}
    inside: dict[str, list[float]] = {name: [] for name in stopwatches}
    batches = endless()
    for block in range(2 * blocks + 1):
        timed = block % 2 == 0
        for stopwatch in stopwatches.values():
            stopwatch.switch(timed)
        plain_s = plain_block()
        for stopwatch in stopwatches.values():
            stopwatch.take_s()  # What goes on in the other threads during the plain block is in no sum either.
        threads, began = thread_cpu_s(), time.thread_time()
        for _ in range(steps):
            x, y = next(batches)
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        main_s, after = time.thread_time() - began, thread_cpu_s()
        taken_s = {name: stopwatch.take_s() for name, stopwatch in stopwatches.items()}
        if block == 0:
            continue  # Joining the run is no step.
        threads_s = {part: after[name] - threads[name] for part, name in threads_of.items()}
        for found, into in ((taken_s, inside),) if timed else (({"main": main_s - plain_s} | threads_s, totals),):
            for name, value in found.items():
                into[name].append(1000 * value / steps)
    total, of = ({name: statistics.median(values) for name, values in by.items()} for by in (totals, inside))
    parts = {
        "main": total["main"] - of["gradients"],
        "communication": total["communication"] - of["messages"] - of["waiting"],
        "reader": total["reader"],
    }
    return parts | {
        "transfer": of["gradients"] + of["messages"],
        "waiting": of["waiting"],
        "protocol": sum(parts.values()),
    }


def main() -> None:
    def add(parser: Any) -> None:
        parser.add_argument("--blocks", type=int, default=20, help="so many of each kind")
        parser.add_argument("--steps", type=int, default=20, help="steps in a block")
        parser.add_argument(
            "--batch", type=int, default=8, help="samples of each worker; the protocol's work does not depend on it"
        )

    args = common.arguments(__doc__, add)
    rows = []
    for size in ("1.3M", "tiny"):
        blocks, steps, batch = args.blocks, args.steps, args.batch

        def run(directory: str, size: str = size, blocks: int = blocks, steps: int = steps, batch: int = batch) -> Any:
            return train(directory, size=size, batch=batch, blocks=blocks, steps=steps)

        with common.scratch() as directory:
            lab = ProcessLab(
                run,
                directory,
                LabSlots(num_slots=WORKERS),
                config=het.HetConfig(shares=None),
                files=WorkerFiles(ledger=False),
            )
            workers = list(lab.run(timeout_s=1800).values())
        parts = {name: statistics.median(w[name] for w in workers) for name in workers[0]}
        rows.append({"model": size, **parts, "passes": parts["protocol"] <= 2.0})
    common.show("CPU time of a worker in a step, milliseconds, each the median over workers", rows)
    common.keep(args.json, {"benchmark": "protocol_cost", "rows": rows})


if __name__ == "__main__":
    main()
