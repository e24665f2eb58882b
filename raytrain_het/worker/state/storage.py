"""Where checkpoints go, and the rules by which one takes its place there: as a whole, and only over an older one.

Several workers write a checkpoint at once, into a *staged* directory; then it takes its name. A checkpoint's identity
is the run's (made anew by each ``fit()``), the run's life, and the key of the report. Two with the same identity are
the same checkpoint: two members hold each snapshot, and one that was stopped while it wrote may wake up when the
other's is there. What an older life of a run has left under the name is replaced; what a newer one has stored never is.

Where a file system cannot rename, the staged directory is the checkpoint's own for good, with letters of its own behind
the name. ``het.json`` is written last: a directory without it is no checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from raytrain_het.errors import CheckpointError

META = "het.json"
_TRIES, _PAUSE_S = 5, 0.02

Wanted = Callable[[str], bool]
"""Which files of a checkpoint are needed, by name."""


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Which checkpoint of which life of which run."""

    id: str
    """The run's, made anew by each ``fit()``."""
    life: int
    """Grows whenever all begin anew, from one run to the next too: it counts the milliseconds of the clock."""
    key: str
    """The report's."""

    @classmethod
    def of(cls, meta: str | bytes | None) -> Identity | None:
        """From the text of a ``het.json``; None where it has none."""
        try:
            return cls(**json.loads(meta or "")["run"])
        except (ValueError, KeyError, TypeError):
            return None

    def to_json(self) -> dict[str, Any]:
        """What stands in ``het.json`` as ``run``."""
        return asdict(self)


class Storage(Protocol):
    """Where checkpoints go."""

    def stage(self, name: str, life: int = 0) -> str:
        """Make a directory for a checkpoint that is going to have this name; returns its path there."""
        ...

    def sees(self, staged: str) -> bool:
        """Whether this worker can write into a directory that another one has staged."""
        ...

    def put(self, file: str | Path, staged: str) -> None:
        """Store a local file in it, as a whole or not at all."""
        ...

    def persist(self, local_dir: str, name: str, staged: str | None = None) -> str:
        """Store what is left to be stored, ``het.json`` last, and give the checkpoint its name; returns its path.

        All or nothing: where it fails, what was staged is removed.

        Raises:
            CheckpointError: a newer life of the run has a checkpoint of this name.
        """
        ...

    def discard(self, staged: str) -> None:
        """Remove a staged directory, if it is there."""
        ...

    def find(self, name: str, identity: Identity) -> str | None:
        """The path of this very checkpoint, if another worker has stored it."""
        ...

    def fetch(self, path: str, wanted: Wanted = lambda name: True) -> contextlib.AbstractContextManager[str]:
        """A local directory with a stored checkpoint's files, at least those that are wanted."""
        ...


