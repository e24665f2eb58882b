"""What all kinds of tests share: profiles are kept in a folder of the session's own, and cores are not fought for."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

import pytest

_TESTS = Path(__file__).parent
_folder = tempfile.mkdtemp(prefix="het_tests_")
atexit.register(shutil.rmtree, _folder, ignore_errors=True)
os.environ["XDG_CACHE_HOME"] = _folder
if "PYTEST_XDIST_WORKER" in os.environ:
    # As many test processes as cores: threads of torch's beyond one each would wait for one another.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(tryfirst=True)  # Before xdist reads the groups.
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of Ray and of the lab share one cluster, or the machine's cores and links: one after the other, while those
    of a few processes run beside them."""
    for item in items:
        if _TESTS / "ray" in item.path.parents or _TESTS / "lab" in item.path.parents:
            item.add_marker(pytest.mark.xdist_group("cluster"))
