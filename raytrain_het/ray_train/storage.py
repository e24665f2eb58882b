"""Checkpoints on the run's storage: a checkpoint is there as a whole or not at all."""

from __future__ import annotations

import contextlib
import logging
import posixpath
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.fs
from ray.train import Checkpoint, RunConfig
from ray.train.v2._internal.execution.storage import StorageContext, _pyarrow_fs_copy_files

from raytrain_het.errors import CheckpointError, ConfigError
from raytrain_het.ray_train.disk import write_some

logger = logging.getLogger(__name__)

SEEN_WITHIN_S = 3.0
_RENAMES = ("local", "hdfs", "subtree")  # where a move is a rename, and so all or nothing


class RayStorage:
    """``training.checkpoint.Storage`` on Ray Train's storage context.

    Args:
        context: Ray Train's, of this run.
    """

    def __init__(self, context: StorageContext) -> None:
        self._context = context
        self._fs = context.storage_filesystem
        self._root = context.experiment_fs_path

    def check_seen(self, node: str) -> None:
        """Look from a worker whether this is the storage that the driver prepared: any worker may have to write, and
        each reads.

        Raises:
            ConfigError: It is not, as with a local folder and workers on several nodes.
        """
        deadline = time.monotonic() + SEEN_WITHIN_S
        while True:
            try:
                return self._context._check_validation_file()
            except RuntimeError as error:
                if time.monotonic() < deadline:  # A network file system may show old contents for a while.
                    time.sleep(0.2)
                    continue
                missing = error
            except OSError:
                return None  # Out of reach for now, and no sign of another folder: whoever writes there will tell.
            raise ConfigError(
                f"the run's folder {self._root!r}, which the driver has prepared, is not there on node {node}: with "
                "workers on several nodes it must be a folder that all of them share, or a URI. Write "
                "RunConfig(storage_path='s3://bucket/runs') or '/a/shared/folder' (for a job: --storage)."
            ) from missing

    def persist(self, local_dir: str, name: str) -> str:
        """Upload a directory as ``<storage>/<run>/<name>``.

        Where the file system can rename, it is uploaded under another name first; elsewhere (object
        stores) a failed upload is deleted. Other checkpoints are not touched.

        A checkpoint with the same ``het.json`` stays as it is: it was written by the other member that
        holds the snapshot.

        Returns:
            The path on the storage.

        Raises:
            CheckpointError: It could not be written; nothing of it is left.
        """
        final = self._path(name)
        if self._holds_same(local_dir, final):
            return final
        renames = self._fs.type_name in _RENAMES
        target = self._path(f".{name}.{uuid.uuid4().hex[:8]}.partial") if renames else final
        try:
            self._context._check_validation_file()
            self._fs.create_dir(target)
            _pyarrow_fs_copy_files(local_dir, target, destination_filesystem=self._fs)
            if renames and not self._holds_same(local_dir, final):
                self._rename(target, final)
            elif renames:
                self._delete(target)
        except Exception as error:
            self._delete(target)
            raise CheckpointError(
                f"Checkpoint {name} could not be written to {self._root!r}: {_first_line(error)} Checkpoints written "
                "before are unharmed. Free space there, or take a storage (RunConfig(storage_path=...), --storage) "
                "that every node can write to, and run the same name again to go on from the last one."
            ) from error
        return final

    @contextmanager
    def fetch(self, path: str) -> Iterator[str]:
        """A local directory with a persisted checkpoint's files, while the context lasts.

        Raises:
            CheckpointError: It could not be read.
        """
        with contextlib.ExitStack() as stack:
            try:
                local = stack.enter_context(Checkpoint(path, filesystem=self._fs).as_directory())
                if self._fs.get_file_info(path).type == pyarrow.fs.FileType.NotFound:
                    raise FileNotFoundError(path)
            except Exception as error:
                raise CheckpointError(
                    f"Checkpoint {path!r} could not be read: {_first_line(error)} Check that every node can read the "
                    "storage path, or start anew with another RunConfig(name=...)."
                ) from error
            yield local

    def _delete(self, path: str) -> None:
        """Remove what was half written, or stepped aside."""
        try:
            if self._fs.get_file_info(path).type == pyarrow.fs.FileType.Directory:
                self._fs.delete_dir(path)
        except OSError:
            logger.warning("A half-written checkpoint could not be removed: %s", path)

    def _holds_same(self, local_dir: str, final: str) -> bool:
        try:
            with self._fs.open_input_stream(f"{final}/het.json") as stream:
                return bool(stream.read() == Path(local_dir, "het.json").read_bytes())
        except OSError:
            return False

    def _path(self, name: str) -> str:
        return self._context.build_checkpoint_path_from_name(name)

    def _rename(self, source: str, final: str) -> None:
        """Move into place. A checkpoint of the same name steps aside first and comes back if that fails."""
        if self._fs.get_file_info(final).type == pyarrow.fs.FileType.NotFound:
            self._fs.move(source, final)
            return
        aside = f"{posixpath.dirname(final)}/.{posixpath.basename(final)}.{uuid.uuid4().hex[:8]}.old"
        self._fs.move(final, aside)
        try:
            self._fs.move(source, final)
        except Exception:
            self._fs.move(aside, final)
            raise
        self._delete(aside)


def check_writable(run_config: RunConfig) -> StorageContext:
    """Raise before anything starts where the run's folder cannot be written.

    Raises:
        CheckpointError: It names the path and the fix.
    """
    try:
        context = run_config.storage_context
        if context.storage_filesystem.type_name == "local":
            write_some(Path(context.experiment_fs_path))
        return context
    except Exception as error:
        raise CheckpointError(
            f"RunConfig(storage_path={run_config.storage_path!r}, name={run_config.name!r}): the run's folder cannot "
            f"be written: {_first_line(error)} Write RunConfig(storage_path=...) with a folder that exists and is "
            "writable on every node, or a URI such as 's3://bucket/runs'."
        ) from error


def write_atomically(context: StorageContext, path: str, content: bytes) -> None:
    """Replace a file as a whole: an error in between leaves the old one.

    Raises:
        CheckpointError: It could not be written.
    """
    fs = context.storage_filesystem
    target = f"{path}.{uuid.uuid4().hex[:8]}.partial" if fs.type_name in _RENAMES else path
    try:
        with fs.open_output_stream(target) as stream:
            stream.write(content)
        if target != path:
            fs.move(target, path)
    except Exception as error:
        with contextlib.suppress(Exception):
            if target != path:
                fs.delete_file(target)
        raise CheckpointError(
            f"The run's list of checkpoints could not be written to {path!r}: {_first_line(error)} The last good "
            "checkpoint is unharmed. Free space there and run the same name again to go on from it."
        ) from error


def snapshot_writer(manager: Any) -> Any:
    """Ray's checkpoint manager overwrites its list in place; this one replaces it as a whole."""

    def write() -> None:
        context = manager._storage_context
        write_atomically(context, context.checkpoint_manager_snapshot_path, manager._save_state().encode())

    return write


def _first_line(error: BaseException) -> str:
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return text if text.endswith(".") else text + "."
