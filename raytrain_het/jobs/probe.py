"""`raytrain-het probe`: how fast are the machines, and does this fleet pay for this job?"""

from __future__ import annotations

import contextlib
import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from raytrain_het.balance.codec_choice import CodecCost, Fleet
from raytrain_het.balance.profile import Profile
from raytrain_het.codec_options import AUTO_CODECS, AutoOptions
from raytrain_het.errors import ConfigError
from raytrain_het.jobs.config import JobConfig
from raytrain_het.jobs.job_data import check_data, with_fitting_batch
from raytrain_het.jobs.probe_checks import check_before_torch
from raytrain_het.jobs.probe_places import Handle, Say, call_all, counted, local_workers, ray_workers, this_node
from raytrain_het.jobs.probe_worker import ProbeWorker
from raytrain_het.probing.codec_advice import CodecAdvice, codec_advice
from raytrain_het.probing.links import Link, probe_links, slowest_link
from raytrain_het.probing.prediction import Advice, Machine, advice

SECONDS_EACH = 0.1
STEP_SECONDS = 2.0
BATCH_BOUND = 8
"""Global batch sizes up to so many times the job's are considered."""

Links = dict[tuple[str, str], Link | None]


@dataclass(frozen=True)
class Device:
    """What was measured of a device."""

    node: str
    profile: Profile


@dataclass(frozen=True)
class ModelResult:
    """What was measured of a job, and what that predicts."""

    job: JobConfig
    global_batch_size: int
    gradient_bytes: int
    workers: list[Device]
    """One per worker; the profile holds its step."""
    advice: Advice
    codecs: CodecAdvice | None = None
    """If asked for."""


@dataclass(frozen=True)
class ProbeResult:
    """All that a probe has found."""

    devices: list[Device]
    links: Links
    """By the names of two nodes. With a single node: the link between two processes on it, if it has two workers."""
    model: ModelResult | None


def run_probe(
    *,
    job: JobConfig | None = None,
    address: str | None = None,
    say: Say = print,
    seconds_each: float = SECONDS_EACH,
    step_seconds: float = STEP_SECONDS,
    compression: bool = False,
) -> ProbeResult:
    """Measure a cluster, or this machine where none is named, by ``address`` or ``RAY_ADDRESS``.

    Args:
        job: also measure its training step on each of its workers, and advise.
        address: of a Ray cluster.
        say: told what is being done.
        seconds_each: for each quantity of a device.
        step_seconds: for the job's step.
        compression: predict every codec for the job, too.

    Raises:
        ConfigError: ``compression`` without a job; or the job cannot be measured here.
        ResourceError: the cluster cannot hold its workers.
    """
    job = check_before_torch(job, address=address, compression=compression)
    if job is not None:
        for note in check_data(job):
            say(note)
        job = with_fitting_batch(job)
    if address or os.environ.get("RAY_ADDRESS"):
        from raytrain_het.jobs.ray_session import ray_session

        with ray_session(address, num_cpus=1), ray_workers(job, say) as workers:
            devices = _hardware_of(workers, seconds_each, say)
            return _finish(devices, job, workers, step_seconds, say, compression)
    _warn_if_busy(say)
    devices = _local_hardware(seconds_each, say)
    with local_workers(job, say) as workers:
        return _finish(devices, job, workers, step_seconds, say, compression)


def _finish(
    devices: list[Device],
    job: JobConfig | None,
    workers: Sequence[Handle],
    seconds: float,
    say: Say,
    compression: bool,
) -> ProbeResult:
    links = _links(workers, say)
    model = _model(job, workers, links, seconds, say, compression) if job is not None else None
    return ProbeResult(devices, links, model)


def _warn_if_busy(say: Say) -> None:
    load, cores = 0.0, os.cpu_count() or 1  # Both are the whole machine's.
    with contextlib.suppress(OSError, AttributeError):
        load = os.getloadavg()[0]
    if load > cores:
        say(
            f"others keep this machine busy (load {load:.3g} on {cores} cores): what follows is what they leave, "
            "and runs start from it until you measure again"
        )


def _local_hardware(seconds_each: float, say: Say) -> list[Device]:
    worker = ProbeWorker(device="cpu", num_threads=torch.get_num_threads())
    found = []
    for name in ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]:
        say(f"measuring {name} of this machine")
        found += [Device(this_node(), profile) for profile in worker.hardware([name], seconds_each)]
    return found


