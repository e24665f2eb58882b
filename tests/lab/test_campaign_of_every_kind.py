"""A few of all kinds of faults in one run: also of cables, notices, the hub and the interpreter."""

from __future__ import annotations

from pathlib import Path

from raytrain_het.testing.campaign import EVERY, campaign


def test_faults_of_every_kind_in_one_run_lose_nothing(tmp_path: Path) -> None:
    kinds = dict.fromkeys(EVERY, 1)
    account = campaign(24, seed=5, kinds=kinds, directory=str(tmp_path))
    assert account.clean, account
    assert account.faults == 24
    assert len(account.by_kind) >= 7, account.by_kind
