import importlib
import multiprocessing
import pkgutil
from pathlib import Path

import pytest

from raytrain_het.allreduce import codecs
from raytrain_het.testing.processes import PRELOADED

CODECS = [module.name for module in pkgutil.iter_modules(codecs.__path__, f"{codecs.__name__}.")]
# Where their inner loops have to be compiled first, it is done here: no time limit counts yet.
for name in CODECS:
    importlib.import_module(name)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Each worker imports the program that has started it once more, which is pytest here, and many use a codec. It is
    # said here, when all test modules are there: those that start workers of another kind have said what these need.
    modules = [*PRELOADED, *CODECS, "raytrain_het.testing.programs.worker", "pytest"]
    multiprocessing.get_context("forkserver").set_forkserver_preload(modules)
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.distributed)
