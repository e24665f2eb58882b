"""Whether a folder can be written to. Without Ray, so that a wrong one is refused before Ray is loaded."""

from __future__ import annotations

import contextlib
import uuid
from pathlib import Path


def write_some(folder: Path) -> None:
    """Write some KiB into a folder and remove them: on a full disk an empty file can still be made.

    Raises:
        OSError: They could not be written.
    """
    path = folder / f".check.{uuid.uuid4().hex[:8]}"
    try:
        path.write_bytes(bytes(65536))
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
