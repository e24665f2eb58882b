"""Checkpoints on the run's storage. A checkpoint is there as a whole, or not at all."""

from __future__ import annotations

import contextlib
import logging
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.fs
from pyarrow.fs import FileType
from ray.train import RunConfig
from ray.train.v2._internal.execution.storage import StorageContext, _pyarrow_fs_copy_files

from raytrain_het.errors import CheckpointError, ConfigError
from raytrain_het.ray_train.disk import write_some
from raytrain_het.worker.state.storage import StagedStorage, Wanted

logger = logging.getLogger(__name__)

SEEN_WITHIN_S = 3.0
_RENAMES = ("local", "hdfs", "subtree")
"""File systems on which a move is a rename, which happens as a whole or not at all."""


class RayStorage(StagedStorage):
    """A :class:`~raytrain_het.worker.state.storage.Storage` on Ray Train's storage.

    Args:
        context: Ray Train's storage of this run.
    """

    def __init__(self, context: StorageContext) -> None:
        self._context = context
        self._fs = context.storage_filesystem
        self._root = context.experiment_fs_path
        self.renames = self._fs.type_name in _RENAMES

    @property
    def root(self) -> str:
        """The run's folder."""
        return str(self._root)

    def check_seen(self, node: str) -> None:
        """Check on a worker that this is the storage that the driver has prepared. Every worker reads there, and any
        may have to write.

        Raises:
            ConfigError: It is another storage, such as a local folder of another node.
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
                return None  # It cannot be reached now, but may well be the same: a write there raises an error.
            raise ConfigError(
                f"the run's folder {self._root!r}, which the driver has prepared, is not there on node {node}: with "
                "workers on several nodes it must be a folder that all of them share, or a URI. Write "
                "RunConfig(storage_path='s3://bucket/runs') or '/a/shared/folder' (for a job: --storage)."
            ) from missing

    def stage(self, name: str, life: int = 0) -> str:
        """See :class:`~raytrain_het.worker.state.storage.Storage`.

        Raises:
            CheckpointError: The storage cannot be written.
        """
        try:
            self._context._check_validation_file()
            return super().stage(name, life)
        except Exception as error:
            raise self._not_written(name, error) from error

    def sees(self, staged: str) -> bool:
        """See :class:`~raytrain_het.worker.state.storage.Storage`. An object store has no directories to be seen."""
        return not self.renames or self._fs.get_file_info(staged).type == FileType.Directory

    def persist(self, local_dir: str, name: str, staged: str | None = None) -> str:
        """Store a checkpoint as ``<storage>/<run>/<name>``. Others are not touched.

        Returns:
            The path on the storage. If the storage cannot rename, letters that no other checkpoint has are added to the
            name.

        Raises:
            CheckpointError: It could not be written; nothing of it is left.
        """
        try:
            return super().persist(local_dir, name, staged)
        except Exception as error:
            raise self._not_written(name, error) from error

    @contextmanager
    def fetch(self, path: str, wanted: Wanted = lambda name: True) -> Iterator[str]:
        """A local directory with a checkpoint's files, while the context lasts.

        Raises:
            CheckpointError: It could not be read.
        """
        with contextlib.ExitStack() as stack:
            try:
                if self._fs.get_file_info(path).type == FileType.NotFound:
                    raise FileNotFoundError(path)
                local = path
                if self._fs.type_name != "local":
                    local = stack.enter_context(tempfile.TemporaryDirectory(prefix="het_fetched_"))
                    for name in filter(wanted, self._names(path)):
                        _pyarrow_fs_copy_files(f"{path}/{name}", f"{local}/{name}", source_filesystem=self._fs)
            except Exception as error:
                raise CheckpointError(
                    f"Checkpoint {path!r} could not be read: {_first_line(error)} Check that every node can read the "
                    "storage path, or start anew with another RunConfig(name=...)."
                ) from error
            yield local

    def _not_written(self, name: str, error: Exception) -> CheckpointError:
        if isinstance(error, CheckpointError):
            return error
        return CheckpointError(
            f"Checkpoint {name} could not be written to {self._root!r}: {_first_line(error)} Checkpoints written "
            "before are unharmed. Free space there, or take a storage (RunConfig(storage_path=...), --storage) "
            "that every node can write to, and run the same name again to go on from the last one."
        )

    def _make(self, path: str) -> None:
        self._fs.create_dir(path)

    def _upload(self, file: str, path: str) -> None:
        _pyarrow_fs_copy_files(file, path, destination_filesystem=self._fs)

    def _move(self, path: str, to: str) -> None:
        self._fs.move(path, to)

    def _remove(self, path: str) -> None:
        """Remove a directory or file that was half written, or was moved aside."""
        try:
            kind = self._fs.get_file_info(path).type
            if kind == FileType.Directory:
                self._fs.delete_dir(path)
            elif kind == FileType.File:
                self._fs.delete_file(path)
        except OSError:
            logger.warning("A half-written checkpoint could not be removed: %s", path)

    def _names(self, path: str) -> list[str]:
        found = self._fs.get_file_info(pyarrow.fs.FileSelector(path, allow_not_found=True))
        return [info.base_name for info in found]

    def _read(self, path: str) -> bytes | None:
        try:
            with self._fs.open_input_stream(path) as stream:
                return bytes(stream.read())
        except OSError:
            return None


def check_writable(run_config: RunConfig) -> StorageContext:
    """Refuse a run's folder that cannot be written, before anything starts.

    Raises:
        CheckpointError: The message has the path and the fix.
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
    """Replace a file as a whole. After an error the old file is there.

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
    """A function that writes the checkpoint manager's list as a whole. Ray's own overwrites the list in place."""

    def write() -> None:
        context = manager._storage_context
        write_atomically(context, context.checkpoint_manager_snapshot_path, manager._save_state().encode())

    return write


def _first_line(error: BaseException) -> str:
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return text if text.endswith(".") else text + "."
