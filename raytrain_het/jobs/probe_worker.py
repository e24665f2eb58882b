"""The process of `raytrain-het probe` that measures: a Ray actor, or a local process."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from raytrain_het.allreduce.codecs import byte_cpu_s, codec_costs, codec_of
from raytrain_het.balance.codec_choice import CodecCost
from raytrain_het.balance.profile import Profile
from raytrain_het.codec_options import AUTO_CODECS
from raytrain_het.config import HetConfig
from raytrain_het.jobs.config import JobConfig
from raytrain_het.jobs.training_step import TrainingStep
from raytrain_het.probing.cores import cpu_limit
from raytrain_het.probing.links import Address, Link, LinkServer, probe_link
from raytrain_het.probing.probes import BLOCKS, hardware_key, hardware_name, one_at_a_time, probe_hardware, probe_step
from raytrain_het.probing.profile_store import ProfileStore


class ProbeWorker:
    """Measures the device and the links that one worker of a run would have.

    Args:
        device: Where the worker would train: ``cpu``, ``cuda``, ``cuda:1``.
        num_threads: The threads that the worker would compute with.
        host: The address by which peers reach it.
    """

    def __init__(self, *, device: str, num_threads: int, host: str = "127.0.0.1") -> None:
        torch.set_num_threads(num_threads)
        self.device, self.host = torch.device(device), host
        self._step: TrainingStep | None = None
        self._server: LinkServer | None = None

    def hardware(self, devices: Sequence[str], seconds_each: float) -> list[Profile]:
        """Measure devices of this machine, and keep their profiles."""
        profiles = [probe_hardware(device, seconds_each=seconds_each) for device in devices]
        for device, profile in zip(devices, profiles, strict=True):
            ProfileStore().keep_profile(hardware_key(device), profile)
        return profiles

    def prepare(self, job: type[JobConfig], config: dict[str, Any], settings: HetConfig) -> int:
        """Make a job's training step; returns the bytes of its gradient in messages."""
        with one_at_a_time("prepare"):  # The workers of a machine do not all read the same data at once.
            self._step = job.make_step(config, self.device)
            self._step.micro_batch_size = settings.micro_batch_size
            self._step(1)
        return max(map(self._step.gradient_bytes, settings.possible_codecs))

    def step(self, sizes: Sequence[int], seconds: float) -> tuple[Profile, float]:
        """Measure the step that :meth:`prepare` has made, and keep its cost for runs of this model.

        Returns:
            The profile with the cost, and the relative spread of the step's time, the median over sizes.
        """
        assert self._step is not None
        cost, times = probe_step(self._step, _feasible(self._step, sizes, seconds), seconds=seconds)
        ProfileStore().keep_step(hardware_key(self.device), self._step.key, cost)
        profile = Profile(
            hardware=hardware_name(self.device),
            device=str(self.device),
            cores=cpu_limit().cores,
            num_threads=torch.get_num_threads(),
            step=cost,
        )
        return profile, statistics.median(measured.spread for measured in times.values())

    def codecs(self) -> tuple[dict[str, CodecCost], int, float]:
        """What ``auto``'s codecs cost on this device, how many elements of the prepared job's gradient they compress,
        and what a byte costs, see :func:`byte_cpu_s`."""
        assert self._step is not None
        codecs, shapes = ((word, codec_of(word)) for word in AUTO_CODECS), self._step.compressed_shapes
        cores = cpu_limit().cores
        return codec_costs(codecs, cores=cores, shapes=shapes), sum(map(math.prod, shapes)), byte_cpu_s(cores=cores)

    def listen(self) -> Address:
        """See :class:`raytrain_het.probing.links.LinkEnd`."""
        self._server = self._server or LinkServer(self.host)
        return self._server.address

    def link_to(self, address: Address) -> Link | None:
        """See :class:`raytrain_het.probing.links.LinkEnd`."""
        with contextlib.suppress(OSError):
            return probe_link(address)
        return None


def _feasible(step: TrainingStep, sizes: Sequence[int], seconds: float) -> list[int]:
    """The sizes that fit in memory and take ``seconds`` at most; the two smallest in any case."""
    chosen: list[int] = []
    slope = 0.0
    for b in sorted(set(sizes)):
        if len(chosen) >= 2 and BLOCKS * slope * b > seconds:
            break
        try:
            step(b)
            began = time.perf_counter()
            step(b)
        except torch.OutOfMemoryError:
            if not chosen:
                raise
            break
        slope = (time.perf_counter() - began) / b
        chosen.append(b)
    return chosen
