"""What all kinds of tests share: profiles are kept in a folder of the session's own, and cores are not fought for."""

import atexit
import os
import shutil
import tempfile

_folder = tempfile.mkdtemp(prefix="het_tests_")
atexit.register(shutil.rmtree, _folder, ignore_errors=True)
os.environ["XDG_CACHE_HOME"] = _folder
if "PYTEST_XDIST_WORKER" in os.environ:
    # As many test processes as cores: threads of torch's beyond one each would wait for one another.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
