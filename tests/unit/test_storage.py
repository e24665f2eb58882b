"""A checkpoint is on the storage as a whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ray.train.v2._internal.execution.storage import StorageContext

from raytrain_het.errors import CheckpointError, ConfigError
from raytrain_het.ray_train import storage as module
from raytrain_het.ray_train.storage import RayStorage, write_atomically
from raytrain_het.training.checkpoint import LocalStorage


@pytest.fixture
def context(tmp_path: Path) -> StorageContext:
    return StorageContext(str(tmp_path / "runs"), "run")


def local(tmp_path: Path, text: str) -> str:
    folder = tmp_path / "local"
    folder.mkdir(exist_ok=True)
    (folder / "model.pt").write_text(text)
    return str(folder)


def fail_halfway(source: str, target: str, **_: Any) -> None:
    Path(target).write_text("ha")
    raise OSError(28, "No space left on device")


def test_a_checkpoint_comes_back_as_it_was(context: StorageContext, tmp_path: Path) -> None:
    store = RayStorage(context)
    path = store.persist(local(tmp_path, "one"), "c1")
    with store.fetch(path) as folder:
        assert Path(folder, "model.pt").read_text() == "one"


def test_a_node_that_does_not_see_the_runs_folder_is_told_so(
    context: StorageContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SEEN_WITHIN_S", 0.3)
    store = RayStorage(context)
    store.check_seen("10.0.0.3")
    for path in Path(context.experiment_fs_path).parent.rglob("*marker*"):
        path.unlink()  # As on another machine, where the driver has prepared nothing.
    with pytest.raises(ConfigError, match=r"'.*run'.* is not there on node 10\.0\.0\.3.*share, or a URI"):
        store.check_seen("10.0.0.3")


def test_a_failed_upload_leaves_nothing_and_names_the_path(
    context: StorageContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = RayStorage(context)
    good = store.persist(local(tmp_path, "one"), "c1")
    before = sorted(p.name for p in Path(good).parent.iterdir())
    monkeypatch.setattr(module, "_pyarrow_fs_copy_files", fail_halfway)
    for name in ("c1", "c2"):  # the good one's name too
        with pytest.raises(CheckpointError, match=rf"{name} could not be written to '.*run'.*No space left.*unharmed"):
            store.persist(local(tmp_path, "two"), name)
    assert sorted(p.name for p in Path(good).parent.iterdir()) == before
    assert Path(good, "model.pt").read_text() == "one"


def test_a_checkpoint_written_again_replaces_the_old_one(context: StorageContext, tmp_path: Path) -> None:
    store = RayStorage(context)
    store.persist(local(tmp_path, "one"), "c1")
    path = store.persist(local(tmp_path, "two"), "c1")
    assert Path(path, "model.pt").read_text() == "two"
    assert [p.name for p in Path(path).parent.iterdir() if p.is_dir()] == ["c1"]


@pytest.mark.parametrize("kind", ["ray", "local"])
def test_a_checkpoint_that_is_stored_by_two_holders_stays_the_firsts(
    context: StorageContext, tmp_path: Path, kind: str
) -> None:
    """The second may be cut short at any moment: it was let go."""
    store = RayStorage(context) if kind == "ray" else LocalStorage(tmp_path / "storage")
    folder = Path(local(tmp_path, "one"), "het.json")
    folder.write_text(json.dumps({"run": {"id": "a", "life": 3, "key": "3.1.0"}}))
    path = Path(store.persist(str(folder.parent), "c1"))
    first = path.stat().st_ino
    assert store.persist(str(folder.parent), "c1") == str(path)
    assert path.stat().st_ino == first
    newer = json.dumps({"run": {"id": "a", "life": 4, "key": "4.1.0"}})  # Another life came to the same step.
    folder.write_text(newer)
    store.persist(str(folder.parent), "c1")
    assert path.stat().st_ino != first
    assert (path / "het.json").read_text() == newer
    assert [p.name for p in path.parent.iterdir() if p.is_dir()] == ["c1"]


def test_a_missing_checkpoint_is_named(context: StorageContext) -> None:
    with (
        pytest.raises(CheckpointError, match="/nowhere/c9.*could not be read"),
        RayStorage(context).fetch("/nowhere/c9"),
    ):
        pass


def test_the_list_of_checkpoints_survives_a_write_that_fails(
    context: StorageContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = context.checkpoint_manager_snapshot_path
    write_atomically(context, path, b"old")

    class Full:
        type_name = "local"

        def __getattr__(self, name: str) -> Any:
            return getattr(original, name)

        def move(self, *_: Any) -> None:
            raise OSError(28, "No space left on device")

    original = context.storage_filesystem
    context.storage_filesystem = Full()
    with pytest.raises(CheckpointError, match="No space left"):
        write_atomically(context, path, b"new")
    assert Path(path).read_bytes() == b"old"
    assert not list(Path(path).parent.glob("*.partial"))
