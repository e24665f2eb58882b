import multiprocessing
from pathlib import Path

import pytest

from raytrain_het.testing.processes import PRELOADED

# Each worker imports the program that has started it once more, and that is pytest here.
multiprocessing.get_context("forkserver").set_forkserver_preload([*PRELOADED, "pytest"])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.distributed)
