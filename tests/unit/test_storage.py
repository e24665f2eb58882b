"""A checkpoint is on the storage as a whole or not at all."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
from ray.train.v2._internal.execution.storage import StorageContext

from raytrain_het.errors import CheckpointError, ConfigError
from raytrain_het.ray_train import storage as module
from raytrain_het.ray_train.storage import RayStorage, write_atomically
from raytrain_het.worker.state.storage import LocalStorage, StagedStorage


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


NAME = "checkpoint_000000007_0"


def of_life(tmp_path: Path, life: int, text: str, *, run: str = "a") -> str:
    """A local directory with a checkpoint of some life of a run."""
    folder = tmp_path / f"{run}{life}{text}"
    folder.mkdir()
    (folder / "model.pt").write_text(text)
    identity = {"id": run, "life": life, "key": f"{life}.7.0"}
    (folder / "het.json").write_text(json.dumps({"run": identity}))
    return str(folder)


@pytest.fixture(params=["ray", "local"])
def store(request: pytest.FixtureRequest, context: StorageContext, tmp_path: Path) -> StagedStorage:
    """Storages whose directories can be renamed."""
    return RayStorage(context) if request.param == "ray" else LocalStorage(tmp_path / "storage")


def directories(store: StagedStorage) -> list[str]:
    return sorted(path.name for path in Path(store.root).iterdir() if path.is_dir())


def test_a_checkpoint_that_is_stored_by_two_holders_stays_the_firsts(store: StagedStorage, tmp_path: Path) -> None:
    """The second may be cut short at any moment: it was let go."""
    path = Path(store.persist(of_life(tmp_path, 3, "one"), NAME))
    first = path.stat().st_ino
    assert store.persist(of_life(tmp_path, 3, "two"), NAME) == str(path)
    assert path.stat().st_ino == first
    assert directories(store) == [NAME]


def test_holders_that_store_at_the_same_moment_both_find_it_there(store: StagedStorage, tmp_path: Path) -> None:
    folders = [of_life(tmp_path, 3, text) for text in ("one", "two", "three", "four")]
    together, paths = threading.Barrier(len(folders)), []

    def persist(folder: str) -> None:
        staged = store.stage(NAME, 3)
        together.wait()
        paths.append(store.persist(folder, NAME, staged))

    threads = [threading.Thread(target=persist, args=(folder,)) for folder in folders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert paths == [f"{store.root}/{NAME}"] * len(folders)
    assert directories(store) == [NAME]


@pytest.mark.parametrize("run", ["a", "another run"])
def test_what_an_older_life_has_left_under_the_name_is_replaced(store: StagedStorage, tmp_path: Path, run: str) -> None:
    store.persist(of_life(tmp_path, 3, "old"), NAME)
    path = store.persist(of_life(tmp_path, 4, "new", run=run), NAME)
    assert Path(path, "model.pt").read_text() == "new"
    assert directories(store) == [NAME]


@pytest.mark.parametrize("run", ["a", "another run"])
def test_a_holder_that_wakes_up_late_does_not_replace_what_a_newer_life_has_stored(
    store: StagedStorage, tmp_path: Path, run: str
) -> None:
    path = store.persist(of_life(tmp_path, 4, "new", run=run), NAME)
    with pytest.raises(CheckpointError, match="a newer life of the run has stored its own"):
        store.persist(of_life(tmp_path, 3, "old"), NAME)
    assert Path(path, "model.pt").read_text() == "new"
    assert directories(store) == [NAME]


def test_a_newer_checkpoint_that_comes_in_between_is_put_back(
    store: StagedStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A holder is stopped between its look at what is there and its move."""
    store.persist(of_life(tmp_path, 2, "oldest"), NAME)
    folder, newer = of_life(tmp_path, 3, "old"), of_life(tmp_path, 4, "new")
    move, asleep = store._move, [True]

    def wake_up_late(path: str, to: str) -> None:
        if path == f"{store.root}/{NAME}" and asleep:
            asleep.clear()
            store.persist(newer, NAME)
        move(path, to)

    monkeypatch.setattr(store, "_move", wake_up_late)
    with pytest.raises(CheckpointError, match="a newer life"):
        store.persist(folder, NAME)
    assert Path(store.root, NAME, "model.pt").read_text() == "new"
    assert directories(store) == [NAME]