def _hardware_of(workers: Sequence[Handle], seconds_each: float, say: Say) -> list[Device]:
    """Every GPU, and the CPU of every node, which the node's first worker measures."""
    asked: list[tuple[Handle, list[str]]] = []
    seen: set[str] = set()
    for worker in workers:
        devices = [] if worker.node in seen else ["cpu"]
        seen.add(worker.node)
        devices += [worker.device] if worker.device != "cpu" else []
        if devices:
            asked.append((worker, devices))
    count = sum(len(devices) for _, devices in asked)
    say(f"measuring {counted(count, 'device')} on {counted(len(seen), 'node')}")
    for worker, devices in asked:
        worker.start("hardware", devices, seconds_each)
    return [Device(worker.node, profile) for worker, _ in asked for profile in worker.result()]


def _links(workers: Sequence[Handle], say: Say) -> Links:
    first: dict[str, Handle] = {}
    for worker in workers:
        first.setdefault(worker.node, worker)
    members = list(first.values()) if len(first) > 1 else list(workers[:2])
    if len(members) < 2:
        return {}
    say(f"measuring the links between {len(members)} {'nodes' if len(first) > 1 else 'workers of this node'}")
    return {(members[i].node, members[j].node): link for (i, j), link in probe_links(members).items()}


def _model(
    job: JobConfig, workers: Sequence[Handle], links: Links, seconds: float, say: Say, compression: bool
) -> ModelResult:
    batch, count = _global_batch_size(job), len(workers)
    if batch < count:
        raise ConfigError(
            f"global_batch_size={batch} is smaller than the number of workers, {count}: allowed is one sample per "
            f"worker or more. Write --set global_batch_size={count}, or fewer workers"
        )
    say(f"preparing the job {job.kind!r} on {counted(count, 'worker')}")
    config = job.train_loop_config()
    gradient_bytes = max(call_all(workers, "prepare", type(job), config, job.het))
    equal = batch // count
    sizes = sorted({max(1, equal // 4), equal, min(batch, 2 * equal), batch})
    say(f"measuring its training step on all workers at once, with {', '.join(map(str, sizes))} samples")
    measured: list[tuple[Profile, float]] = call_all(workers, "step", sizes, seconds)
    sharing = Counter(worker.node for worker in workers)
    machines = []
    for worker, (profile, spread) in zip(workers, measured, strict=True):
        assert profile.step is not None
        # All workers of a node send and receive over its link.
        latency_s, bandwidth = slowest_link(worker.node, links) or (0.0, math.inf)
        machines.append(
            Machine(
                cost=profile.step,
                latency_s=latency_s,
                bandwidth=bandwidth / sharing[worker.node],
                cores=min(profile.cores, profile.num_threads),
                spread=spread,
            )
        )
    advised = advice(
        machines, global_batch_size=batch, gradient_bytes=gradient_bytes, max_batch_size=BATCH_BOUND * batch
    )
    return ModelResult(
        job=job,
        global_batch_size=batch,
        gradient_bytes=gradient_bytes,
        workers=[Device(worker.node, profile) for worker, (profile, _) in zip(workers, measured, strict=True)],
        advice=advised,
        codecs=_codecs(job, workers, machines, advised, say) if compression else None,
    )


def _codecs(
    job: JobConfig, workers: Sequence[Handle], machines: Sequence[Machine], advised: Advice, say: Say
) -> CodecAdvice:
    say("measuring the codecs on all workers at once")
    told: list[tuple[dict[str, CodecCost], int, float]] = call_all(workers, "codecs")
    fleet = Fleet(
        num_elements=told[0][1],
        costs=[costs for costs, _, _ in told],
        byte_cpu_s=[cpu_s for _, _, cpu_s in told],
        byte_s=[1 / machine.bandwidth for machine in machines],
        speeds=list(advised.solo_samples_per_s),
        compute_s=advised.prediction.compute_s + advised.prediction.chance_s,
    )
    error = job.het.compression_error
    return codec_advice(fleet, AUTO_CODECS, error if error is not None else AutoOptions().error)


def _global_batch_size(job: JobConfig) -> int:
    batch: int = job.train_loop_config()["global_batch_size"]
    return batch
