"""Tables as people have them: each is read as it was written, or called by its name. None is trained on otherwise."""

from __future__ import annotations

import bz2
import dataclasses
import gzip
import io
import lzma
import re
import tarfile
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from raytrain_het.errors import ConfigError
from raytrain_het.jobs.tabular.columns import Source
from raytrain_het.jobs.tabular.data import TableData, open_table
from raytrain_het.jobs.tabular.reading import names_in

SOURCE = Source(data=None, rows=1000, columns=3, target=None, features=None, task="regression", seed=0)


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def frame() -> pd.DataFrame:
    random = np.random.default_rng(1)
    columns = {"a": random.normal(5, 3, 200), "b": random.integers(0, 9, 200), "price": random.normal(0, 99, 200)}
    return pd.DataFrame(columns)


def read(path: Path, **changes: object) -> TableData:
    return open_table(dataclasses.replace(SOURCE, data=str(path), **changes))  # type: ignore[arg-type]


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def csv(**how: object) -> bytes:
    text: str = frame().to_csv(index=False, **how)  # type: ignore[call-overload]
    return text.encode()


def zipped(*names: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(name, csv())
    return file.getvalue()


def tarred() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        member = tarfile.TarInfo("t.csv")
        member.size = len(csv())
        archive.addfile(member, io.BytesIO(csv()))
    return file.getvalue()


def parquet() -> bytes:
    file = io.BytesIO()
    frame().to_parquet(file)
    return file.getvalue()


AS_READ = {
    "semicolons": lambda: csv(sep=";"),
    "tabs": lambda: csv(sep="\t"),
    "pipes": lambda: csv(sep="|"),
    "decimal commas": lambda: csv(sep=";", decimal=","),
    "decimal commas and tabs": lambda: csv(sep="\t", decimal=","),
    "decimal commas in quotes": lambda: csv(decimal=",", quoting=1),
    "quotes around all": lambda: csv(sep=";", decimal=",", quoting=1),
    "gzip": lambda: gzip.compress(csv()),
    "gzip and semicolons": lambda: gzip.compress(csv(sep=";", decimal=",")),
    "bz2": lambda: bz2.compress(csv()),
    "xz": lambda: lzma.compress(csv()),
    "zip": lambda: zipped("t.csv"),
    "Parquet in gzip": lambda: gzip.compress(parquet()),
    "a mark of UTF-8": lambda: b"\xef\xbb\xbf" + csv(),
    "UTF-16": lambda: csv().decode().encode("utf-16"),
    "UTF-16 without a mark": lambda: csv().decode().encode("utf-16-be"),
    "UTF-16 and tabs, as Excel has it": lambda: csv(sep="\t", decimal=",").decode().encode("utf-16"),
    "lines that end as on Windows": lambda: csv(lineterminator="\r\n"),
    "lines that end as on old Macs": lambda: csv(lineterminator="\r"),
    "spaces after commas": lambda: csv().replace(b",", b", "),
    "a comma at each line's end": lambda: csv().replace(b"\n", b",\n"),
}


@pytest.mark.parametrize("how", AS_READ)
def test_a_table_is_read_as_it_was_written(tmp_path: Path, how: str) -> None:
    plain = read(written(tmp_path / "plain.csv", csv()))
    path = written(tmp_path / "t.data", AS_READ[how]())
    table = read(path)
    assert (table.features, table.target) == (("a", "b"), "price")
    assert np.allclose(table.x, plain.x, atol=1e-5) and np.allclose(table.y, plain.y, atol=1e-5)
    names = names_in(str(path))
    assert names[:3] == ["a", "b", "price"], "the beginning tells as much"


def rows(line: str, count: int = 60) -> str:
    """Lines of numbers that differ."""
    return "".join(line.format(i=i, j=i % 7, k=3 * i % 11, t=f"{i:03d}") + "\n" for i in range(1, count + 1))


HEADLESS = {
    "numbers": rows("{i}.5,{j},{k}"),
    "numbers and text, as the iris": "".join(f"5.{i % 9},3.{i % 5},{['setosa', 'other'][i % 2]}\n" for i in range(60)),
    "one number beside names": rows("n{i},{i}2"),
    "semicolons": rows("{i}.5;{j};{k}"),
    "decimal commas": rows("{i},5;{j};{k},25"),
    "dates": rows("2024-01-1{j},{i},{k}.5"),
    "negative numbers and exponents": rows("-{i}e-5,-{k}.5"),
    "text alone": "".join(f"{'red' if i % 2 else 'blue'},{'yes' if i % 3 else 'no'}\n" for i in range(60)),
    "true and false": "".join(f"{bool(i % 2)},{i % 5}.5\n" for i in range(60)),
    "values that are missing": rows(",{i}.5,{k}"),
    "whole numbers that look like pandas' names": "0,1,2\n" + rows("{i},{j},{k}"),
}


@pytest.mark.parametrize("what", HEADLESS)
def test_a_table_without_a_header_is_called_that(tmp_path: Path, what: str) -> None:
    path = written(tmp_path / "t.csv", HEADLESS[what])
    for look in (lambda: names_in(str(path)), lambda: read(path, task="classification")):
        with pytest.raises(ConfigError, match=r"has no header line: the first one, .* holds values\. .*header=None"):
            look()


@pytest.mark.parametrize(
    ("content", "names", "warns"),
    [
        (pd.DataFrame(np.random.default_rng(0).normal(size=(40, 6))).to_csv(index=False), "012345", True),
        ("region,2019,2020,2021\n" + rows("{i}.5,{j},{k},{i}{j}"), ["region", "2019", "2020", "2021"], True),
        ("x1,x2,y\n" + rows("{i}.5,{j},{k}"), ["x1", "x2", "y"], False),
        ("Na,Mg,nan_rate\n" + rows("{i}.5,{j},{k}"), ["Na", "Mg", "nan_rate"], False),
        ("A,B,y\n" + "".join(f"{i}.5,{'A' if i % 2 else 'C'},{i % 7}\n" for i in range(40)), ["A", "B", "y"], False),
    ],
)
def test_names_that_are_numbers_or_come_again_can_be_names(
    tmp_path: Path, content: str, names: list[str], warns: bool
) -> None:
    path = written(tmp_path / "t.csv", content)
    assert names_in(str(path)) == list(names)
    first = next(name for name in names if name not in ("B", "region"))
    table = read(path, features=(first,))
    assert any("give the file a header line" in note for note in table.notes) == warns


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("a;b\n" + rows("1,{t};{i}"), "'1,001', where the comma may stand between thousands or before decimals"),
        ("a,b\n" + rows('"1,{t}.5",{i}.5'), r"'a' is text such as '1,001\.5'"),
        ("a;b\n" + rows("1,{i};{i}.5"), r"decimal points \('b'\) and numbers with decimal commas"),
        (rows("a{i};b,c{i};d"), r"in more than one way: by semicolons \(into 3\) or by commas \(into 2\)"),
        ("a b c\n" + rows("{i} {j}   {k}"), "columns that spaces separate: .*sed -E"),
        ("a:b:c\n" + rows("{i}:{j}:{k}"), "columns that colons separate: .*tr ':' ','"),
        ("a\x01b\n" + rows("{i}\x01{k}"), r"control characters .*tr '\\001' ','"),
        ("My report\n\na,b,c\n" + rows("{i},{j},{k}"), r"a line that no table has \('My report'\).*tail -n \+3"),
        ("# one\n# two\na;b\n" + rows("{i};{k}"), r"begins with 2 lines .*tail -n \+3"),
        ("a,b\n" + rows("{i},{k}") + "1,2,3\n", "Expected 2 columns, got 3"),
        ("price\n" + rows("{i}"), "60 rows of 1 columns"),
        ("a,b\n" + rows("{i}%,{k}"), "'a' is text such as '1%'"),
        ("a,b\n" + rows("{i},{k}") + "?,3\n-,4\n", r"'a' is text: 2 of 62 values are no numbers, such as '\?'"),
        ("a,b\n" + rows("{i},{k}") + "3,?\n", r"the target 'b' is text: 1 of 61 values are no numbers, such as '\?'"),
        ("when,b\n" + rows("2024-01-0{j},{k}").replace("-00", "-08"), r"'when' is date32\[day\] \(a date or time\)"),
        ('[{"a": 1}]', r"is JSON, .*read_json\(FILE\)"),
        ('{"a": 1}\n{"a": 2}\n', "is JSON, .*lines=True"),
        ("<!DOCTYPE html><html>404</html>", "is HTML or XML"),
        ("% made by\n@RELATION x\n@attribute a numeric\n@data\n1\n", "is ARFF"),
        (rows("{j} 1:0.5 3:{i}.2"), "format of libsvm"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (zipped("t.csv", "u.csv"), r"archive of 2 files \(t\.csv, u\.csv\)"),
        (zipped("xl/workbook.xml", "[Content_Types].xml"), r"Excel workbook.*read_excel"),
        (tarred(), "is a tar archive"),
        (gzip.compress(csv())[:900], "packed and damaged, or cut off"),
        (gzip.compress(csv())[:-8] + bytes(8), "packed and damaged, or cut off: CRC"),
        (b"SQLite format 3\x00" + bytes(100), "sqlite3 -header -csv"),
        (b"ARROW1\x00\x00", "read_feather"),
        (b"\x93NUMPY\x01\x00", "numpy.load"),
        (b"\x80\x04\x95abc", "read_pickle"),
        (bytes(range(256)) * 9, "some binary format"),
        (parquet()[:300], "neither CSV nor Parquet, or damaged"),
    ],
)
def test_what_cannot_be_read_is_called_by_its_name_with_the_way_out(
    tmp_path: Path, content: str | bytes, match: str
) -> None:
    path = written(tmp_path / "t.csv", content)
    with pytest.raises(ConfigError) as refused:
        read(path)
    assert re.search(match, str(refused.value)), str(refused.value)