def test_parts_of_several_workers_make_one_checkpoint_and_half_ones_are_no_part_of_it(
    store: StagedStorage, tmp_path: Path
) -> None:
    staged = store.stage(NAME, 3)
    (tmp_path / "worker_1.pt").write_text("part")
    store.put(tmp_path / "worker_1.pt", staged)
    Path(staged, ".worker_2.pt.0123abcd").write_text("ha")  # Its writer has died.
    assert store.sees(staged)
    assert directories(store) == [Path(staged).name]
    path = store.persist(of_life(tmp_path, 3, "all"), NAME, staged)
    assert sorted(p.name for p in Path(path).iterdir()) == ["het.json", "model.pt", "worker_1.pt"]
    assert not store.sees(staged)


def test_what_others_have_staged_in_vain_is_removed_and_what_others_write_now_is_not(
    store: StagedStorage, tmp_path: Path
) -> None:
    for life in (2, 3):
        store.stage("checkpoint_000000009_0", life)
    store.stage(NAME, 3)
    store.persist(of_life(tmp_path, 3, "all"), NAME)
    left = directories(store)
    assert len(left) == 2
    assert left[0].startswith(".checkpoint_000000009_0.3-")
    assert left[1] == NAME


@pytest.fixture
def objects(tmp_path: Path) -> RayStorage:
    """A store that can't rename."""
    return RayStorage(StorageContext("mock:///runs", "run"))


def test_where_nothing_can_be_renamed_each_checkpoint_has_a_directory_of_its_own(
    objects: RayStorage, tmp_path: Path
) -> None:
    old = objects.persist(of_life(tmp_path, 3, "old"), NAME)
    staged = objects.stage(NAME, 4)
    (tmp_path / "worker_1.pt").write_text("part")
    objects.put(tmp_path / "worker_1.pt", staged)
    new = objects.persist(of_life(tmp_path, 4, "new"), NAME, staged)
    assert new == staged != old
    for path, text, names in ((old, "old", 2), (new, "new", 3)):
        with objects.fetch(path) as folder:
            assert Path(folder, "model.pt").read_text() == text
            assert len(list(Path(folder).iterdir())) == names
    with objects.fetch(new, lambda name: not name.startswith("worker")) as folder:
        assert sorted(p.name for p in Path(folder).iterdir()) == ["het.json", "model.pt"]


def test_where_nothing_can_be_renamed_what_makes_a_checkpoint_comes_last(
    objects: RayStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored: list[str] = []
    upload = objects._upload

    def full_at_last(file: str, path: str) -> None:
        stored.append(Path(path).name)
        if stored[-1] == "het.json":
            raise OSError(28, "No space left on device")
        upload(file, path)

    monkeypatch.setattr(objects, "_upload", full_at_last)
    with pytest.raises(CheckpointError, match="No space left"):
        objects.persist(of_life(tmp_path, 3, "one"), NAME)
    assert stored == ["model.pt", "het.json"]
    assert objects._names(objects.root) == [".validate_storage_marker"]


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


def test_a_part_that_is_written_while_a_staged_folder_is_removed_is_removed_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LocalStorage(tmp_path)
    staged = Path(store.stage("checkpoint_000000010_0"))
    remove, written = shutil.rmtree, []

    def another_worker_writes(path: Any, *args: Any, **kwargs: Any) -> None:
        remove(path, *args, **kwargs)
        if not written:
            written.append(staged / "worker_1.pt")
            staged.mkdir()
            written[0].write_bytes(b"half")

    monkeypatch.setattr(shutil, "rmtree", another_worker_writes)
    store.discard(str(staged))
    assert written
    assert not list(tmp_path.iterdir())
