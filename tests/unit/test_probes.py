"""Probes: what they count, what they fit, and that they take turns."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytrain_het.balance.profile import Measurement, Profile
from raytrain_het.probing import probes
from raytrain_het.probing.cores import CpuLimit, cpu_limit
from raytrain_het.probing.probes import fit_step_cost, known_or_probed, one_at_a_time, probe_hardware, probe_step
from raytrain_het.probing.profile_store import ProfileStore


@pytest.fixture
def four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})


def tree(root: Path, membership: str, files: dict[str, str]) -> tuple[Path, Path]:
    for name, text in files.items():
        (root / "fs" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "fs" / name).write_text(text)
    (root / "cgroup").write_text(membership)
    return root / "fs", root / "cgroup"


@pytest.mark.usefixtures("four_cores")
@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        ("0::/\n", {}, CpuLimit(4, 0)),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000", "a/cpu.max": "50000 100000"}, CpuLimit(0.5, 0.1)),
        ("0::/a\n", {"a/cpu.max": "900000 100000"}, CpuLimit(4, 0)),
        (
            "4:cpu,cpuacct:/x\n1:memory:/y\n",
            {"cpu,cpuacct/x/cpu.cfs_quota_us": "25000", "cpu,cpuacct/x/cpu.cfs_period_us": "10000"},
            CpuLimit(2.5, 0.01),
        ),
        ("2:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, CpuLimit(4, 0)),
        # In a container: the path is the host's, the files are mounted at the top.
        ("0::/docker/0123\n", {"cpu.max": "150000 100000"}, CpuLimit(1.5, 0.1)),
    ],
)
def test_cores_are_the_least_of_affinity_and_quotas(
    tmp_path: Path, membership: str, files: dict[str, str], expected: CpuLimit
) -> None:
    assert cpu_limit(*tree(tmp_path, membership, files)) == expected


@pytest.mark.usefixtures("four_cores")
def test_without_control_groups_affinity_counts(tmp_path: Path) -> None:
    assert cpu_limit(tmp_path, tmp_path / "none") == CpuLimit(4, 0)


def test_a_measurements_spread_is_deaf_to_one_odd_value() -> None:
    assert Measurement.of([10, 10, 10, 10, 1000]) == Measurement(10, 0, 5)
    assert Measurement.of([9, 10, 11]).spread == pytest.approx(0.148)


def test_a_cpu_is_measured_and_its_profile_survives_json() -> None:
    profile = probe_hardware("cpu", seconds_each=0.01)
    assert set(profile.flops) == {"fp32", "bf16"}
    assert all(m.median > 1e6 and m.repeats == probes.BLOCKS for m in profile.flops.values())
    assert profile.memory_bandwidth is not None and profile.memory_bandwidth.median > 1e6
    assert profile.host_to_device is None and profile.cores > 0 and profile.num_threads >= 1
    assert Profile.from_json(profile.to_json()) == profile


class Machine:
    """A clock and a CPU under a quota: in each period it works for ``quota_s`` and then stands still."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, quota_s: float = 1.0, period_s: float = 0.0) -> None:
        self.now, self.left, self.quota_s, self.period_s = 0.0, quota_s, quota_s, period_s
        monkeypatch.setattr(probes.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(probes, "cpu_limit", lambda: CpuLimit(quota_s / (period_s or 1), period_s))

    def work(self, seconds: float) -> None:
        while self.period_s and seconds > self.left:
            seconds -= self.left
            self.now, self.left = (self.now // self.period_s + 1) * self.period_s, self.quota_s
        self.now, self.left = self.now + seconds, self.left - seconds


@pytest.mark.parametrize("cores", [0.1, 0.3, 0.5, 0.8])
def test_a_quota_is_seen_however_short_the_work(monkeypatch: pytest.MonkeyPatch, cores: float) -> None:
    machine = Machine(monkeypatch, quota_s=cores / 10, period_s=0.1)
    _, measured = probe_step(lambda b: machine.work(0.001 * b), [1], seconds=0.01)
    assert measured[1].median == pytest.approx(0.001 / cores, rel=0.1)


def test_a_step_is_fitted_from_blocks_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    machine, order = Machine(monkeypatch), []

    def step(b: int) -> None:
        order.append(b)
        machine.work(0.005 + 0.002 * b)

    cost, measured = probe_step(step, [4, 64, 16], seconds=0.5)
    assert (cost.fixed_s, cost.per_sample_s) == (pytest.approx(0.005), pytest.approx(0.002))
    assert {b: m.median for b, m in measured.items()} == {b: pytest.approx(0.005 + 0.002 * b) for b in (4, 16, 64)}
    assert order[:3] == [64, 16, 4]
    turns = [b for b, before in zip(order[3:], order[2:], strict=False) if b != before]
    assert turns == [64, 16, 4] * probes.BLOCKS


@given(st.floats(0, 1), st.floats(1e-6, 1), st.sets(st.integers(1, 4096), min_size=2, max_size=5))
def test_the_fit_of_exact_times_is_exact(c: float, k: float, sizes: set[int]) -> None:
    cost = fit_step_cost({b: c + k * b for b in sizes})
    if k * max(sizes) > 2 * probes.MIN_SLOPE * (c + k * max(sizes)):
        assert all(cost.step_s(b) == pytest.approx(c + k * b, rel=1e-6) for b in sizes)


@given(st.dictionaries(st.integers(1, 4096), st.floats(1e-6, 100), min_size=1, max_size=6))
def test_a_fit_is_a_valid_cost_whatever_was_measured(times: dict[int, float]) -> None:
    cost = fit_step_cost(times)
    largest = max(times)
    assert cost.fixed_s >= 0
    assert cost.per_sample_s >= 0.999 * probes.MIN_SLOPE * times[largest] / largest


def test_probes_take_turns(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(probes.tempfile, "gettempdir", lambda: str(tmp_path))
    inside = threading.Event()

    def other() -> None:
        with one_at_a_time():
            inside.set()

    thread = threading.Thread(target=other)
    with one_at_a_time():
        thread.start()
        assert not inside.wait(0.1)
        with one_at_a_time(wait_s=0.05):  # It does not wait for ever for whoever is stopped inside.
            pass
        with one_at_a_time("another"):
            pass
    assert inside.wait(10)
    thread.join()


def test_known_hardware_is_not_measured_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[Any] = []
    profile = Profile(hardware="x", device="cpu", cores=1, num_threads=1)
    monkeypatch.setattr(probes, "probe_hardware", lambda device: calls.append(device) or profile)
    store = ProfileStore(tmp_path)
    assert known_or_probed(store=store) == known_or_probed(store=store) == profile
    assert calls == ["cpu"]
