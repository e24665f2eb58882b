"""How a CSV file is written: what separates its columns, and whether its first line has their names. Pure functions.

Everything is decided by a sample, the file's beginning. If a sample leaves a doubt, the file is refused: a table that
is read in another way than it was written would train a wrong model without any error.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

DELIMITERS = {"\t": "tabs", ";": "semicolons", "|": "pipes", ",": "commas"}
OTHERS = {":": "colons", "^": "carets", "~": "tildes", "\x01": "control characters (Ctrl-A)", "\x1f": "unit separators"}
"""Other separators, which are refused by name."""
MAX_ROWS = 1000
_NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*")
_COMMA_NUMBER = re.compile(r"\s*[+-]?(\d+(,\d+)?|,\d+)([eE][+-]?\d+)?\s*")
_DATE = re.compile(r"\s*(\d{4}-\d{1,2}-\d{1,2}|\d{1,2}[./-]\d{1,2}[./-]\d{2,4}|\d{4}/\d{1,2}/\d{1,2})\b.*")
_MISSING = ("", "na", "n/a", "nan", "null", "none", "?", "-", "inf", "-inf")
_PROGRESSION = 3


class NotATable(Exception):
    """A sample is refused. The message follows the file's name: what is wrong with it, and the fix."""


@dataclass(frozen=True)
class Dialect:
    """How a CSV file is to be read."""

    delimiter: str
    lines_in_values: bool
    """Whether quoted values hold line ends."""
    note: str | None = None
    """A warning, if there is one."""


def dialect_of(sample: str, *, is_whole: bool) -> Dialect:
    """The dialect of a file, by its first lines.

    Args:
        sample: The file's first lines, which end with newlines.
        is_whole: Whether the sample is the whole file; else its last line may be cut off.

    Raises:
        NotATable: The file has another format, its columns can be separated in two ways, or it has no header line.
    """
    _refuse_other_formats(sample)
    found = {d: rows_of(sample, d, is_whole=is_whole, strict=True) for d in DELIMITERS}
    if not any(found.values()):
        found = {d: rows_of(sample, d, is_whole=is_whole) for d in DELIMITERS}
    fitting = [d for d, rows in found.items() if rows and len(rows[0]) > 1 and len(set(map(len, rows))) == 1]
    if len(fitting) > 1:
        fitting = [d for d in fitting if not _has_others(found[d], d, fitting)]
        if len(fitting) != 1:
            raise NotATable(
                f"can be cut into columns in more than one way: by {_and(found)}. Write it with one that its "
                "values do not hold, or with the values in quotes"
            )
    if not fitting:
        # pyarrow's reader has the best error: it names the line that has another number of values.
        delimiter = max(DELIMITERS, key=lambda d: (sum(len(row) - 1 for row in found[d]), d == ","))
        rows = found[delimiter]
        if all(len(row) < 2 for row in rows):
            _refuse_other_delimiters(sample, is_whole)
        _refuse_preface(rows, sample)
        return Dialect(delimiter, _spans_lines(rows))
    (delimiter,) = fitting
    rows = found[delimiter]
    return Dialect(delimiter, _spans_lines(rows), _check_header(rows, delimiter))


def is_number(text: str, *, delimiter: str = ",") -> bool:
    """Whether a value is a number. It may have a decimal comma, if commas do not separate columns."""
    return bool(_NUMBER.fullmatch(text) or (delimiter != "," and _COMMA_NUMBER.fullmatch(text)))


def rows_of(sample: str, delimiter: str, *, is_whole: bool = True, strict: bool = False) -> list[list[str]]:
    """The rows of a sample, at most ``MAX_ROWS``, without empty lines.

    Args:
        sample: its first lines.
        delimiter: what separates columns.
        is_whole: whether the last line is complete.
        strict: Whether there are no rows if quotes are in wrong places, as with the wrong separator.
    """
    rows: list[list[str]] = []
    try:
        for row in csv.reader(io.StringIO(sample), delimiter=delimiter, strict=strict):
            if row:
                rows.append(row)
            if len(rows) > MAX_ROWS:
                break
    except csv.Error as error:  # Or a value of more than 131,072 characters.
        return [] if strict and "end of data" not in str(error) else rows
    return rows[:-1] if not is_whole and len(rows) > 1 else rows


