"""Tables of the tabular job: what is read, what is refused, and that nothing is copied per worker."""

from __future__ import annotations

import dataclasses
import os
import re
import resource
import tempfile
import time
from decimal import Decimal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from raytrain_het.errors import ConfigError
from raytrain_het.jobs.job_data import check_data, with_fitting_batch
from raytrain_het.jobs.runner import resolve
from raytrain_het.jobs.table import load_job
from raytrain_het.jobs.tabular import data as tabular_data
from raytrain_het.jobs.tabular import file as table_file
from raytrain_het.jobs.tabular import training as tabular
from raytrain_het.jobs.tabular.columns import Source
from raytrain_het.jobs.tabular.data import open_table
from raytrain_het.jobs.tabular.job import TabularJob
from raytrain_het.worker.data.fetch import SampleFetcher

GENERATED = Source(data=None, rows=1000, columns=3, target=None, features=None, task="regression", seed=0)


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def source(path: Path, **changes: object) -> Source:
    return dataclasses.replace(GENERATED, data=str(path), **changes)  # type: ignore[arg-type]


def frame() -> pd.DataFrame:
    random = np.random.default_rng(1)
    return pd.DataFrame({"a": random.normal(5, 3, 200), "b": random.integers(0, 9, 200), "price": range(200)})


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_table_is_split_by_seed_and_standardised(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"t.{suffix}"
    frame().to_csv(path, index=False) if suffix == "csv" else frame().to_parquet(path)
    table = open_table(source(path))
    assert (table.features, table.target, table.num_train, len(table.x)) == (("a", "b"), "price", 160, 200)
    train = table.x[:160]
    assert np.allclose(train.mean(axis=0), 0, atol=1e-6)
    assert np.allclose(train.std(axis=0), 1, atol=1e-6)
    prices = table.y * table.target_deviation
    back = np.sort(prices - prices.min())
    assert np.allclose(back, np.arange(200), atol=1e-4)
    other = open_table(source(path, seed=1))
    assert not np.array_equal(table.y[160:], other.y[160:])


def test_csv_and_parquet_give_the_same_pairs_of_one_row(tmp_path: Path) -> None:
    """The target is a function of the columns, so that a row torn apart would show."""
    data = frame().assign(price=lambda t: 2 * t.a - 3 * t.b + 7)
    data.to_csv(tmp_path / "t.csv", index=False)
    data.to_parquet(tmp_path / "t.parquet")
    one, other = (open_table(source(tmp_path / name)) for name in ("t.csv", "t.parquet"))
    assert np.array_equal(one.x, other.x) and np.array_equal(one.y, other.y)
    assert one.fingerprint == other.fingerprint
    order = np.random.default_rng(0).permutation(200)
    train = data.iloc[order[:160]]
    rows = one.x * train[["a", "b"]].std(ddof=0).to_numpy() + train[["a", "b"]].mean().to_numpy()
    assert np.allclose(rows, data[["a", "b"]].iloc[order], atol=1e-4)
    assert np.allclose(
        one.y * one.target_deviation + train.price.mean(), 2 * rows[:, 0] - 3 * rows[:, 1] + 7, atol=1e-3
    )


def test_large_numbers_that_differ_little_stay_different(tmp_path: Path) -> None:
    """Times in seconds since 1970, and what fp32 cannot hold."""
    path = tmp_path / "t.csv"
    i = np.arange(100)
    pd.DataFrame({"time": 1_700_000_000 + i, "huge": 1e39 * i, "same": 0.1, "y": 1_700_000_000 + i}).to_csv(
        path, index=False
    )
    table = open_table(source(path))
    back = np.sort(table.x[:, 0] * table.target_deviation)
    assert np.allclose(back - back[0], i, atol=1e-3)
    assert np.allclose(table.x[:, 1], table.x[:, 0], atol=1e-5) and np.allclose(table.y, table.x[:, 0], atol=1e-5)
    assert not table.x[:, 2].any()


def test_a_column_that_no_float_can_standardise_is_named(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    pd.DataFrame({"a": 1e300 * np.arange(100), "y": range(100)}).to_csv(path, index=False)
    with pytest.raises(ConfigError, match="the column 'a', from 0 to 9.9e\\+301, cannot be standardised"):
        open_table(source(path))


def test_a_uri_is_read_like_a_path(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    frame().to_csv(path, index=False)
    by_uri = dataclasses.replace(GENERATED, data=f"file://{path}")
    assert np.array_equal(open_table(source(path)).x, open_table(by_uri).x)


def test_a_table_is_converted_once_and_mapped_by_all(tmp_path: Path) -> None:
    first = open_table(GENERATED)
    made = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.npy")}
    second = open_table(GENERATED)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.npy")} == made
    for table in (first, second):
        assert isinstance(table.x, np.memmap)
        assert torch.from_numpy(table.x).data_ptr() == table.x.ctypes.data


def test_a_changed_file_is_another_table(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    frame().to_csv(path, index=False)
    open_table(source(path))
    frame().head(100).to_csv(path, index=False)
    assert len(open_table(source(path)).x) == 100


def test_tables_of_one_file_that_nobody_uses_are_removed(tmp_path: Path) -> None:
    """Each seed, version and choice of columns is a copy of its own."""
    paths = [tmp_path / name for name in ("t.csv", "other.csv")]
    for path in paths:
        frame().to_csv(path, index=False)

    def kept() -> int:
        return len(list(tmp_path.rglob("x.npy")))

    used = torch.from_numpy(open_table(source(paths[0])).x)[:10]
    open_table(source(paths[1]))
    open_table(source(paths[0], seed=1))
    assert kept() == 3
    open_table(source(paths[0], seed=2))
    assert kept() == 3, "that of seed 1 has gone"
    assert torch.equal(used, torch.from_numpy(open_table(source(paths[0])).x)[:10])
    del used
    (tmp_path / f"raytrain_het-{os.getuid()}" / "table-0123.part").mkdir()
    open_table(source(paths[0], features=("a",)))
    assert kept() == 2 and not list(tmp_path.rglob("*.part"))
    assert len(open_table(source(paths[1])).x) == 200


def test_a_run_goes_on_with_its_own_table_only(tmp_path: Path) -> None:
    """Its length would not tell: workers compare fingerprints, and so does a checkpoint."""
    paths = [tmp_path / name for name in ("t.csv", "copy.csv", "other.csv")]
    for path in paths:
        (frame().assign(a=1.0 * frame().b[::-1].to_numpy()) if path.stem == "other" else frame()).to_csv(
            path, index=False
        )
    sets = [tabular._data_sets(open_table(source(path)))[0] for path in paths]
    one, copy, other = (s.fingerprint for s in sets)
    assert one == copy != other
    assert one != open_table(source(paths[0], target="a")).fingerprint
    assert open_table(GENERATED).fingerprint != open_table(dataclasses.replace(GENERATED, seed=1)).fingerprint
    assert SampleFetcher(sets[0])._direct, "its samples would be fetched one by one"
    assert "data" in TabularJob.model_keys


def test_classes_are_the_targets_values(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    frame().assign(kind=["red", "blue"] * 100).to_csv(path, index=False)
    table = open_table(source(path, target="kind", task="classification"))
    assert table.classes == ("blue", "red")
    assert np.bincount(table.y).tolist() == [100, 100]


def refusal(tmp_path: Path, text: str, **changes: object) -> str:
    """What is said of a bad table."""
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(ConfigError) as refused:
        open_table(source(path, **changes))
    return str(refused.value)


GOOD = "a,b,c\n" + "1,2,3\n" * 20


@pytest.mark.parametrize(
    ("text", "match", "changes"),
    [
        ("", "is empty", {}),
        ("a,b\n", "0 rows of 2 columns", {}),
        ("a\n1\n", "of 1 columns", {}),
        ("a,b\n1,2\n1,2,3\n", "neither CSV nor Parquet, or damaged.*Expected 2 columns, got 3", {}),
        ("a,b\n" + "1,x\n" * 20, "the target 'b' is text: .*write --set task=classification", {}),
        ("a,b,c\n" + "1,nan,2\n" * 3 + "1,,2\n" * 20 + "1,2,2\n" * 9, "'b': 23; the table has 32 rows", {}),
        ("a,b\n" + ",2\n" * 20, "'a': 20; the table has 20 rows", {}),
        (
            "area,age,colour,shape,price\n" + "1,2,red,round,3\n" * 20,
            """2 columns are not numeric .*--set features='\\["area", "age"\\]'""",
            {},
        ),
        ("a,colour,b\n" + "1,red,3\n" * 20, "1 column is not numeric \\('colour' is text\\)", {}),
        ("colour,b\n" + "red,3\n" * 20, "Encode as numbers: no other is left", {}),
        (GOOD, "no column 'z': there are 'a', 'b', 'c'", {"target": "z"}),
        (GOOD, "no column 'y', 'z'", {"features": ("a", "y", "z")}),
        (GOOD, """the target 'c' is one of the features.*features='\\["a"\\]'""", {"features": ("a", "c")}),
        (GOOD, """twice: 'a'.*--set features='\\["a", "b"\\]'""", {"features": ("a", "b", "a")}),
        (
            "a,kind\n" + "1,red\n2,blue\n" * 9 + "3,\n4,NA\n5,nan\n",
            "missing, NaN or infinite \\('kind': 3; the table has 21",
            {"task": "classification"},
        ),
        (GOOD, "'c' has 1 different value: allowed", {"task": "classification"}),
        ("a,a,b\n" + "1,2,3\n" * 20, "columns of the same name: 'a'", {}),
        ("a,b\n" + "1,2\n" * 5, "has 5 rows", {}),
    ],
)
def test_a_bad_table_is_refused_with_the_column_and_the_fix(
    tmp_path: Path, text: str, match: str, changes: dict
) -> None:
    assert re.search(match, refusal(tmp_path, text, **changes))
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("a,caf\xe9\n" + "1,2\n" * 20, "names of its columns are not UTF-8.*iconv"),
        ("a,b\n" + "\xe9,2\n" * 20, "'a' is binary, or text that is not UTF-8"),
        ("a,b\n" + "1,\xe9\n" * 20, "the target 'b' is binary, or text that is not UTF-8"),
    ],
)
def test_text_in_latin_1_is_called_by_its_name(tmp_path: Path, text: str, match: str) -> None:
    path = tmp_path / "t.csv"
    path.write_text(text, "latin-1")
    with pytest.raises(ConfigError, match=match):
        open_table(source(path))


@pytest.mark.parametrize("value", [{"u": 1}, [1, 2], pd.Timestamp(0)])
@pytest.mark.parametrize("task", ["regression", "classification"])
def test_a_target_that_is_neither_text_nor_a_number_is_refused(tmp_path: Path, value: object, task: str) -> None:
    path = tmp_path / "t.parquet"
    pd.DataFrame({"a": range(20), "b": [value] * 20}).to_parquet(path)
    with pytest.raises(ConfigError, match="the target 'b' is (struct|list|timestamp).*write another target"):
        open_table(source(path, task=task))


def test_decimals_are_numbers_and_categories_are_their_values(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    cents = [Decimal(i) / 100 for i in range(20)]
    kind = pd.Categorical(["red", "blue"] * 10)
    pd.DataFrame({"a": cents, "kind": kind, "b": cents}).to_parquet(path)
    table = open_table(source(path, features=("a",)))
    assert np.allclose(table.x[:, 0], table.y) and table.target_deviation == pytest.approx(0.058, abs=0.02)
    assert open_table(source(path, task="classification", target="kind")).classes == ("blue", "red")


def test_a_class_that_only_the_held_out_part_has_is_warned_of(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    held_out = np.random.default_rng(0).permutation(200)[160:]
    kinds = np.where(np.arange(200) % 2, "red", "blue").astype(object)
    kinds[held_out[0]] = "green"
    frame().assign(kind=kinds).to_csv(path, index=False)
    overrides = [f"data={path}", "task=classification", "target=kind", "global_batch_size=16", "features=[a, b]"]
    (note,) = check_data(load_job(_tabular(), overrides))
    assert "only the held-out part has 1 value of the target 'kind' ('green')" in note


def test_a_damaged_parquet_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    frame().to_parquet(path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ConfigError, match="neither CSV nor Parquet, or damaged"):
        open_table(source(path))


@pytest.mark.parametrize(
    ("data", "match"),
    [
        ("nowhere.csv", "does not exist"),
        (".", "is a folder"),
        ("abfss://x/y.csv", "cannot be opened"),
        ("hdfs://nobody:1/t.csv", "cannot be opened.*libhdfs"),
    ],
)
def test_a_place_that_cannot_be_read_is_named(data: str, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        open_table(dataclasses.replace(GENERATED, data=data))


def test_a_storage_of_google_that_cannot_be_reached_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_file, "GS_RETRY_S", 0.1)
    nowhere = "gs://anonymous@bucket/t.csv?scheme=http&endpoint_override=127.0.0.1:1"
    began = time.monotonic()
    with pytest.raises(ConfigError, match="cannot be reached"):
        open_table(dataclasses.replace(GENERATED, data=nowhere))
    assert time.monotonic() - began < 10
    _, path = table_file.file_system(f"{nowhere}&retry_limit_seconds=1")
    assert path == "bucket/t.csv"


def test_a_bad_table_is_found_before_any_worker_is_started(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("a,b\n" + "1,x\n" * 20)
    job = load_job(_tabular(), [f"data={path}"])
    with pytest.raises(ConfigError, match="is text"):
        check_data(job)


def test_a_table_named_by_a_relative_path_is_found_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers run in a folder of the run's, and a run may be gone on with from anywhere."""
    frame().to_csv(tmp_path / "my.csv", index=False)
    monkeypatch.chdir(tmp_path)
    job = resolve(load_job(_tabular(), ["data=my.csv", "storage=runs"]))
    assert job.train_loop_config()["data"] == str(tmp_path / "my.csv")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    check_data(job)
    (tmp_path / "job.yaml").write_text(job.to_yaml())
    check_data(resolve(load_job(tmp_path / "job.yaml")))
    assert resolve(load_job(_tabular(), ["data=s3://b/my.csv"])).train_loop_config()["data"] == "s3://b/my.csv"


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        (["target=price"], "target='price' needs a table"),
        (["task=classification"], "needs a table"),
        (["data=x.csv", "features=[]"], "features=\\[\\] is not valid"),
        (["data=x.csv", "target=a", "features=[a, b]"], "other than the target"),
        (["task=clustering"], "'regression' or 'classification'"),
        (["l1=-1"], "l1=-1 is not valid"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(overrides: list[str], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        load_job(_tabular(), overrides)


def _tabular() -> Path:
    return Path(__file__).parents[2] / "experiments" / "jobs" / "tabular.yaml"


def test_a_batch_larger_than_the_table_becomes_a_tenth_of_it_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    frame().to_csv(path, index=False)
    job = load_job(_tabular(), [f"data={path}", "target=a"])
    (note, _) = reversed(check_data(job))
    assert "global_batch_size=4096 is more than the 160 samples to train on: 16 are taken" in note
    assert with_fitting_batch(job).train_loop_config() == job.train_loop_config() | {"global_batch_size": 16}
    fits = load_job(_tabular(), [f"data={path}", "global_batch_size=160"])
    assert with_fitting_batch(fits) is fits
    many = load_job(_tabular(), [f"data={path}", "workers=[{count: 40}]"])
    assert with_fitting_batch(many).global_batch_size == 40, "a sample for each worker"
    assert check_data(load_job(_tabular(), [f"data={path}", "target=a", "features=[b]", "global_batch_size=160"])) == []


def fit(table_source: Source, **changes: object) -> tuple[torch.nn.Module, tabular_data.TableData]:
    """Full-batch gradient descent with the job's own model and loss."""
    config = load_job(_tabular(), []).train_loop_config() | changes
    table = open_table(table_source)
    torch.manual_seed(0)
    model = tabular.build_model(config, table)
    loss_of = tabular.make_loss(table)
    optimizer = tabular.make_optimizer(config, model)
    x, y = torch.from_numpy(table.x[: table.num_train]), torch.from_numpy(table.y[: table.num_train])
    for _ in range(200):
        optimizer.zero_grad()
        loss_of(model(x), y).backward()
        optimizer.step()
    return model, table


def test_the_made_up_regression_is_learnt_down_to_its_noise() -> None:
    model, table = fit(GENERATED)
    with torch.no_grad():
        out = model(torch.from_numpy(table.x[table.num_train :])).squeeze(1).numpy()
    mse = ((out - table.y[table.num_train :]) ** 2).mean() * table.target_deviation**2
    assert 0.007 < mse < 0.014


def test_penalties_reach_the_minimum_of_ridge_and_of_lasso_with_exact_zeros() -> None:
    """With standardised, nearly uncorrelated columns both have a closed form."""

    def weights(**changes: float) -> torch.Tensor:
        model, _ = fit(GENERATED, **changes)
        assert model[0].bias.abs() < 0.05
        return model[0].weight.detach()

    free, lasso, ridge = weights(), weights(l1=1.0), weights(l2=1.0)
    assert torch.allclose(ridge, free * 2 / 3, atol=0.03)
    assert torch.allclose(lasso, torch.nn.functional.softshrink(free, 0.5), atol=0.03)
    assert 0 < (lasso == 0).sum() < 3


def test_the_space_for_a_table_is_taken_before_it_is_written_to(tmp_path: Path) -> None:
    """What is mapped and not there when the disk is full is a SIGBUS, which no one can catch."""
    x = tabular_data._new_x(tmp_path, 100_000, 10)
    assert (tmp_path / "x.npy").stat().st_blocks * 512 >= x.nbytes


def test_a_table_that_is_larger_than_a_file_may_be_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(ConfigError, match="no space left"):
            open_table(GENERATED)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        with open("/dev/full", "wb", buffering=0) as file:
            file.write(b"x")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(ConfigError, match="no space left"):
        open_table(GENERATED)
    assert not list(tmp_path.rglob("*.part"))
