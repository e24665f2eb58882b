"""Read a file into a pyarrow table: CSV of many kinds, or Parquet, packed or not."""

from __future__ import annotations

import codecs
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from raytrain_het.errors import ConfigError
from raytrain_het.jobs.tabular.csv_dialect import Dialect, NotATable, dialect_of, rows_of
from raytrain_het.jobs.tabular.file import SAMPLE_BYTES, encoding_of, file_info, first_line, opened, refuse_foreign

_DECIMAL_COMMAS = r"^\s*[+-]?(\d+(,\d+)?|,\d+)([eE][+-]?\d+)?\s*$"
_MAYBE_THOUSANDS = r"^\s*[+-]?[1-9]\d{0,2},\d{3}\s*$"
_SAMPLE_LINES = 5
_NAMED = 5


@dataclass(frozen=True)
class Read:
    """A table, and warnings of how it was read."""

    table: pa.Table
    notes: tuple[str, ...]


def read_table(data: str) -> Read:
    """Read all columns of a CSV or Parquet file. The first bytes show which of the two it is.

    Raises:
        ConfigError: It is neither, is damaged, has no header line or fewer than two columns, or can be read in more
            than one way.
    """
    file_info(data)
    try:
        with opened(data) as stream:
            start = _begin(stream)
            refuse_foreign(data, start)
            if start.startswith(b"PAR1"):
                read = Read(_parquet(stream, start), ())
            else:
                read = _csv(data, stream, start)
        table = read.table
        names = table.column_names
    except UnicodeDecodeError:
        raise ConfigError(
            f"data={data!r}: the names of its columns are not UTF-8. If the file is Latin-1, write: iconv -f latin1 "
            "-t utf-8"
        ) from None
    except NotATable as error:
        raise ConfigError(f"data={data!r} {error}.") from None
    except (pa.ArrowInvalid, OSError, UnicodeError) as error:
        raise ConfigError(
            f"data={data!r} is neither CSV nor Parquet, or damaged: {first_line(error)}. Allowed is CSV with a header "
            "line and the same number of values in every line, or Parquet."
        ) from None
    if table.num_rows == 0 or table.num_columns < 2:
        raise ConfigError(
            f"data={data!r} has {table.num_rows} rows of {table.num_columns} columns: allowed are rows, and two "
            "columns or more. For CSV the first line has the columns' names."
        )
    _refuse_twice(data, names)
    for i, field in enumerate(table.schema):
        if pa.types.is_decimal(field.type):
            table = table.set_column(i, field.name, table.column(i).cast(pa.float64()))
        elif pa.types.is_dictionary(field.type):
            table = table.set_column(i, field.name, table.column(i).cast(field.type.value_type))
    return Read(table, read.notes)


def names_in(data: str) -> list[str]:
    """The names of a file's columns. Only the file's beginning is read.

    Raises:
        ConfigError: As :func:`read_table`, as far as the beginning shows.
    """
    file_info(data)
    try:
        with opened(data) as stream:
            start = _begin(stream)
            refuse_foreign(data, start)
            if start.startswith(b"PAR1"):
                from pyarrow import parquet

                whole = pa.BufferReader(start + stream.read()) if not _seekable(stream) else stream
                whole.seek(0)
                return [str(name) for name in parquet.ParquetFile(whole).schema_arrow.names]
            text, dialect = _dialect(data, start)
            names = _cleaned(rows_of(text, dialect.delimiter)[0])
            _refuse_twice(data, names)
            return names
    except NotATable as error:
        raise ConfigError(f"data={data!r} {error}.") from None
    except (pa.ArrowInvalid, OSError, UnicodeError, IndexError) as error:
        raise ConfigError(
            f"data={data!r} is neither CSV nor Parquet, or damaged: {first_line(error)}. Allowed is CSV with a header "
            "line and the same number of values in every line, or Parquet."
        ) from None