def _has_others(rows: Sequence[Sequence[str]], delimiter: str, fitting: Sequence[str]) -> bool:
    """Whether values contain another possible separator. Decimal commas do not count."""
    others = [d for d in fitting if d != delimiter]
    return any(
        other in value and not (other == "," and _COMMA_NUMBER.fullmatch(value))
        for row in rows
        for value in row
        for other in others
    )


def _and(found: dict[str, list[list[str]]]) -> str:
    return " or by ".join(
        f"{DELIMITERS[d]} (into {len(rows[0])})"
        for d, rows in found.items()
        if rows and len(set(map(len, rows))) == 1 and len(rows[0]) > 1
    )


def _spans_lines(rows: Sequence[Sequence[str]]) -> bool:
    return any("\n" in value or "\r" in value for row in rows for value in row)


# ---------------------------------------------------------------- other formats


def _refuse_other_formats(sample: str) -> None:
    start = sample.lstrip("\ufeff \t\r\n")
    lowered = start[:200].lower()
    read = "Write it as CSV or Parquet, for example with pandas:"
    if start.startswith(("{", "[")):
        how = "read_json(FILE)" if start.startswith("[") else "read_json(FILE, lines=True)"
        raise NotATable(f"is JSON, not a table. {read} pandas.{how}.to_csv('t.csv', index=False)")
    if lowered.startswith(("<!doctype", "<html", "<?xml", "<")):
        raise NotATable("is HTML or XML (a page instead of the download?), not a table. Look at it, or fetch it again")
    if lowered.startswith("@relation") or re.match(r"(%.*\n|\s*\n)+\s*@relation", start, re.IGNORECASE):
        raise NotATable("is ARFF (Weka's format), not CSV. Write its @attribute names as one header line and its @data")
    if start.startswith("version https://git-lfs"):
        raise NotATable("is a pointer of Git LFS, not the table itself. Write: git lfs pull")
    lines = [line for line in start.splitlines()[:20] if line.strip()]
    if lines and all(re.match(r"\S+(\s+\d+:[-+.\deE]+)+\s*(#.*)?$", line) for line in lines):
        raise NotATable(
            "is in the format of libsvm (index:value), not a table. Write it as CSV, for example with "
            "sklearn.datasets.load_svmlight_file"
        )


def _refuse_other_delimiters(sample: str, is_whole: bool) -> None:
    """Refuse a single column that is really several, with another separator between them."""
    lines = [line for line in sample.splitlines() if line.strip()][:MAX_ROWS]
    lines = lines[:-1] if not is_whole and len(lines) > 1 else lines
    for delimiter, name in OTHERS.items():
        counts = {line.count(delimiter) for line in lines}
        if len(counts) == 1 and counts.pop():
            raise NotATable(
                f"has columns that {name} separate: allowed are commas, semicolons, tabs and pipes. Write: "
                f"tr '{_shown(delimiter)}' ',' < FILE > t.csv"
            )
    widths = {len(line.split()) for line in lines}
    if len(lines) > 1 and len(widths) == 1 and widths.pop() > 1:
        raise NotATable(
            "has columns that spaces separate: allowed are commas, semicolons, tabs and pipes. Write: "
            "sed -E 's/^ +//; s/ +/,/g' FILE > t.csv"
        )