def test_decimal_commas_that_come_late_are_seen(tmp_path: Path) -> None:
    path = written(tmp_path / "t.csv", "a;b\n" + "1;2\n3;5\n" * 40_000 + "1,5;2,5\n" * 5)
    assert len(np.unique(read(path).x)) == 3


@pytest.mark.parametrize(
    ("target", "task", "match"),
    [
        (lambda i: i % 2, "regression", r"only 2 different values \(0, 1\): classification\?"),
        (lambda i: i % 3 == 0, "regression", r"only 2 different values \(0, 1\): classification\?"),
        (lambda i: -1.0 if i % 3 else 1.0, "regression", r"only 2 different values \(-1, 1\): classification\?"),
        (lambda i: 1 + i % 5, "regression", r"only 5 different values \(1, 2, 3, 4, 5\): classification\?"),
        (lambda i: i % 19 / 4, "classification", r"19 different numbers such as 0\.25: regression\?"),
        (lambda i: i % 50, "classification", "50 different numbers: regression"),
        (lambda i: str(i % 3) if i % 17 else "?", "classification", r"'\?' as one more class: is that a missing value"),
        (lambda i: i + 7, "regression", "the target 'y' numbers the rows"),
        (lambda i: (i * i) % 101 / 3, "regression", None),
        (lambda i: i % 3, "classification", None),
        (lambda i: "abc"[i % 3], "classification", None),
    ],
)
def test_a_target_that_looks_like_another_task_is_asked_about(
    tmp_path: Path, target: object, task: str, match: str | None
) -> None:
    path = tmp_path / "t.csv"
    pd.DataFrame({"x": frame().a, "y": [target(i) for i in range(200)]}).to_csv(path, index=False)  # type: ignore[operator]
    notes = read(path, task=task).notes
    assert (len(notes) == 1 and re.search(match, notes[0])) if match else notes == (), notes
    assert read(path, task=task).notes == notes, "also of a table that was converted before"


