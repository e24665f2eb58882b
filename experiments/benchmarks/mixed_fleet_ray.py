"""Unequal machines under Ray: what a fleet does together, as a fraction of the sum of what each machine does by itself.

As :mod:`experiments.benchmarks.mixed_fleet`, with the same model and blocks, but each worker is on a Ray node of its
own, whose processes, Ray's own included, share a CPU quota and sit behind an address of their own
(:class:`raytrain_het.testing.cluster.RayLab`; Linux, as root). One after the other on the same nodes:

- a stock ``ray.train.torch.TorchTrainer`` with ``ray.train.torch.prepare_model``: *ddp* with equal batches, *static*
  with batches in proportion to solo speeds;
- a ``HetTrainer`` with ``HetConfig(shares="auto")``: *het*.

Each fraction is relative to solo speeds which were measured in the same trainer, in turns with it.
"""

from __future__ import annotations

import functools
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import ray
import ray.cloudpickle
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist

import raytrain_het as het
from experiments.benchmarks import common, mixed_fleet
from experiments.benchmarks.mixed_fleet import HetSide, Oracle, Side, gathered, make_data, make_net, solo_speed, timed
from raytrain_het.testing.cluster import Node, RayLab


def train_stock(config: dict[str, Any]) -> None:
    """*solo*, *ddp* and *static* in turns, under a stock TorchTrainer."""
    torch.set_num_threads(1)
    context = ray.train.get_context()
    rank, size, total, steps = context.get_world_rank(), context.get_world_size(), config["total"], config["steps"]
    data, equal = make_data(), total // size
    solo = Side(data, make_net())
    ddp, static = (Side(data, ray.train.torch.prepare_model(make_net())) for _ in range(2))
    oracle = Oracle(total, size)

    def learn() -> list[float]:
        speeds = gathered(solo_speed(solo, oracle.shares[rank], config["solo_s"]), size)
        oracle.learn(speeds)
        return speeds

    for _ in range(2):
        learn()
    rounds = []
    for _ in range(config["rounds"]):
        solo_equal = gathered(solo_speed(solo, equal, config["solo_s"]), size)
        ddp_s = timed(steps, lambda: ddp.step(equal))
        solo_static = learn()
        share = oracle.shares[rank]
        static_s = timed(steps, functools.partial(static.step, share, share * size / total))
        rounds.append(
            {
                "solo_equal": solo_equal,
                "ddp_s": ddp_s,
                "solo_static": solo_static,
                "static_s": static_s,
                "static_shares": oracle.shares,
            }
        )
    if rank == 0:
        Path(config["results"]).write_text(json.dumps(rounds))


def train_het(config: dict[str, Any]) -> None:
    """*solo* and *het* in turns, under a HetTrainer."""
    from raytrain_het.worker.session import current

    torch.set_num_threads(1)
    session, size = current(), config["size"]
    if dist.is_initialized():
        dist.destroy_process_group()  # A HetTrainer's default group has one member; here all meet between blocks.
    dist.init_process_group("gloo", init_method=f"file://{config['meet']}", rank=session.slot, world_size=size)
    data = make_data()
    solo, ours = Side(data, make_net()), HetSide(data, config["total"])
    for _ in range(config["settle"]):
        ours.step()
    rounds = []
    for _ in range(config["rounds"]):
        share = session.joined().stats.batch_share()
        rounds.append(
            {
                "shares": [int(b) for b in gathered(share, size)],
                "solo_het": gathered(solo_speed(solo, share, config["solo_s"]), size),
                "het_s": timed(config["steps"], ours.step),
                "table": session.joined().connections.record().table,
            }
        )
    if session.slot == 0:
        Path(config["results"]).write_text(json.dumps(rounds))


def measure(args: Any) -> dict[str, Any]:
    """Both trainers, one after the other on the same nodes."""
    for module in (mixed_fleet, sys.modules[__name__]):
        ray.cloudpickle.register_pickle_by_value(module)  # Nodes need not find these files.
    size, total = len(args.cores), args.global_batch
    config = {
        "size": size,
        "total": total,
        "rounds": args.rounds,
        "steps": args.steps,
        "settle": args.settle,
        "solo_s": args.solo_s,
    }
    with tempfile.TemporaryDirectory() as folder, RayLab([Node(cores=cores) for cores in args.cores]) as lab:
        # gloo takes the address that the machine's name stands for, unless told which link to take.
        ray.init(address=lab.address, runtime_env={"env_vars": {"GLOO_SOCKET_IFNAME": "eth0"}}, log_to_driver=False)
        results = Path(folder) / "stock.json", Path(folder) / "het.json"
        ray.train.torch.TorchTrainer(
            train_stock,
            train_loop_config=config | {"results": str(results[0])},
            scaling_config=ray.train.ScalingConfig(num_workers=size),
            run_config=ray.train.RunConfig(name="stock", storage_path=folder),
        ).fit()
        het.HetTrainer(
            train_het,
            train_loop_config=config | {"meet": f"{folder}/meet", "results": str(results[1])},
            scaling_config=het.HetScalingConfig(workers="auto"),
            run_config=ray.train.RunConfig(name="het", storage_path=folder),
        ).fit()
        stock, ours = (json.loads(path.read_text()) for path in results)
    figures: dict[str, Any] = {"cores": args.cores, "global_batch": total, "stock": stock, "ours": ours}
    for side, solo, rounds in (
        ("ddp", "solo_equal", stock),
        ("static", "solo_static", stock),
        ("het", "solo_het", ours),
    ):
        fractions = [total / r[f"{side}_s"] / sum(r[solo]) for r in rounds]
        low, high = common.bootstrap_interval(fractions)
        figures[side] = {
            "fraction": statistics.median(fractions),
            "low": low,
            "high": high,
            "step_s": statistics.median(r[f"{side}_s"] for r in rounds),
        }
    return figures | {"settings": {name: value for name, value in vars(args).items() if name != "json"}}


def main() -> None:
    def add(parser: Any) -> None:
        parser.add_argument("--cores", type=float, nargs="+", default=[0.8, 0.4, 0.2, 0.2])
        parser.add_argument("--global-batch", type=int, default=1024)
        parser.add_argument("--rounds", type=int, default=5)
        parser.add_argument("--steps", type=int, default=8, help="steps in a block")
        parser.add_argument("--settle", type=int, default=40, help="first steps of het, not counted")
        parser.add_argument("--solo-s", type=float, default=10.0, help="seconds of a solo block")

    args = common.arguments(__doc__, add)
    result = measure(args)
    rows = [{"side": side, **result[side]} for side in ("ddp", "static", "het")]
    last = result["ours"][-1]
    title = f"Fraction of the sum of solo speeds under Ray; cores {args.cores}, global batch {args.global_batch}"
    common.show(f"{title}; shares {last['shares']}, {last['table']} tables", rows)
    for side in ("ddp", "static"):
        print(f"het against {side}: {result['het']['fraction'] / result[side]['fraction']:.3f} times as fast")
    common.keep(args.json, {"benchmark": "mixed_fleet_ray", **result})


if __name__ == "__main__":
    main()
