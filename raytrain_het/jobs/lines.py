"""Printing that fits its reader: a terminal's width, or 80 columns without colours in a file or a pipe."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from typing import IO, Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.text import Text

COLUMNS = 80
"""The width without a terminal, unless the environment's COLUMNS says otherwise."""
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
    """Break each line of a text into lines of at most so many characters. All but the first are indented.

    A line is broken between words, or between parts if two spaces separate parts. Text that people copy stays whole,
    and may be longer: a path with the label before it, and an option with its value.
    """
    lines: list[str] = []
    for line in text.split("\n"):
        start = re.match(r" *", line)
        indent = start.group() if start else ""
        gap = "  " if "  " in line.strip() else " "
        if gap == "  " and len(line) > width >= len(indent) + len(single := " ".join(line.split())):
            lines.append(f"{indent}{single}")  # Single spaces are enough to make it fit.
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
    """The parts between which a line may be broken."""
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
    """Print a text in lines that fit, and flush the stream."""
    print("\n".join(wrapped(text, columns(stream))), file=stream, flush=True)


class Sentence:
    """A text among rich's tables, broken into lines as by :func:`wrapped`."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        for line in wrapped(self.text, options.max_width):
            yield Text(line, no_wrap=True, overflow="ignore")


def console_for(stream: IO[str]) -> Console:
    """rich's console: the terminal's, or plain and of a fixed width."""
    if stream.isatty():
        return Console(file=stream, highlight=False)
    return Console(file=stream, highlight=False, width=columns(stream), force_terminal=False, color_system=None)


def print_tables(what: RenderableType, stream: IO[str]) -> None:
    """Print tables and sentences. Without a terminal, lines have no spaces at their ends."""
    console = console_for(stream)
    if stream.isatty():
        console.print(what, crop=False)
        return
    with console.capture() as captured:
        console.print(what, crop=False)
    print("\n".join(line.rstrip() for line in captured.get().splitlines()), file=stream, flush=True)


def fits(what: RenderableType, width: int) -> bool:
    """Whether a table fits without any of its cells being broken."""
    console: Any = Console(width=10 * COLUMNS, color_system=None)
    return bool(console.measure(what).maximum <= width)
