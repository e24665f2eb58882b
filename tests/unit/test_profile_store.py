"""The store of profiles: a convenience that never fails."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

from raytrain_het.balance.batch_shares import StepCost
from raytrain_het.balance.profile import Measurement, Profile
from raytrain_het.probing import profile_store
from raytrain_het.probing.profile_store import ProfileStore
from raytrain_het.testing import throttle

PROFILE = Profile(
    hardware="AMD EPYC (2 cores)",
    device="cpu",
    cores=1.5,
    num_threads=2,
    flops={"fp32": Measurement(1e11, 0.01, 5)},
    memory_bandwidth=Measurement(1e10, 0.02, 5),
)


def test_what_is_kept_is_found_by_another(tmp_path: Path) -> None:
    store = ProfileStore(tmp_path / "a" / "b")
    assert store.profile("box") is None and store.step("box", "net") is None
    store.keep_profile("box", PROFILE)
    store.keep_step("box", "net", StepCost(0.1, 0.2))
    other = ProfileStore(tmp_path / "a" / "b")
    assert other.profile("box") == PROFILE
    assert other.step("box", "net") == StepCost(0.1, 0.2)
    assert other.profile("another box") is None and other.step("box", "another net") is None
    assert all(path.suffix == ".json" for path in (tmp_path / "a" / "b").iterdir())


def test_the_newest_counts(tmp_path: Path) -> None:
    store = ProfileStore(tmp_path)
    store.keep_step("box", "net", StepCost(0.1, 0.2))
    store.keep_step("box", "net", StepCost(0.3, 0.4))
    assert store.step("box", "net") == StepCost(0.3, 0.4)


@pytest.mark.parametrize(
    "text", ["", "{", "null", "[]", '{"key": "box"}', '{"key": "box", "value": {"flops": 1}}', "\x00\xff"]
)
def test_a_damaged_file_is_the_same_as_none(tmp_path: Path, text: str) -> None:
    store = ProfileStore(tmp_path)
    store.keep_profile("box", PROFILE)
    store.keep_step("box", "net", StepCost(0.1, 0.2))
    for path in tmp_path.iterdir():
        path.write_text(text, "latin-1")
    assert store.profile("box") is None
    assert store.step("box", "net") is None
    store.keep_profile("box", PROFILE)
    assert store.profile("box") == PROFILE


@pytest.mark.parametrize(
    "cost",
    [("x", None), (0.1, 0.0), (0.1, -1.0), (-0.1, 0.2), (math.nan, 0.2), (0.1, math.inf), (True, 0.2), (0.1, [1])],
)
def test_a_kept_cost_that_none_can_be_is_the_same_as_none(tmp_path: Path, cost: tuple[Any, Any]) -> None:
    store = ProfileStore(tmp_path)
    store.keep_step("box", "net", StepCost(*cost))
    assert store.step("box", "net") is None
    store.keep_step("box", "net", StepCost(0.0, 0.2))
    assert store.step("box", "net") == StepCost(0.0, 0.2)


@pytest.mark.parametrize(
    "changes",
    [
        {"cores": "many"},
        {"num_threads": 0},
        {"hardware": None},
        {"flops": {"fp32": Measurement(0.0, 0.1, 5)}},
        {"memory_bandwidth": Measurement(math.nan, 0.1, 5)},
    ],
)
def test_a_kept_profile_that_none_can_be_is_the_same_as_none(tmp_path: Path, changes: dict[str, Any]) -> None:
    store = ProfileStore(tmp_path)
    store.keep_profile("box", dataclasses.replace(PROFILE, **changes))
    assert store.profile("box") is None


def test_a_worker_that_is_stopped_and_continued_keeps_and_believes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The key of its hardware does not show that it is slow."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(profile_store, "_keeps_nothing", False)
    monkeypatch.setattr(throttle, "StopAndGo", MagicMock())
    monkeypatch.setattr(throttle, "_own", [])
    monkeypatch.setattr("torch.set_num_threads", lambda _: None)
    ProfileStore().keep_profile("box", PROFILE)
    throttle.SlowWorkers((0.5,), None)(0)
    assert ProfileStore().profile("box") is None
    ProfileStore().keep_step("box", "net", StepCost(0.1, 0.2))
    assert len(list(tmp_path.rglob("*.json"))) == 1
    assert ProfileStore(tmp_path / "named").folder == tmp_path / "named"


def test_a_store_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = ProfileStore(tmp_path / "file" / "store")
    store.keep_profile("box", PROFILE)
    assert store.profile("box") is None


def test_the_folder_follows_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert ProfileStore().folder == tmp_path / "raytrain_het" / "profiles"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert ProfileStore().folder == tmp_path / ".cache" / "raytrain_het" / "profiles"
