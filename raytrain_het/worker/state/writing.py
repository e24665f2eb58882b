"""Writing a checkpoint: one worker writes what all have in common, and each writes what is its own.

The writer stages a directory, and asks every worker to put its part there, all at once; a part can be as large as the
model, and a hundred of them do not pass through one worker. Whoever dies meanwhile is missing in the checkpoint. One
that cannot write fails it; one that does not see the directory at all, as on a node without the shared folder, sends
its part to the writer instead.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from raytrain_het.errors import CheckpointError
from raytrain_het.membership.agent import MemberAgent
from raytrain_het.membership.record import Member, Record
from raytrain_het.worker.state import checkpoint as files
from raytrain_het.worker.state.state_server import StateServer
from raytrain_het.worker.state.storage import Identity

ASKED_AGAIN = 5
"""So often a worker is asked that answers nothing, and is no less a member."""
_PAUSE_S = 0.2


class Writer:
    """Both sides of it, between state servers. Its methods may be called from any thread."""

    def __init__(self, agent: MemberAgent, server: StateServer, storage: files.Storage) -> None:
        self._agent, self._server, self._storage = agent, server, storage

    def offer(self, key: str, own: dict[str, Any]) -> None:
        """Write this worker's part of a report's checkpoint whenever the writer asks for it."""
        self._server.offer(_own_part(key), lambda request: self._put_own(request["staged"], own))

    def withdraw(self, key: str) -> None:
        """The report is acknowledged."""
        self._server.withdraw(_own_part(key))

    def write(self, name: str, meta: dict[str, Any], snapshot: dict[str, Any], members: list[Member]) -> str:
        """Write and store a checkpoint, with the parts of these members; returns its path.

        Raises:
            CheckpointError: it could not be stored; nothing of it is left.
        """
        staged = self._storage.stage(name, meta["run"]["life"])
        try:
            with tempfile.TemporaryDirectory(prefix="het_checkpoint_") as directory:
                parts = _InTheBackground({m.slot: partial(self._ask, m, meta["run"]["key"], staged) for m in members})
                for file in files.write_shared(directory, snapshot):
                    self._store(directory, file, staged)
                written = []
                for slot, answer in parts.results().items():
                    if answer is None:
                        continue
                    if answer.get("error"):
                        raise CheckpointError(f"worker {slot} could not write its part: {answer['error']}")
                    if "own" in answer:
                        for file in files.write_own(directory, slot, answer["own"]):
                            self._store(directory, file, staged)
                    written.append(slot)
                files.write_meta(directory, meta, written)
                return self._storage.persist(directory, name, staged)
        except Exception:
            self._storage.discard(staged)
            # Another holder may have stored it first, and cleared away what was staged here.
            other = self._storage.find(name, Identity(**meta["run"]))
            if other is not None:
                return other
            raise

    def _store(self, directory: str, file: str, staged: str) -> None:
        path = Path(directory) / file
        self._storage.put(path, staged)
        path.unlink()  # What is stored need not take up the local disk as well.

    def _ask(self, member: Member, key: str, staged: str) -> dict[str, Any] | None:
        def gone() -> bool:
            record: Record | None = self._agent.record
            return self._agent.gone is not None or record is None or record.rank_of(member.uid) is None

        for attempt in range(ASKED_AGAIN):
            time.sleep(_PAUSE_S * (attempt > 0))
            if gone():
                break
            answer = self._server.ask(member.host, member.state_port, _own_part(key), give_up=gone, staged=staged)
            if answer is not None:
                return answer
        return None

    def _put_own(self, staged: str, own: dict[str, Any]) -> dict[str, Any]:
        try:
            with tempfile.TemporaryDirectory(prefix="het_checkpoint_") as directory:
                for file in files.write_own(directory, self._agent.member.slot, own):
                    self._storage.put(Path(directory) / file, staged)
            return {}
        except Exception as error:
            if not self._sees(staged):
                return {"own": own}
            return {"error": f"{type(error).__name__}: {error}"}

    def _sees(self, staged: str) -> bool:
        try:
            return self._storage.sees(staged)
        except Exception:
            return False


class _InTheBackground:
    """Calls functions at the same time, each in a thread that holds up no process's end."""

    def __init__(self, calls: dict[int, Callable[[], Any]]) -> None:
        self._results: dict[int, Any] = {}
        self._errors: dict[int, Exception] = {}
        self._threads = [
            threading.Thread(target=self._call, args=(name, call), name="het-checkpoint-part", daemon=True)
            for name, call in calls.items()
        ]
        for thread in self._threads:
            thread.start()

    def _call(self, name: int, call: Callable[[], Any]) -> None:
        try:
            self._results[name] = call()
        except Exception as error:
            self._errors[name] = error

    def results(self) -> dict[int, Any]:
        """Wait for all.

        Raises:
            Exception: what one of them raised.
        """
        for thread in self._threads:
            thread.join()
        for error in self._errors.values():
            raise error
        return self._results


def _own_part(key: str) -> str:
    """Under which name a worker is asked for its part. No name is the beginning of another one."""
    return f"worker.{key}/"
