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
listed as *transfer*. What the wrapping itself takes is measured beside it, and taken off. The protocol's work is the
sum of the three: 2 ms or less, at the median over workers.
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
from raytrain_het.collectives.communicator import Communicator
from raytrain_het.collectives.exchange import Exchange
from raytrain_het.collectives.tcp import TcpGroup
from raytrain_het.testing.processes import ProcessLab
from raytrain_het.training import gradients as gradients_module

WORKERS = 4


class Stopwatch:
    """CPU time that wrapped functions take in whatever thread calls them, with the time it takes to measure that."""

    def __init__(self) -> None:
        self.inner_s = 0.0
        self.num_calls = 0
        self._own_s = 0.0
        self._own_s = self._calibrated_s()

    @property
    def total_s(self) -> float:
        """Of all calls so far."""
        return self.inner_s + self.num_calls * self._own_s

    def _calibrated_s(self, num_calls: int = 10_000) -> float:
        """What a wrapped call takes beyond what it counts as its own."""
        self.nothing = lambda: None
        began = time.thread_time()
        for _ in range(num_calls):
            self.nothing()
        bare_s = time.thread_time() - began
        self.wrap(self, "nothing")
        began = time.thread_time()
        for _ in range(num_calls):
            self.nothing()
        own_s = (time.thread_time() - began - bare_s - self.inner_s) / num_calls
        self.inner_s, self.num_calls = 0.0, 0
        return max(own_s, 0.0)

    def wrap(self, owner: Any, name: str) -> None:
        """Replace a function by one that is timed."""
        inner: Callable[..., Any] = getattr(owner, name)

        @functools.wraps(inner)
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.thread_time()
            try:
                return inner(*args, **kwargs)
            finally:
                self.inner_s += time.thread_time() - began
                self.num_calls += 1

        setattr(owner, name, timed)


def thread_cpu_s() -> dict[str, float]:
    """CPU time of this process's Python threads by name, from the kernel's scheduler."""
    return {
        thread.name: int(Path(f"/proc/self/task/{thread.native_id}/schedstat").read_text().split()[0]) / 1e9
        for thread in threading.enumerate()
    }


def train(directory: str, *, size: str, batch: int, blocks: int, steps: int) -> dict[str, float]:
    """Runs in every worker; milliseconds per step by part."""
    on_gradients, on_messages, on_waiting = Stopwatch(), Stopwatch(), Stopwatch()
    on_gradients.wrap(gradients_module.Gradients, "_gather")
    on_gradients.wrap(gradients_module, "_is_finite")
    for name in ("_encode_shard", "_sum_shard", "decode"):
        on_messages.wrap(Exchange, name)
    for name in ("_serve", "_give"):
        on_messages.wrap(TcpGroup, name)
    wait, select = Communicator._await, selectors.DefaultSelector.select
    on_waiting.wrap(selectors.DefaultSelector, "select")
    timed_select = selectors.DefaultSelector.select

    def told_apart(self: Communicator, *args: Any, peers: bool) -> None:
        selectors.DefaultSelector.select = timed_select if peers else select  # type: ignore[method-assign]
        try:
            wait(self, *args, peers=peers)
        finally:
            selectors.DefaultSelector.select = select  # type: ignore[method-assign]

    Communicator._await = told_apart  # type: ignore[method-assign]
    selectors.DefaultSelector.select = select  # type: ignore[method-assign]
    data = common.make_data(4096)
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

    results: dict[str, list[float]] = {"main": [], "communication": [], "reader": [], "transfer": [], "waiting": []}
    batches = endless()
    for block in range(blocks + 1):
        plain_s = plain_block()
        tensors, messages, waiting = on_gradients.total_s, on_messages.total_s, on_waiting.total_s
        threads, began = thread_cpu_s(), time.thread_time()
        for _ in range(steps):
            x, y = next(batches)
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        main_s, after = time.thread_time() - began, thread_cpu_s()
        tensors, messages = on_gradients.total_s - tensors, on_messages.total_s - messages
        waiting = on_waiting.total_s - waiting
        if block == 0:
            continue  # Joining the run is no step.
        for name, value in (
            ("main", main_s - plain_s - tensors),
            ("communication", after["het-communication"] - threads["het-communication"] - messages - waiting),
            ("reader", after["het-member"] - threads["het-member"]),
            ("transfer", tensors + messages),
            ("waiting", waiting),
        ):
            results[name].append(1000 * value / steps)
    return {name: statistics.median(values) for name, values in results.items()}


def main() -> None:
    def add(parser: Any) -> None:
        parser.add_argument("--blocks", type=int, default=20)
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
            lab = ProcessLab(run, directory, num_slots=WORKERS, ledger=False)
            workers = list(lab.run(timeout_s=1800).values())
        parts = {name: statistics.median(w[name] for w in workers) for name in workers[0]}
        total = statistics.median(w["main"] + w["communication"] + w["reader"] for w in workers)
        rows.append({"model": size, **parts, "protocol": total, "passes": total <= 2.0})
    common.show("CPU time of a worker in a step, milliseconds; protocol = main + communication + reader", rows)
    common.keep(args.json, {"benchmark": "protocol_cost", "rows": rows})


if __name__ == "__main__":
    main()
