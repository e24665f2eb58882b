"""Measure a device: its speed, and the time of a model's training step on it.

A measurement counts the work that is done in tens of milliseconds of wall time, and never times one short operation: a
process under a CPU quota runs at full speed until it has used its part of a period, and then stands still.
"""

from __future__ import annotations

import contextlib
import math
import os
import platform
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from raytrain_het.balance.batch_shares import StepCost
from raytrain_het.balance.profile import Measurement, Profile
from raytrain_het.probing.cores import cpu_limit
from raytrain_het.probing.profile_store import ProfileStore

BLOCKS = 5
"""Each quantity is measured so many times."""
MIN_BLOCK_S = 0.02
LOCK_WAIT_S = 60.0
"""A process waits for its turn no longer than this, then goes on: a stopped process must not hold up a machine."""
MIN_SLOPE = 0.01
"""The fitted time of a sample is at least this part of ``t(b) / b`` of the largest batch: noise may tilt the line."""

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_MIB = 2**20


def probe_hardware(device: str | torch.device = "cpu", *, seconds_each: float = 0.1) -> Profile:
    """Measure a device: matrix products (fp32, bf16; fp16 on CUDA), a copy in its memory, and a copy from the host.

    Each quantity takes about ``seconds_each``, in ``BLOCKS`` blocks of at least 20 ms; more under a CPU quota, where a
    block is at least two whole periods of it. Probes on one machine take turns.
    """
    device = torch.device(device)
    is_cuda = device.type == "cuda"
    finish = partial(torch.cuda.synchronize, device) if is_cuda else _nothing

    def speed(work: Callable[[], object], amount: float) -> Measurement:
        def run() -> None:
            work()
            finish()

        run()  # The first run maps pages and chooses kernels.
        return Measurement.of([amount / _seconds_each(run, seconds_each / BLOCKS) for _ in range(BLOCKS)])

    with one_at_a_time(), torch.inference_mode():
        flops = {
            name: _product_speed(device, dtype, speed) for name, dtype in _DTYPES.items() if is_cuda or name != "fp16"
        }
        size = (256 if is_cuda else _host_copy_mib()) * _MIB
        source = torch.ones(size, dtype=torch.uint8, device=device)
        target = torch.zeros_like(source)
        memory = speed(lambda: target.copy_(source), 2 * size)
        to_device = None
        if is_cuda:
            host = torch.ones(64 * _MIB, dtype=torch.uint8, pin_memory=True)
            to_device = speed(lambda: target[: host.numel()].copy_(host, non_blocking=True), host.numel())
    return Profile(
        hardware=hardware_name(device),
        device=str(device),
        cores=cpu_limit().cores,
        num_threads=torch.get_num_threads(),
        flops=flops,
        memory_bandwidth=memory,
        host_to_device=to_device,
    )


def known_or_probed(device: str | torch.device = "cpu", *, store: ProfileStore | None = None) -> Profile:
    """The kept profile of this hardware; if there is none, a new one, which is then kept."""
    store = store or ProfileStore()
    key = hardware_key(device)
    profile = store.profile(key)
    if profile is None:
        with one_at_a_time("profile"):
            profile = store.profile(key)  # Another process may have measured it meanwhile.
            if profile is None:
                profile = probe_hardware(device)
                store.keep_profile(key, profile)
    return profile


def probe_step(
    run_step: Callable[[int], object], batch_sizes: Sequence[int], *, seconds: float = 1.0
) -> tuple[StepCost, dict[int, Measurement]]:
    """Measure a training step at several batch sizes, in turns, and fit ``t(b) = c + k b``.

    Args:
        run_step: Does a whole step with so many samples, and returns when it is done (also on a GPU).
        batch_sizes: Different ones, from 1; it takes two or more to tell ``c`` from ``k``.
        seconds: For all blocks together; more if blocks would be too short (see :func:`probe_hardware`).

    Returns:
        The cost, and the seconds of a step by batch size.
    """
    sizes = sorted(set(batch_sizes), reverse=True)
    for b in sizes:  # The largest comes first, so that memory is allocated once.
        run_step(b)
    times: dict[int, list[float]] = {b: [] for b in sizes}
    for _ in range(BLOCKS):
        for b in sizes:
            times[b].append(_seconds_each(partial(run_step, b), seconds / (BLOCKS * len(sizes))))
    measured = {b: Measurement.of(ts) for b, ts in sorted(times.items())}
    return fit_step_cost({b: m.median for b, m in measured.items()}), measured