def _refuse_twice(data: str, names: list[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"data={data!r} has columns of the same name: {some(twice)}. Name each column once.")


def some(names: list[str]) -> str:
    """The first few names, in quotes."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(map(repr, names[:_NAMED])) + more


def _begin(stream: Any) -> bytes:
    """Read the first bytes of a stream: ``SAMPLE_BYTES``, or more until some lines are whole."""
    found = bytearray()
    while len(found) < SAMPLE_BYTES or (found.count(b"\n") < _SAMPLE_LINES > found.count(b"\r")):
        part = stream.read(SAMPLE_BYTES)
        if not part:
            break
        found += part
    return bytes(found)


def _seekable(stream: Any) -> bool:
    try:
        return bool(stream.seekable())
    except (AttributeError, OSError, pa.ArrowInvalid):
        return False


def _parquet(stream: Any, start: bytes) -> pa.Table:
    from pyarrow import parquet

    if isinstance(stream, pa.NativeFile) and _seekable(stream):
        stream.seek(0)
        return parquet.read_table(stream)
    return parquet.read_table(pa.BufferReader(start + stream.read()))


def _dialect(data: str, start: bytes) -> tuple[str, Dialect]:
    """The file's beginning as text, and its dialect."""
    is_whole = len(start) < SAMPLE_BYTES  # A longer sample may be all of the file, or not.
    decoder = codecs.getincrementaldecoder(encoding_of(data, start))(errors="replace")
    text = decoder.decode(start, is_whole).replace("\r\n", "\n").replace("\r", "\n")
    return text, dialect_of(text, is_whole=is_whole)


def _csv(data: str, stream: Any, start: bytes) -> Read:
    from pyarrow import csv as arrow

    encoding = encoding_of(data, start)
    _, dialect = _dialect(data, start)

    def read(source: Any, decimal_point: str) -> pa.Table:
        return arrow.read_csv(
            source,
            read_options=arrow.ReadOptions(encoding="utf8" if encoding.startswith("utf-8") else encoding),
            parse_options=arrow.ParseOptions(delimiter=dialect.delimiter, newlines_in_values=dialect.lines_in_values),
            # An empty label is a missing value, and not a class.
            convert_options=arrow.ConvertOptions(strings_can_be_null=True, decimal_point=decimal_point),
        )

    if isinstance(stream, pa.NativeFile) and _seekable(stream):
        stream.seek(0)
        table = read(stream, ".")
    else:
        stream = pa.BufferReader(start + stream.read())
        table = read(stream, ".")
    if _has_decimal_commas(data, table):
        with opened(data) as again:
            points = table
            table = read(pa.BufferReader(again.read()), ",")
        _refuse_both_decimals(points, table)
    return _with_clean_names(table, dialect.note)


def _has_decimal_commas(data: str, table: pa.Table) -> bool:
    """Whether a column that was read as text has numbers with decimal commas.

    Raises:
        NotATable: The commas may also separate thousands.
    """
    import pyarrow.compute as pc

    found = False
    for field in table.schema:
        if not pa.types.is_string(field.type):
            continue
        values = table.column(field.name).drop_null()
        if not pc.all(pc.match_substring_regex(values, _DECIMAL_COMMAS)).as_py() or not len(values):
            continue
        with_commas = values.filter(pc.match_substring(values, ","))
        if pc.all(pc.match_substring_regex(with_commas, _MAYBE_THOUSANDS)).as_py():
            raise NotATable(
                f"has a column {field.name!r} of numbers such as {with_commas[0].as_py()!r}, where the comma may "
                "stand between thousands or before decimals. Write them without commas between thousands, and with "
                "points before decimals"
            )
        found = True
    return found


def _refuse_both_decimals(points: pa.Table, commas: pa.Table) -> None:
    """Refuse a table that has columns with decimal points and columns with decimal commas.

    Raises:
        NotATable: It has both.
    """
    changed = [
        name
        for name in points.column_names
        if pa.types.is_floating(points.schema.field(name).type) and pa.types.is_string(commas.schema.field(name).type)
    ]
    if changed:
        raise NotATable(
            f"has numbers with decimal points ({some(changed)}) and numbers with decimal commas. Write all with points"
        )


def _cleaned(names: list[str]) -> list[str]:
    """Names without spaces around them, unless two names would become the same."""
    stripped = [name.lstrip("\ufeff").strip() for name in names]
    return stripped if len(set(stripped)) == len(set(names)) else names


def _with_clean_names(table: pa.Table, note: str | None) -> Read:
    """A table with clean names. A column without a name and without values, from lines that end with a delimiter, is
    left out."""
    table = table.rename_columns(_cleaned(table.column_names))
    for i in reversed(range(table.num_columns)):
        if not table.column_names[i] and table.column(i).null_count == table.num_rows:
            table = table.remove_column(i)
    return Read(table, (note,) if note is not None else ())