@pytest.mark.parametrize(
    ("target", "task", "match"),
    [
        (lambda i: 7.5, "regression", r"the target 'y' is 7\.5 in every row: there is nothing to learn"),
        (lambda i: "x", "classification", "1 different value"),
        (lambda i: i / 3, "classification", r"200 different values in 200 rows: .*--set task=regression"),
        (lambda i: f"name {i}", "classification", "200 different values in 200 rows: .*another target"),
        (lambda i: i if i % 9 else None, "regression", r"'y': 23; .*Drop the rows without a target 'y'"),
        (lambda i: f"2024-01-{1 + i % 28:02d}", "regression", r"the target 'y' is date32\[day\] \(a date or time\)"),
    ],
)
def test_a_target_that_teaches_nothing_is_refused(tmp_path: Path, target: object, task: str, match: str) -> None:
    path = tmp_path / "t.csv"
    pd.DataFrame({"x": frame().a, "y": [target(i) for i in range(200)]}).to_csv(path, index=False)  # type: ignore[operator]
    with pytest.raises(ConfigError, match=match):
        read(path, task=task)


def test_a_column_that_numbers_the_rows_is_warned_of(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    frame().to_csv(path)
    (note,) = read(path).notes
    assert note.startswith("the column without a name, as pandas' index, numbers the rows: leave it out?")
    assert """--set features='["a", "b"]'""" in note
    frame().assign(user_id=np.random.default_rng(0).permutation(200)).to_csv(path, index=False)
    (note,) = read(path, target="price").notes
    assert "'user_id' numbers the rows" in note


def test_a_misspelt_column_is_found_from_the_files_beginning_alone(tmp_path: Path) -> None:
    path = written(tmp_path / "t.csv", csv())
    with pytest.raises(ConfigError, match="no column 'prcie': there are 'a', 'b', 'price'.*Did you mean 'price'"):
        read(path, target="prcie")
