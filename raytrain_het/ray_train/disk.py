"""Whether a folder can be written to. It needs no Ray: a wrong folder is refused before Ray is loaded."""

from __future__ import annotations

import contextlib
import uuid
from pathlib import Path


def write_some(folder: Path) -> None:
    """Write 64 KiB into a folder and remove them. An empty file would not do: a full disk still takes one.

    Raises:
        OSError: They could not be written.
    """
    path = folder / f".check.{uuid.uuid4().hex[:8]}"
    try:
        path.write_bytes(bytes(65536))
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
