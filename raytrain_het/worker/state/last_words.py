"""An exception of the user's on its way to other processes: its text always arrives, itself where that can be."""

from __future__ import annotations

import base64
import pickle
import sys
import traceback
from typing import Any

from raytrain_het.errors import ForeignError

MAX_TEXT = 20_000
"""Characters of a traceback, or of an exception's own text, that are sent on."""
MAX_PICKLED_BYTES = 200_000


def cut(text: str, limit: int = MAX_TEXT) -> str:
    """A text that is too long, without its middle."""
    if len(text) <= limit:
        return text
    head, tail = text[: limit // 2], text[-(limit // 2) :]
    return f"{head}\n... ({len(text) - limit} characters are left out here) ...\n{tail}"


def text_of(error: BaseException) -> str:
    """Its class and what it says, whatever its ``__str__`` does."""
    try:
        said = str(error)
    except BaseException as broken:
        said = f"(its text cannot be made: __str__ raised {type(broken).__name__})"
    name = _name(error)
    return f"{name}: {said}" if said else name


def traceback_of(error: BaseException, limit: int = MAX_TEXT) -> str:
    """Its traceback, with those of the exceptions that it came from."""
    try:
        text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    except Exception:  # Something in its chain or its notes raises.
        text = "".join(traceback.format_tb(error.__traceback__)) + text_of(error) + "\n"
    return cut(text, limit)


def packed(error: BaseException) -> str | None:
    """It as text from which :func:`unpacked` makes it again; None where it cannot be sent, or is too large."""
    try:
        data = _pickler().dumps(error)
        again = pickle.loads(data) if len(data) <= MAX_PICKLED_BYTES else None
        if type(again) is not type(error) or text_of(again) != text_of(error):
            return None
    except BaseException:  # Its own __reduce__, __init__ or __setstate__ may raise anything.
        return None
    return base64.b64encode(data).decode()


def unpacked(data: str | None) -> BaseException | None:
    """The inverse; None where its class is not known here."""
    try:
        error = pickle.loads(base64.b64decode(data)) if data else None
    except BaseException:
        return None
    return error if isinstance(error, BaseException) else None


def portable(error: BaseException) -> Exception:
    """The exception itself if it survives the way to another process, else one that says the same."""
    if isinstance(error, Exception) and len(traceback_of(error, 2 * MAX_TEXT)) <= MAX_TEXT and packed(error):
        return error
    said = text_of(error)
    if isinstance(error, SystemExit | KeyboardInterrupt):
        said = f"{said} (the training function ended its process: return from the function, or raise an Exception)"
    if len(traceback_of(error, 2 * MAX_TEXT)) > MAX_TEXT:
        # What it came from would be shown beside it, at full length.
        said = f"{cut(said, MAX_TEXT // 4)}\n\n{traceback_of(error, MAX_TEXT // 2)}"
    return ForeignError(said)


def _name(error: BaseException) -> str:
    cls = type(error)
    return cls.__qualname__ if cls.__module__ in ("builtins", "__main__") else f"{cls.__module__}.{cls.__qualname__}"


def _pickler() -> Any:
    """That which brought the training function here: it knows classes that no module holds by what came with it."""
    if "ray.cloudpickle" in sys.modules:
        return sys.modules["ray.cloudpickle"]
    import cloudpickle

    return cloudpickle
