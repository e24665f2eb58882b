"""What all kinds of tests share: profiles of hardware and models are kept in a folder of the test session's own."""

import atexit
import os
import shutil
import tempfile

_folder = tempfile.mkdtemp(prefix="het_tests_")
atexit.register(shutil.rmtree, _folder, ignore_errors=True)
os.environ["XDG_CACHE_HOME"] = _folder
