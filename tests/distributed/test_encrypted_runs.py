"""A run with TLS on all of its connections."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trustme
from labs import run

from raytrain_het.membership.encryption import TlsSocket
from raytrain_het.testing.faults import Fault
from raytrain_het.testing.regression import Regression
from raytrain_het.worker.session import current

TASK = Regression(patience_s=0.05)
STEPS = TASK.plan.steps_per_epoch


@dataclass(frozen=True)
class Encrypted:
    """A training function of a worker whose node has a certificate."""

    task: Callable[[str], Any]
    settings: dict[str, str]

    def __call__(self, directory: str) -> Any:
        os.environ.update(self.settings)

        def look(point: str, step: int) -> None:
            worker = current().worker
            if point == "updated" and worker is not None and worker.connections.communicator._group is not None:
                peers = worker.connections.communicator._group._peers.values()  # type: ignore[attr-defined]
                if any(isinstance(peer.sock, TlsSocket) for peer in peers):
                    Path(directory, "encrypted").touch()

        current().points.listeners.append(look)
        return self.task(directory)


def test_a_killed_worker_costs_an_encrypted_run_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority = trustme.CA()
    node = authority.issue_cert("a-node")
    names = ("RAY_TLS_SERVER_KEY", "RAY_TLS_SERVER_CERT", "RAY_TLS_CA_CERT")
    files = {name: str(tmp_path / name) for name in names}
    blobs = (node.private_key_pem, node.cert_chain_pems[0], authority.cert_pem)
    for blob, file in zip(blobs, files.values(), strict=True):
        blob.write_to_path(file)
    settings = {"RAY_USE_TLS": "1", **files}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    done = run(Encrypted(TASK, settings), tmp_path / "run", faults=[Fault(slot=1, step=STEPS + 3, point="backward")])
    done.check(TASK)
    assert [e["slot"] for e in done.kinds("lost")] == [1]
    assert (tmp_path / "run" / "encrypted").exists()
