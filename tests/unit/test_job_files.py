"""Job files and --set: what is right is read, what is wrong is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from raytrain_het.errors import ConfigError
from raytrain_het.jobs.digits.job import DigitsJob
from raytrain_het.jobs.table import default_job, load_job


def error_of(*overrides: str, path: Path | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_job(path, overrides)
    return str(caught.value)


def write(folder: Path, text: str) -> Path:
    path = folder / "job.yaml"
    path.write_text(text)
    return path


def test_the_default_job_is_digits_on_two_workers_with_unequal_shares() -> None:
    job = load_job()
    assert job.kind == "digits"
    assert job.num_workers == 2
    assert job.het.shares is not None
    assert len(set(job.het.shares)) == 2


def test_the_default_job_file_and_the_dataclass_have_the_same_defaults() -> None:
    given = yaml.safe_load(default_job().read_text())
    for name in ("epochs", "global_batch_size", "lr", "optimizer", "label_smoothing"):
        assert given[name] == getattr(DigitsJob(), name), name


def test_a_resolved_job_reads_back_as_itself(tmp_path: Path) -> None:
    job = load_job(None, ["het.compression=bf16", "epochs=3", "workers.0.count=2"])
    assert load_job(write(tmp_path, job.to_yaml())) == job


@pytest.mark.parametrize(
    ("override", "near"),
    [("epohcs=3", "epochs"), ("het.compresion=bf16", "compression"), ("workers.0.cuont=3", "count")],
)
def test_an_unknown_key_is_named_by_its_path_with_the_nearest_right_key(override: str, near: str) -> None:
    message = error_of(override)
    assert f"--set {override.partition('=')[0]}" in message
    assert f"did you mean '{near}'?" in message
    path, _, value = override.replace("bf16", "'bf16'").partition("=")
    assert f"Write --set {'.'.join([*path.split('.')[:-1], near])}={value}, in a file {near}: {value}" in message


def test_an_unknown_key_in_a_file_is_named_with_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "kind: digits\nhet: {sharse: [1, 1]}\n")
    assert f"{path}: het.sharse=[1, 1]: there is no such key; did you mean 'shares'?" in error_of(path=path)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("epochs=many", ["--set epochs='many'", "a whole number", "default is 20: write --set epochs=20"]),
        ("het.shares=3,1", ["--set het.shares='3,1'", "Write --set het.shares='[3, 1]'"]),
        ("het.shares=[1]", ["--set het.shares=[1] has 1 number,", "--set het.shares='[1, 1]'"]),
        ("het.compression=null", ["--set het.compression=null"]),
        ("het.micro_batch_size=0", ["--set het.micro_batch_size=0", "or null"]),
        ("epochs=0", ["--set epochs=0", "from 1"]),
        ("epochs=true", ["--set epochs=true", "a whole number"]),
        ("lr=-1", ["--set lr=-1", "above 0"]),
        ("het.compression=fp8", ["compression='fp8'", "Write compression='fp16'"]),
        ("het.shares=[-1, 2]", ["--set het.shares=", "non-negative"]),
        ("het=3", ["--set het=3", "a mapping"]),
        ("workers=some", ["--set workers='some'", "'auto'"]),
        ("workers=[]", ["--set workers=[]", "1 or more"]),
        ("workers.0=5", ["--set workers.0=5", "a mapping"]),
        ("workers.0.resources.CPU=lots", ["--set workers.0.resources.CPU='lots'", "a number"]),
        ("name=a/b", ["--name='a/b'", "letters, digits, . _ -, no slash"]),
        ("kind=mnist", ["--set kind='mnist'", "'digits'"]),
        ("epochs", ["--set epochs", "KEY=VALUE"]),
        ("epochs.a=1", ["epochs is 20", "no keys below"]),
        ("workers.7.count=1", ["workers is a list of 1", "'7'"]),
        ("het.shares=[1", ["--set het.shares=[1", "not valid YAML"]),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(override: str, parts: list[str]) -> None:
    message = error_of(override)
    assert "\n" not in message  # one mistake, one line
    for part in parts:
        assert part in message


def test_several_mistakes_are_all_named() -> None:
    message = error_of("epochs=none", "lr=high")
    assert "epochs='none'" in message
    assert "lr='high'" in message


def test_a_number_of_shares_other_than_of_workers_is_refused() -> None:
    message = error_of("het.shares=[1, 2, 3]")
    assert "3 numbers" in message
    assert "--set het.shares='[1, 1]'" in message


def test_a_batch_smaller_than_the_number_of_workers_is_refused() -> None:
    assert "global_batch_size=1 is smaller than the number of workers, 2" in error_of("global_batch_size=1")


def test_overrides_are_read_as_yaml_and_the_last_one_counts() -> None:
    job = load_job(None, ["lr=1e-3", "epochs=3", "epochs=4", "het.shares=null", "workers=auto"])
    assert isinstance(job, DigitsJob)
    assert (job.lr, job.epochs, job.het.shares, job.workers) == (1e-3, 4, None, "auto")


def test_an_override_reaches_a_section_that_the_file_does_not_have(tmp_path: Path) -> None:
    assert load_job(write(tmp_path, "kind: digits\n"), ["het.compression=bf16"]).het.compression == "bf16"


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("kind: digits\nhet: [1, 2\n", "line 3: not valid YAML"),
        ("kind: digits\nepochs: 3\nepochs: 4\n", "line 3: not valid YAML: the key 'epochs' is there twice"),
        ("kind: digits\n1: 2\n", "line 2"),
        ("- a\n", "the file holds a list"),
        ("", "the file holds nothing"),
        ("epochs: 3\n", "kind is missing"),
    ],
)
def test_a_malformed_file_is_named_with_the_line(tmp_path: Path, text: str, part: str) -> None:
    path = write(tmp_path, text)
    message = error_of(path=path)
    assert str(path) in message
    assert part in message


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert "does not exist" in error_of(path=tmp_path / "nope.yaml")
    assert "cannot be read" in error_of(path=tmp_path)
