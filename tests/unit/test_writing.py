"""A checkpoint is written by all workers, each its own part; whoever is gone is missing, whoever fails fails it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from collectives_fakes import record_of

from raytrain_het.errors import CheckpointError
from raytrain_het.membership.agent import RunOver
from raytrain_het.membership.record import Member
from raytrain_het.worker.state import checkpoint as files
from raytrain_het.worker.state.state_server import StateServer
from raytrain_het.worker.state.storage import LocalStorage
from raytrain_het.worker.state.writing import Writer

KEY = "3.7.0"
NAME = "checkpoint_000000007_0"
META = {"run": {"id": "a", "life": 3, "key": KEY}, "world_size": 3, "extras": ["features"]}
SNAPSHOT = {
    "model": {"weight": torch.ones(2)},
    "optimizer": {"state": {}, "param_groups": []},
    "registered": {"mine": {"names": {"a", "b"}}},
    "extras": {"features": ["age", "size"]},
}


class Watched(LocalStorage):
    """Knows what it has stored, and can fail or be blind."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.stored: list[str] = []
        self.full = self.blind = False

    def sees(self, staged: str) -> bool:
        return not self.blind and super().sees(staged)

    def put(self, file: str | Path, staged: str) -> None:
        if self.full or self.blind:
            raise OSError(28, "No space left on device")
        self.stored.append(Path(file).name)
        super().put(file, staged)


class Agent:
    """A member that hears nothing."""

    def __init__(self, member: Member) -> None:
        self.member, self.gone = member, None
        self.record: Any = None


class Worker:
    """One worker's end."""

    def __init__(self, slot: int, root: Path) -> None:
        self.server = StateServer("127.0.0.1", lambda: "token")
        self.member = Member(uid=f"{slot}-a", slot=slot, host="127.0.0.1", state_port=self.server.port, device="cpu")
        self.storage, self.agent = Watched(root), Agent(self.member)
        self.writer = Writer(self.agent, self.server, self.storage)  # type: ignore[arg-type]
        self.writer.offer(KEY, {"codec": {"weight": {"residual": torch.full((2,), float(slot))}}, "extras": {}})


@pytest.fixture
def workers(tmp_path: Path) -> Iterator[list[Worker]]:
    workers = [Worker(slot, tmp_path / "storage") for slot in range(3)]
    members = tuple(w.member for w in workers)
    for worker in workers:
        worker.agent.record = dataclasses.replace(record_of([1.0, 1.0, 1.0]), members=members)
    yield workers
    for worker in workers:
        worker.server.close()


def write(workers: list[Worker]) -> str:
    return workers[0].writer.write(NAME, META, SNAPSHOT, [w.member for w in workers])


def residuals(path: str) -> list[float | None]:
    found = [files.read_worker(path, slot) for slot in range(3)]
    return [own and float(own["codec"]["weight"]["residual"][0]) for own in found]


def lose(worker: Worker, others: list[Worker]) -> None:
    worker.server.close()
    for other in others:
        left = tuple(m for m in other.agent.record.members if m.uid != worker.member.uid)
        other.agent.record = dataclasses.replace(other.agent.record, members=left)


def test_each_worker_writes_its_own_part_and_the_writer_what_all_have_in_common(workers: list[Worker]) -> None:
    path = write(workers)
    assert [w.storage.stored for w in workers[1:]] == [["worker_1.pt"], ["worker_2.pt"]]
    assert sorted(workers[0].storage.stored) == [
        "extra_features.pt",
        "het.json",
        "model.pt",
        "training.pkl",
        "training.pt",
        "worker_0.pt",
    ]
    assert residuals(path) == [0.0, 1.0, 2.0]
    state = files.read_state(path)
    assert state["registered"]["mine"]["names"] == {"a", "b"}
    assert state["extras"] == {"features": ["age", "size"]}
    assert sorted(p.name for p in Path(path).parent.iterdir()) == [NAME]


def test_the_part_of_a_worker_that_is_gone_is_missing(workers: list[Worker]) -> None:
    lose(workers[1], workers)
    path = write(workers)
    assert json.loads(Path(path, "het.json").read_text())["workers"] == [0, 2]
    assert residuals(path) == [0.0, None, 2.0]


def test_a_worker_that_dies_while_it_writes_leaves_no_half_file(workers: list[Worker]) -> None:
    storage = workers[1].storage

    def die(file: str, path: str) -> None:
        Path(path).write_text("ha")
        lose(workers[1], workers)
        raise RunOver

    storage._upload = die  # type: ignore[method-assign]
    path = write(workers)
    assert residuals(path) == [0.0, None, 2.0]
    assert not [p for p in Path(path).iterdir() if "worker_1" in p.name]


def test_a_worker_whose_storage_is_full_fails_the_checkpoint_and_is_named(workers: list[Worker]) -> None:
    good = write(workers)
    workers[2].storage.full = True
    with pytest.raises(CheckpointError, match="worker 2 could not write its part: OSError.*No space left"):
        workers[0].writer.write("checkpoint_000000008_0", META, SNAPSHOT, [w.member for w in workers])
    assert [str(p) for p in Path(good).parent.iterdir()] == [good]


def test_the_part_of_a_worker_that_does_not_see_the_storage_goes_through_the_writer(workers: list[Worker]) -> None:
    workers[2].storage.blind = True
    path = write(workers)
    assert residuals(path) == [0.0, 1.0, 2.0]
    assert "worker_2.pt" in workers[0].storage.stored


def test_what_a_workers_own_part_cannot_hold_is_named(workers: list[Worker]) -> None:
    workers[1].writer.offer(KEY, {"codec": {}, "extras": {"mine": lambda: None}})
    with pytest.raises(
        CheckpointError, match=r"worker 1 could not write.*worker_1\['extras'\]\['mine'\] is a function"
    ):
        write(workers)


def test_a_second_writer_takes_over_from_one_that_has_died_halfway(workers: list[Worker]) -> None:
    workers[0].storage.stage(NAME, 3)  # And no word from it any more.
    lose(workers[0], workers)
    path = workers[1].writer.write(NAME, META, SNAPSHOT, [w.member for w in workers])
    assert residuals(path) == [None, 1.0, 2.0]
    assert [str(p) for p in Path(path).parent.iterdir()] == [path]
