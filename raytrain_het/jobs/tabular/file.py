"""A table's file: open it, unpack it, and find out from its first bytes what it is."""

from __future__ import annotations

import bz2
import codecs
import contextlib
import gzip
import lzma
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from raytrain_het.errors import ConfigError

GS_RETRY_S = 20.0
"""Seconds until Google's storage is given up, unless the URI says otherwise."""
SAMPLE_BYTES = 1 << 18
"""The first so many bytes of a file are looked at to find out what it is."""
_GS_LIMIT = "retry_limit_seconds"
_PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "zip"}
_TO_CSV = "Write it as CSV or Parquet, for example with pandas:"
_FOREIGN = {
    b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": f"is an Excel workbook (.xls). {_TO_CSV} read_excel(FILE).to_csv('t.csv', "
    "index=False)",
    b"ARROW1": f"is a Feather (Arrow) file. {_TO_CSV} read_feather(FILE).to_parquet('t.parquet')",
    b"FEA1": f"is a Feather file. {_TO_CSV} read_feather(FILE).to_parquet('t.parquet')",
    b"ORC": f"is an ORC file. {_TO_CSV} read_orc(FILE).to_parquet('t.parquet')",
    b"Obj\x01": "is an Avro file. Write it as CSV or Parquet",
    b"SQLite format 3\x00": "is an SQLite database. Write one of its tables: sqlite3 -header -csv FILE "
    "'select * from TABLE' > t.csv",
    b"\x89HDF\r\n\x1a\n": f"is an HDF5 file. {_TO_CSV} read_hdf(FILE).to_parquet('t.parquet')",
    b"\x93NUMPY": f"is an array of numpy's (.npy). {_TO_CSV} DataFrame(numpy.load(FILE)).add_prefix('c')"
    ".to_csv('t.csv', index=False)",
    b"\x80\x02": f"is a pickle. {_TO_CSV} read_pickle(FILE).to_parquet('t.parquet')",
    b"\x80\x03": f"is a pickle. {_TO_CSV} read_pickle(FILE).to_parquet('t.parquet')",
    b"\x80\x04": f"is a pickle. {_TO_CSV} read_pickle(FILE).to_parquet('t.parquet')",
    b"\x80\x05": f"is a pickle. {_TO_CSV} read_pickle(FILE).to_parquet('t.parquet')",
    b"%PDF": "is a PDF. Write the table in it as CSV",
    b"7z\xbc\xaf": "is a 7z archive. Unpack it: 7z x FILE",
    b"Rar!": "is a RAR archive. Unpack it: unrar x FILE",
    b"\x04\x22\x4d\x18": "is packed with lz4. Unpack it: lz4 -d FILE t.csv",
    b"RDX": "is a file of R's. Write in R: write.csv(x, 't.csv', row.names=FALSE)",
}
_BOMS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
"""The order matters: UTF-32's mark begins with UTF-16's."""


def file_info(data: str) -> Any:
    """pyarrow's information on a file that is not empty.

    Raises:
        ConfigError: The file does not exist, is a folder, or is empty.
    """
    from pyarrow import fs

    system, path = file_system(data)
    try:
        info = system.get_file_info(path)
    except OSError as error:
        raise ConfigError(f"data={data!r} cannot be reached: {first_line(error)}. Look at its address.") from None
    if info.type == fs.FileType.NotFound:
        raise ConfigError(f"data={data!r} does not exist: allowed is a CSV or Parquet file. Look at its path.")
    if info.type != fs.FileType.File:
        raise ConfigError(f"data={data!r} is a folder: allowed is one CSV or Parquet file. Name the file.")
    if info.size == 0:
        raise ConfigError(f"data={data!r} is empty: allowed is a table with a header and rows.")
    return info


def file_system(data: str) -> tuple[Any, str]:
    """pyarrow's file system of a path or URI, and the path in it.

    Raises:
        ConfigError: pyarrow has no file system for this kind of URI.
    """
    from pyarrow import fs

    if "://" not in data:
        return fs.LocalFileSystem(), str(Path(data).expanduser().resolve())
    if data.startswith("gs://") and _GS_LIMIT not in data:
        # By default pyarrow tries again for a quarter of an hour, without a message.
        data += f"{'&' if '?' in data else '?'}{_GS_LIMIT}={GS_RETRY_S:g}"
    try:
        return fs.FileSystem.from_uri(data)
    except (pa.ArrowInvalid, OSError, ImportError, NotImplementedError) as error:
        # A pyarrow that was built without this file system raises ImportError or NotImplementedError.
        raise ConfigError(
            f"data={data!r} cannot be opened: {first_line(error)}. Allowed are paths, and URIs whose library is "
            "installed: s3://, gs:// and file:// come with pyarrow; hdfs:// needs Hadoop's libhdfs (set "
            "ARROW_LIBHDFS_DIR and CLASSPATH)."
        ) from None


@contextlib.contextmanager
def opened(data: str) -> Iterator[Any]:
    """The file's contents, unpacked, as a binary stream.

    Raises:
        ConfigError: The file is of a kind that is not read, or it is damaged.
    """
    system, path = file_system(data)
    try:
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(system.open_input_file(path))
            stream: Any = _unpacked(data, file, stack)
            if stream is None:
                file.seek(0)
                stream = file
            yield stream
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, zipfile.BadZipFile) as error:
        raise ConfigError(
            f"data={data!r} is packed and damaged, or cut off: {first_line(error)}. Fetch it again, or unpack it by "
            "hand to see how far it goes"
        ) from None


