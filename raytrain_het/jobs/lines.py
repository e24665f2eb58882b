"""Lines that fit where they are read: a terminal's width, or 80 columns in a file or a pipe, and no colours there."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from typing import IO, Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.text import Text

COLUMNS = 80
"""Where there is no terminal, unless the environment's COLUMNS says otherwise."""
_LEAST = 40
_LABEL = re.compile(r"[\w' ]{1,40}: (raytrain-het \w+ )?\S*/\S*")
_INDENT = "  "
_UNITS = ("%", "s", "ms", "samples/s", "B/s", "B", "KiB", "MiB", "GiB")


def columns(stream: IO[str]) -> int:
    """How wide a line on this stream may be."""
    if stream.isatty():
        return max(_LEAST, shutil.get_terminal_size((COLUMNS, 24)).columns)
    text = os.environ.get("COLUMNS", "")
    return max(_LEAST, int(text)) if text.isdigit() else COLUMNS


def wrapped(text: str, width: int) -> list[str]:
    """A line as lines of so many characters at most; those after the first are indented.

    It is broken between words, or where two spaces separate parts, between those. What is to be copied stays whole and
    may be longer: a path, with what a line begins with before it, and an option with its value.
    """
    lines: list[str] = []
    for line in text.split("\n"):
        start = re.match(r" *", line)
        indent = start.group() if start else ""
        gap = "  " if "  " in line.strip() else " "
        if gap == "  " and len(line) > width >= len(indent) + len(single := " ".join(line.split())):
            lines.append(f"{indent}{single}")  # It is only just too long.
            continue
        current = ""
        for part in _parts(line.strip(), gap):
            longer = f"{current}{gap}{part}" if current.strip() else f"{current}{part}"
            if current.strip() and len(longer) > width >= len(indent) + len(_INDENT) + len(part):
                lines.append(current)
                longer = f"{indent}{_INDENT}{part}"
            elif not current:
                longer = f"{indent}{part}"
            current = longer
        lines.append(current)
    return lines


def _parts(line: str, gap: str) -> Iterator[str]:
    """What is not broken."""
    if gap == "  ":
        yield from re.split(r" {2,}", line)
        return
    label = _LABEL.match(line)
    held = label.group() if label else ""
    for word in line[len(held) :].split(" "):
        is_path = word.startswith(("/", "~/")) or "://" in word
        is_value = held.rpartition(" ")[2].startswith("--") and "=" not in held.rpartition(" ")[2]
        in_quotes = "='" in held and held.count("'") % 2 == 1
        is_unit = held[-1:].isdigit() and word.rstrip(".,:;)") in _UNITS
        if not word:
            continue
        if held and (is_path or is_value or in_quotes or is_unit):
            held = f"{held} {word}"
            continue
        if held:
            yield held
        held = word
    yield held


def print_text(text: str, stream: IO[str]) -> None:
    """Write a text in lines that fit, at once."""
    print("\n".join(wrapped(text, columns(stream))), file=stream, flush=True)


class Sentence:
    """A text among tables of rich's, broken as :func:`wrapped` does."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        for line in wrapped(self.text, options.max_width):
            yield Text(line, no_wrap=True, overflow="ignore")


def console_for(stream: IO[str]) -> Console:
    """rich's console: as the terminal is, or plain and of a fixed width."""
    if stream.isatty():
        return Console(file=stream, highlight=False)
    return Console(file=stream, highlight=False, width=columns(stream), force_terminal=False, color_system=None)


def print_tables(what: RenderableType, stream: IO[str]) -> None:
    """Write tables and sentences, without spaces at the ends of lines where that is no terminal."""
    console = console_for(stream)
    if stream.isatty():
        console.print(what, crop=False)
        return
    with console.capture() as captured:
        console.print(what, crop=False)
    print("\n".join(line.rstrip() for line in captured.get().splitlines()), file=stream, flush=True)


def fits(what: RenderableType, width: int) -> bool:
    """Whether a table is no wider than that without breaking what is in its cells."""
    console: Any = Console(width=10 * COLUMNS, color_system=None)
    return bool(console.measure(what).maximum <= width)