class StagedStorage(ABC):
    """The rules, on what a file system can do. Paths are texts with slashes."""

    renames = True
    """Whether a directory can be renamed, all or nothing."""

    @property
    @abstractmethod
    def root(self) -> str | Path:
        """The run's folder."""

    @abstractmethod
    def _make(self, path: str) -> None: ...

    @abstractmethod
    def _upload(self, file: str, path: str) -> None: ...

    @abstractmethod
    def _move(self, path: str, to: str) -> None:
        """Rename a file or directory; an error where a directory is in the way that is not empty."""

    @abstractmethod
    def _remove(self, path: str) -> None:
        """A file or directory, if it is there."""

    @abstractmethod
    def _names(self, path: str) -> list[str]:
        """What is in a directory; nothing if there is none."""

    @abstractmethod
    def _read(self, path: str) -> bytes | None:
        """A file's content; None if there is none."""

    def stage(self, name: str, life: int = 0) -> str:
        """See :class:`Storage`."""
        mark = secrets.token_hex(4)
        path = f"{self.root}/.{name}.{life}-{mark}.partial" if self.renames else f"{self.root}/{name}_{mark}"
        self._make(path)
        return path

    def put(self, file: str | Path, staged: str) -> None:
        """See :class:`Storage`. Whoever wrote half of a file, and died, has written another one's name."""
        name = Path(file).name
        if not self.renames:
            self._upload(str(file), f"{staged}/{name}")
            return
        part = f"{staged}/.{name}.{secrets.token_hex(4)}"
        self._upload(str(file), part)
        self._move(part, f"{staged}/{name}")

    def discard(self, staged: str) -> None:
        """See :class:`Storage`."""
        with contextlib.suppress(OSError):
            self._remove(staged)

    def find(self, name: str, identity: Identity) -> str | None:
        """See :class:`Storage`."""
        final = f"{self.root}/{name}"
        return final if self.renames and Identity.of(self._read(f"{final}/{META}")) == identity else None

    def persist(self, local_dir: str, name: str, staged: str | None = None) -> str:
        """See :class:`Storage`."""
        files = sorted(Path(local_dir).iterdir(), key=lambda path: (path.name == META, path.name))
        meta = files[-1].read_text() if files and files[-1].name == META else None
        mine = Identity.of(meta)
        life = mine.life if mine is not None else 0
        final = f"{self.root}/{name}"
        staged = staged or self.stage(name, life)
        try:
            for file in files:
                self.put(file, staged)
            if not self.renames:
                return staged
            for half in (n for n in self._names(staged) if n.startswith(".")):
                self._remove(f"{staged}/{half}")
            self._name(staged, final, mine)
        except Exception:
            self.discard(staged)
            if mine is not None and (other := self.find(name, mine)) is not None:
                return other  # The other holder's: it was in the way.
            raise
        self._clean(name, life)
        return final

    def _name(self, staged: str, final: str, mine: Identity | None) -> None:
        for _ in range(3):
            if not self._names(final):
                self._remove(final)
                self._move(staged, final)
                return
            before = self._read(f"{final}/{META}")
            there = Identity.of(before)
            if there is not None and there == mine:
                self.discard(staged)
                return
            if there is not None and (mine is None or there.life > mine.life):
                raise CheckpointError(
                    f"a newer life of the run has stored its own as {final}: this one was stopped meanwhile, or the "
                    "clock was set back. Remove that directory if it is in the way."
                )
            aside = f"{self.root}/.{Path(final).name}.{secrets.token_hex(4)}.old"
            self._move(final, aside)
            if self._read(f"{aside}/{META}") != before:  # Another one has come in between.
                self._move(aside, final)
                continue
            try:
                self._move(staged, final)
            except Exception:
                self._move(aside, final)
                raise
            self.discard(aside)
            return
        raise CheckpointError(f"others have stored {final} three times while this worker did. Run the same name again.")

    def _clean(self, name: str, life: int) -> None:
        """Remove what others have staged for this checkpoint, or in an older life, and will not come back to."""
        with contextlib.suppress(OSError):
            for other in self._names(str(self.root)):
                found = _STAGED.fullmatch(other)
                if found and (found["name"], int(found["life"])) == (name, life) or found and int(found["life"]) < life:
                    self._remove(f"{self.root}/{other}")


_STAGED = re.compile(r"\.(?P<name>checkpoint_\w+)\.(?P<life>\d+)-[0-9a-f]{8}\.partial")


class LocalStorage(StagedStorage):
    """A directory on this machine or a shared file system."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self._root = Path(root)

    @property
    def root(self) -> Path:
        """The run's folder."""
        return self._root

    def sees(self, staged: str) -> bool:
        """See :class:`Storage`."""
        return Path(staged).is_dir()

    @contextlib.contextmanager
    def fetch(self, path: str, wanted: Wanted = lambda name: True) -> Iterator[str]:
        """The directory itself."""
        yield path

    def _make(self, path: str) -> None:
        Path(path).mkdir(parents=True)

    def _upload(self, file: str, path: str) -> None:
        shutil.copyfile(file, path)

    def _move(self, path: str, to: str) -> None:
        os.rename(path, to)

    def _remove(self, path: str) -> None:
        for _ in range(_TRIES):
            if not Path(path).is_dir():
                Path(path).unlink(missing_ok=True)
                return
            shutil.rmtree(path, ignore_errors=True)
            if not Path(path).exists():
                return
            time.sleep(_PAUSE_S)  # Another worker has written its part of a failed checkpoint there meanwhile.

    def _names(self, path: str) -> list[str]:
        return os.listdir(path) if Path(path).is_dir() else []

    def _read(self, path: str) -> bytes | None:
        try:
            return Path(path).read_bytes()
        except OSError:
            return None