def fit_step_cost(times: dict[int, float]) -> StepCost:
    """Least squares of relative errors, ``sum ((c + k b) / t - 1)^2``, with ``c >= 0`` and ``k`` above 0.

    ``k`` is at least ``MIN_SLOPE`` times ``t(b) / b`` of the largest batch; a single size gives ``c = 0``.
    """
    largest = max(times)
    points = [(b / t, 1 / t) for b, t in times.items()]  # (c y + k x - 1)^2
    xx, xy, yy = (sum(f(x, y) for x, y in points) for f in (lambda x, y: x * x, lambda x, y: x * y, lambda x, y: y * y))
    x1, y1 = sum(x for x, _ in points), sum(y for _, y in points)
    determinant = xx * yy - xy * xy
    k, c = 0.0, -1.0
    if len(times) > 1 and determinant > 0:
        k, c = (x1 * yy - y1 * xy) / determinant, (y1 * xx - x1 * xy) / determinant
    if c < 0:
        k, c = x1 / xx, 0.0
    least = MIN_SLOPE * times[largest] / largest
    if k < least:
        k = least
        c = max(0.0, (y1 - k * xy) / yy)
    return StepCost(c, k)


@contextlib.contextmanager
def one_at_a_time(name: str = "probe", *, wait_s: float = LOCK_WAIT_S) -> Iterator[None]:
    """Processes of this user on this machine take turns in the block.

    A process that has waited for ``wait_s`` goes on without its turn.
    """
    folder = Path(tempfile.gettempdir()) / f"raytrain_het-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    lock = FileLock(folder / f"{name}.lock")
    with contextlib.suppress(Timeout):
        lock.acquire(timeout=wait_s, poll_interval=0.01)
    try:
        yield
    finally:
        lock.release()


def hardware_name(device: str | torch.device = "cpu") -> str:
    """The hardware's name, for people."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cores = cpu_limit().cores
    return f"{_cpu_name()} ({cores:.3g} core{'' if cores == 1 else 's'})"


def hardware_key(device: str | torch.device = "cpu") -> str:
    """The key of a kept profile: the hardware, the cores and threads that may be used, and torch's version."""
    cores, threads = f"{cpu_limit().cores:.3g} cores", f"{torch.get_num_threads()} threads"
    return f"{hardware_name(device)}, {torch.device(device).type}, {cores}, {threads}, torch {torch.__version__}"


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()


def _seconds_each(run: Callable[[], object], block_s: float) -> float:
    """Wall seconds of one run, over a block of them.

    Under a CPU quota a block is two whole periods or more: it then has the same computing time wherever in a period it
    begins.
    """
    period_s = cpu_limit().period_s
    block_s = max(block_s, MIN_BLOCK_S)
    if period_s:
        block_s = period_s * max(2, math.ceil(block_s / period_s))
    count, began = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - began) < block_s:
        run()
        count += 1
    return elapsed / count


def _product_speed(
    device: torch.device, dtype: torch.dtype, speed: Callable[[Callable[[], object], float], Measurement]
) -> Measurement:
    """The product of square matrices, the smallest power of two that takes 2 ms or is large enough for the device."""
    n, most = (1024, 8192) if device.type == "cuda" else (256, 2048)
    while True:
        a = torch.full((n, n), 1 / n, dtype=dtype, device=device)
        b, out = a.clone(), torch.empty_like(a)
        work = partial(torch.mm, a, b, out=out)
        if n == most or _typical_s(work, device) > 0.002:
            return speed(work, 2.0 * n**3)
        n *= 2


def _typical_s(work: Callable[[], object], device: torch.device) -> float:
    times = []
    for _ in range(4):  # The first one warms up, and the median leaves it out.
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def _host_copy_mib() -> int:
    """Twice the largest cache, from 64 to 256 MiB, but at most a sixteenth of the memory."""
    caches = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        with contextlib.suppress(OSError, ValueError):
            caches.append(int(path.read_text().strip().removesuffix("K")) // 1024)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // _MIB
    return max(1, min(256, max(64, 2 * max(caches)), memory // 16))


def _nothing() -> None:
    pass
