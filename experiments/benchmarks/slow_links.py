"""Gradients over slow links: steps and bytes with each codec, with what ``auto`` chooses, and with stock DDP.

Plain processes of one torch thread each, every one in a network namespace whose link is held back both ways by the
kernel (Linux, as root; no Ray). All hold copies of one model: those of torch's ``DistributedDataParallel`` over gloo
(fp32; with torch's bf16 hook; with its PowerSGD hook of rank 4, in a single bucket, since it hangs with two), and one
prepared by raytrain_het under ``HetConfig(compression="auto", shares=None)``.

That one first trains until ``auto`` has chosen; from its first step to that is *settling*. Then all take turns in
blocks, round after round, in an order that moves on by one each round. Between its blocks the last one's codecs are
changed, as ``auto`` would change them; a block begins with steps that are not counted. Step times are medians over
rounds, ratios are taken within a round. Bytes are what the link's own counter says that the busiest worker has sent in
a step, all headers and acknowledgements of the network included.

With ``--machines`` several workers share a namespace and its link; each fixed codec is then measured with
``HetConfig(hierarchy=True)`` too.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset

import raytrain_het as het
from experiments.benchmarks import common
from raytrain_het.balance.scoreboard import Table
from raytrain_het.codec_options import AUTO_CODECS
from raytrain_het.testing.lab_worker import WorkerFiles
from raytrain_het.testing.networks import sent
from raytrain_het.testing.processes import LabSlots, ProcessLab
from raytrain_het.worker.session import current
from raytrain_het.worker.step.open_step import OpenStep

WIDTH, LAYERS, CLASSES, SAMPLES = 1024, 4, 10, 4096
WANTED = "wanted.json"
DDP = ("ddp", "ddp bf16", "ddp powersgd")


def make_net() -> nn.Module:
    """4.2 million parameters in four square matrices, and a small last one."""
    torch.manual_seed(0)
    layers = [layer for _ in range(LAYERS) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(WIDTH, CLASSES))


def make_data() -> TensorDataset:
    """Noise and labels: what is measured does not depend on what is learnt."""
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(
        torch.randn(SAMPLES, WIDTH, generator=generator), torch.randint(0, CLASSES, (SAMPLES,), generator=generator)
    )


def ddp_step(kind: str, data: TensorDataset, batch: int) -> Callable[[], None]:
    """A step of a copy under DDP."""
    # One bucket for PowerSGD: more than there is to send.
    model = DistributedDataParallel(make_net(), bucket_cap_mb=1000 if kind == "ddp powersgd" else 25)
    if kind == "ddp bf16":
        # By another name: DDP refuses it by its own where there is no NCCL, though gloo carries bf16.
        model.register_comm_hook(None, lambda state, bucket: default_hooks.bf16_compress_hook(state, bucket))
    elif kind == "ddp powersgd":
        state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=4, start_powerSGD_iter=2)
        model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    x, y = data.tensors[0][:batch], data.tensors[1][:batch]

    def step() -> None:
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def timed(warm: int, steps: int, run: Callable[[], None]) -> dict[str, float]:
    """Seconds and bytes per step of a block that starts and ends at a barrier, after ``warm`` that are not counted."""
    for _ in range(warm):
        run()
    dist.barrier()
    began, (before, _) = time.perf_counter(), sent()
    for _ in range(steps):
        run()
    dist.barrier()
    took, told = (time.perf_counter() - began) / steps, [0] * dist.get_world_size()
    dist.all_gather_object(told, sent()[0] - before)
    return {"step_s": took, "bytes": max(told) / steps}


BY_MACHINE = " by machine"
"""Ends the name of a side with a hierarchy."""


def train(
    directory: str, *, size: int, batch: int, fixed: list[str], rounds: int, warm: int, steps: int, shared: bool
) -> dict[str, Any]:
    """Runs in every worker; returns the figures, the same on all."""
    session = current()
    os.environ["GLOO_SOCKET_IFNAME"] = "eth0"
    dist.init_process_group("gloo", init_method=f"file://{directory}/ddp", rank=session.slot, world_size=size)
    data = make_data()
    own = common.het_steps(make_net(), data, batch * size)

    def last_step() -> OpenStep:
        step = session.joined().engine.opened
        assert step is not None
        return step

    def in_force() -> tuple[list[str], bool]:
        """Codecs of the last step, the same on all workers, and whether there was a hierarchy."""
        record = last_step().record
        return list(record.codecs), record.hierarchy

    def table() -> int:
        return last_step().record.table

    began, settling = time.perf_counter(), 0
    next(own)
    while time.perf_counter() - began < 600 and settling < 40 and table() == 0:
        next(own)
        settling += 1
    settled_s = time.perf_counter() - began
    chosen, by_machine = in_force()
    sides = {"auto": (chosen, by_machine), **{word: ([word] * size, False) for word in fixed}}
    sides |= {word + BY_MACHINE: ([word] * size, True) for word in fixed if shared}
    others = {kind: ddp_step(kind, data, batch) for kind in DDP}
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)

    def compute() -> None:
        loss = F.cross_entropy(net(data.tensors[0][:batch]), data.tensors[1][:batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def change_to(wanted: tuple[list[str], bool]) -> None:
        if session.slot == 0:
            part = Path(directory, f"{WANTED}.part")
            part.write_text(json.dumps(wanted))
            part.rename(Path(directory, WANTED))
        while in_force() != wanted:
            next(own)

    def block(name: str) -> dict[str, float]:
        if name in sides:
            change_to(sides[name])
            return timed(warm, steps, lambda: next(own))
        return timed(warm, steps, others.get(name, compute))

    order, results = [*others, *sides, "compute"], []
    for i in range(rounds):
        results.append({name: block(name) for name in order[i % len(order) :] + order[: i % len(order)]})
    return {
        "chosen": chosen,
        "by_machine": by_machine,
        "settling_steps": settling,
        "settling_s": settled_s,
        "rounds": results,
    }


class Switch:
    """In the lab: has the hub use what the workers want, in place of its own choice.

    Owner shards follow the links, as they would.
    """

    def __init__(self, rates_mbit: list[float]) -> None:
        self._last = ""
        self._links_s = {i: 1 / rate for i, rate in enumerate(rates_mbit)} if all(rates_mbit) else {}

    def __call__(self, lab: ProcessLab) -> None:
        path = Path(lab.directory, WANTED)
        wanted = path.read_text() if path.exists() else ""
        if wanted == self._last:
            return
        self._last, hub = wanted, lab.hub
        switchboard = hub._switchboard
        switchboard.tables.board.compression = None
        run = switchboard.core.run

        links_s = self._links_s
        codecs, hierarchy = json.loads(wanted)

        def follow() -> None:
            run.config = dataclasses.replace(run.config, hierarchy=hierarchy)
            before = run.table
            slots = range(lab.slots.num_slots)
            equal = dict.fromkeys(slots, 1.0)
            switchboard.core.follow(
                Table(
                    version=before.version + 1 if before else 1,
                    scores=before.scores if before else equal,
                    gradient_weights=equal,
                    shares=dict.fromkeys(slots, 1),
                    predicted_step_s=None,
                    reason="a benchmark",
                    links_s=links_s,
                    codecs=dict(enumerate(codecs)),
                ),
                hub._clock.now(),
            )

        hub._call(follow)


def measure(args: Any) -> dict[str, Any]:
    """Run it and evaluate the rounds."""
    machines = args.machines or list(range(len(args.rates)))
    size = len(machines)
    fixed = [word for word in args.codecs or [*AUTO_CODECS, "int8", "sign"] if word]
    switch = Switch([args.rates[machine] for machine in machines])

    def run(directory: str) -> dict[str, Any]:
        return train(
            directory,
            size=size,
            batch=args.batch,
            fixed=fixed,
            rounds=args.rounds,
            warm=args.warm,
            steps=args.steps,
            shared=len(set(machines)) < size,
        )

    rates = [rate if rate > 0 else None for rate in args.rates]
    with common.scratch() as directory:
        config = het.HetConfig(compression={"auto": {"error": args.error}}, shares=None, replica_check_steps=0)
        lab = ProcessLab(
            run,
            directory,
            LabSlots(num_slots=size, rates_mbit=rates, machines=machines),
            config=config,
            files=WorkerFiles(ledger=False),
        )
        result = lab.run(timeout_s=7200, on_poll=lambda: switch(lab))[0]
        tables = [e for e in lab.events if e["kind"] == "table" and e["reason"] != "a benchmark"]
    rounds, sides = result["rounds"], {}
    for name in rounds[0]:
        sides[name] = {
            "step_ms": 1000 * statistics.median(r[name]["step_s"] for r in rounds),
            "mib": statistics.median(r[name]["bytes"] for r in rounds) / 2**20,
        }
        for other in ("ddp", "ddp bf16", "auto"):
            ratio = statistics.median(r[other]["step_s"] / r[name]["step_s"] for r in rounds)
            sides[name][f"times as fast as {other}"] = ratio
    settings = {name: value for name, value in vars(args).items() if name != "json"}
    return {"settings": settings, **result, "sides": sides, "reasons": [e["reason"] for e in tables]}


def main() -> None:
    def add(parser: Any) -> None:
        parser.add_argument(
            "--rates", type=float, nargs="+", default=[100.0] * 4, help="Mbit/s by machine; 0: unshaped"
        )
        parser.add_argument("--machines", type=int, nargs="+", help="by worker, from 0; by default one each")
        parser.add_argument("--batch", type=int, default=16, help="samples of each worker")
        parser.add_argument("--rounds", type=int, default=5)
        parser.add_argument("--warm", type=int, default=1, help="steps of a block that are not counted")
        parser.add_argument("--steps", type=int, default=3, help="counted steps in a block")
        parser.add_argument("--error", type=float, default=0.97, help="what auto may lose of a message")
        parser.add_argument("--codecs", nargs="*", help="fixed ones to compare with")

    args = common.arguments(__doc__, add)
    result = measure(args)
    rows = [{"side": name, **figures} for name, figures in result["sides"].items()]
    common.show(f"Links of {args.rates} Mbit/s, 4.2 million parameters, batch {args.batch} a worker", rows)
    way = ", added up on each machine first," if result["by_machine"] else ""
    print(f"auto chose {result['chosen']}{way} after {result['settling_steps']} steps, {result['settling_s']:.3g} s")
    for reason in result["reasons"]:
        print(f"  {reason}")
    common.keep(args.json, {"benchmark": "slow_links", **result})


if __name__ == "__main__":
    main()