def _unpacked(data: str, file: Any, stack: contextlib.ExitStack) -> IO[bytes] | Any | None:
    """The unpacked contents of a file as a stream; None if the file is not packed."""
    start = file.read(16)
    refuse_foreign(data, start)
    kind = next((kind for magic, kind in _PACKED.items() if start.startswith(magic)), None)
    file.seek(0)
    if kind is None:
        return None
    if kind == "zip":
        return stack.enter_context(_only_member(data, stack.enter_context(zipfile.ZipFile(file))))
    if kind == "zstd":
        return stack.enter_context(pa.CompressedInputStream(file, "zstd"))
    readers: dict[str, Any] = {"gzip": gzip.GzipFile, "bz2": bz2.BZ2File, "xz": lzma.LZMAFile}
    return stack.enter_context(readers[kind](file) if kind != "gzip" else gzip.GzipFile(fileobj=file))


def _only_member(data: str, archive: zipfile.ZipFile) -> IO[bytes]:
    names = archive.namelist()
    if any(name.startswith(("xl/", "word/", "ppt/")) or name == "mimetype" for name in names):
        raise ConfigError(
            f"data={data!r} is an Excel workbook, or another office document. {_TO_CSV} "
            "read_excel(FILE).to_csv('t.csv', index=False)"
        )
    members = [i for i in archive.infolist() if not i.is_dir() and not i.filename.startswith("__MACOSX/")]
    if len(members) != 1:
        raise ConfigError(
            f"data={data!r} is an archive of {len(members)} files ({', '.join(i.filename for i in members[:5])}): "
            "allowed is one. Unpack it (unzip FILE), and name one of them"
        )
    if members[0].flag_bits & 1:
        raise ConfigError(f"data={data!r} is an archive with a password. Unpack it: unzip FILE")
    return archive.open(members[0])


def refuse_foreign(data: str, start: bytes) -> None:
    """Refuse a known kind of file that is not read here.

    Args:
        data: The file, for the message.
        start: Its first bytes.

    Raises:
        ConfigError: The file is of such a kind.
    """
    for magic, text in _FOREIGN.items():
        if start.startswith(magic):
            raise ConfigError(f"data={data!r} {text}.")


def encoding_of(data: str, start: bytes) -> str:
    """The encoding of a text file, by its first bytes.

    Raises:
        ConfigError: The file is not a text.
    """
    for bom, name in _BOMS.items():
        if start.startswith(bom):
            return name
    if start[257:262] == b"ustar":
        raise ConfigError(f"data={data!r} is a tar archive. Unpack it (tar xf FILE), and name the table in it")
    if b"\x00" not in start:
        return "utf-8"
    even, odd = start[0::2].count(0), start[1::2].count(0)
    if odd > 0.4 * (len(start) // 2) and not even:
        return "utf-16-le"
    if even > 0.4 * (len(start) // 2) and not odd:
        return "utf-16-be"
    raise ConfigError(f"data={data!r} is neither CSV nor Parquet, but some binary format. Write it as one of them")


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