def _refuse_preface(rows: Sequence[Sequence[str]], sample: str) -> None:
    """Refuse lines before the table, such as a title or comments."""
    widths = [len(row) for row in rows]
    first = next((i for i in range(1, min(len(widths), 20)) if len(set(widths[i:])) == 1 and widths[i] > 1), None)
    if first is None or len(widths) < first + 3 or max(widths[:first]) > 1:
        return
    # Empty lines are no rows, so rows and lines are counted apart.
    lines = [number for number, line in enumerate(sample.split("\n"), start=1) if line]
    raise NotATable(
        f"begins with {'a line' if first == 1 else f'{first} lines'} that no table has ({rows[0][0][:40]!r}). Write: "
        f"tail -n +{lines[first]} FILE > t.csv"
    )


def _shown(delimiter: str) -> str:
    return delimiter if delimiter.isprintable() else f"\\{ord(delimiter):03o}"


# ---------------------------------------------------------------- the header


def _check_header(rows: Sequence[Sequence[str]], delimiter: str) -> str | None:
    """Refuse a first line that has values instead of names; returns a warning of one that may.

    The sign is a name that is a number or a date, above a column of the same kind. Names such as 0, 1, 2, 3, which
    pandas writes for columns without names, and consecutive years are names.
    """
    names, below = rows[0], rows[1:]
    if not below:
        return None
    columns = list(zip(*below, strict=True))
    numbers = [
        i
        for i, name in enumerate(names)
        if is_number(name, delimiter=delimiter) and _mostly(columns[i], lambda v: is_number(v, delimiter=delimiter))
    ]
    dates = [i for i, name in enumerate(names) if _DATE.fullmatch(name) and _mostly(columns[i], _is_date)]
    flags = [
        i
        for i, name in enumerate(names)
        if name.strip().lower() in ("true", "false") and _mostly(columns[i], lambda v: v.lower() in ("true", "false"))
    ]
    again = [
        i
        for i, name in enumerate(names)
        if i not in numbers
        and name.strip()
        and name in columns[i]
        and not _mostly(columns[i], lambda v: is_number(v, delimiter=delimiter))
    ]
    if dates or flags or len(again) > 1 or (again and (numbers or len(again) == len(names))):
        raise NotATable(_headless(names, delimiter))
    if not numbers:
        return None
    if _are_names(names, numbers):
        few = ", ".join(names[i] for i in numbers[:3])
        return (
            f"columns are called {few} and so on: if the first line has values and no names, give the file a header "
            "line"
        )
    raise NotATable(_headless(names, delimiter))


def _are_names(names: Sequence[str], numbers: Sequence[int]) -> bool:
    """Whether the numbers among the names are meant as names: whole numbers in equal steps."""
    if not all(re.fullmatch(r"\d+", names[i].strip()) for i in numbers):
        return False
    values = [int(names[i]) for i in numbers]
    steps = {b - a for a, b in zip(values, values[1:], strict=False)}
    others = [name for i, name in enumerate(names) if i not in numbers and name.strip().lower() not in _MISSING]
    if not others:  # All names are numbers: they must be pandas', and too many for a row of values.
        return len(values) > _PROGRESSION and values == list(range(len(values)))
    return len(values) >= _PROGRESSION and len(steps) == 1 and steps.pop() > 0


def _headless(names: Sequence[str], delimiter: str) -> str:
    first = delimiter.join(names[:6]) + (f"{delimiter}..." if len(names) > 6 else "")
    options = "" if delimiter == "," else f", sep={delimiter!r}"
    return (
        f"has no header line: the first one, {first!r}, holds values. Give it one with the columns' names, or c0, c1 "
        f"and so on: python -c \"import pandas; pandas.read_csv(FILE, header=None{options}).add_prefix('c')"
        ".to_csv('t.csv', index=False)\""
    )


def _mostly(column: Sequence[str], fits: Callable[[str], bool]) -> bool:
    """Whether at least nine tenths of a column's values that are not missing are of a kind."""
    there = [value for value in column if value.strip().lower() not in _MISSING]
    return bool(there) and sum(map(fits, there)) >= 0.9 * len(there)


def _is_date(text: str) -> bool:
    return bool(_DATE.fullmatch(text))
