"""Where in the user's program a function of ours was called: the same on every worker that runs the same line."""

from __future__ import annotations

import hashlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

_WORKER = str(Path(__file__).resolve().parents[1]) + os.sep


@dataclass(frozen=True)
class CallSite:
    """A line of the program, and the way to it."""

    where: str
    """``train.py:31``, for people."""
    key: str
    """A hash of all lines from the training function down to it: a helper that is called from two places is two sites.
    Of files only their names count, since each node may have them in a folder of its own."""


def call_site() -> CallSite:
    """That of the innermost call from outside of this package's ``worker``, up to where the session was begun."""
    lines: list[str] = []
    where = ""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        inside = code.co_filename.startswith(_WORKER)
        if inside and code.co_name == "run_worker":
            break
        if not inside:
            name = os.path.basename(code.co_filename)
            where = where or f"{name}:{frame.f_lineno}"
            lines.append(f"{name}:{code.co_name}:{frame.f_lineno}")
        frame = frame.f_back
    return CallSite(where or "?", hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12])
