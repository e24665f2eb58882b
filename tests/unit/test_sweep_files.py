"""What a sweep's file may say, and what is said of one that makes no sense, before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from raytrain_het.errors import ConfigError
from raytrain_het.jobs.digits.job import DigitsJob
from raytrain_het.sweeps.paths import flat, known_paths, whole_path, with_settings
from raytrain_het.sweeps.sweep import Sweep, SweepConfig
from raytrain_het.sweeps.sweep_file import load_sweep, make_sweep

ROOT = Path(__file__).parents[2]
GOOD: dict[str, Any] = {"space": {"alpha": {"uniform": [-1, 1]}}, "metric": "accuracy"}


def sweep_of(folder: Path, **changes: Any) -> Sweep:
    (folder / "s.yaml").write_text(yaml.safe_dump(GOOD | changes))
    return load_sweep(folder / "s.yaml")


def error_of(folder: Path, **changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        sweep_of(folder, **changes)
    return str(caught.value)


# ---------------------------------------------------------------- paths


def test_every_path_that_is_listed_makes_a_job_of_it(tmp_path: Path) -> None:
    """Each short path stands for a whole one, and each whole one for itself."""
    known = known_paths(DigitsJob)
    assert known["alpha"] == known["het.alpha"] == "het.alpha"
    assert known["schedule.cosine.floor"] == "het.schedule.cosine.floor"
    assert known["optimizer.sgd.momentum"] == "optimizer.sgd.momentum"
    assert {"lr", "epochs", "compression.topk.density", "compression.auto.error", "clip.norm", "seed"} <= set(known)
    assert not {"kind", "name", "storage", "het", "het.het"} & set(known)
    for short, whole in known.items():
        assert whole_path(DigitsJob, short) == whole_path(DigitsJob, whole) == whole


@pytest.mark.parametrize(
    ("written", "near"),
    [("alhpa", "alpha"), ("compression.topk.densty", "compression.topk.density"), ("het.shedule", "het.schedule")],
)
def test_an_unknown_path_is_answered_with_the_nearest_right_one(tmp_path: Path, written: str, near: str) -> None:
    said = error_of(tmp_path, space={written: {"uniform": [0, 1]}})
    assert f"{tmp_path}/s.yaml: space.{written}: there is no such setting; did you mean {near!r}?" in said


def test_an_option_makes_it_that_kind_and_keeps_the_other_options() -> None:
    data = {"het": {"compression": "int8"}, "optimizer": {"sgd": {"momentum": 0.9, "weight_decay": 0.1}}}
    got, idle = with_settings(data, {"het.compression.topk.density": 0.1, "optimizer.sgd.momentum": 0.5})
    assert got["het"]["compression"] == {"topk": {"density": 0.1}}
    assert got["optimizer"] == {"sgd": {"momentum": 0.5, "weight_decay": 0.1}}
    assert idle == [] and data["het"]["compression"] == "int8"
    got, _ = with_settings({}, {"het.compression.topk.density": 0.1, "het.compression.topk.warmup_epochs": 2})
    assert got["het"]["compression"] == {"topk": {"density": 0.1, "warmup_epochs": 2}}


def test_an_option_of_a_kind_that_was_not_chosen_counts_for_nothing() -> None:
    settings = {"het.schedule": "cosine", "het.schedule.step.gamma": 0.5, "het.schedule.cosine.floor": 0.1}
    got, idle = with_settings({}, settings)
    assert got["het"]["schedule"] == {"cosine": {"floor": 0.1}}
    assert idle == ["het.schedule.step.gamma"]


def test_resolved_settings_are_flat_and_plain() -> None:
    nested = {"lr": 0.1, "het": {"shares": (3.0, 1.0), "schedule": {"cosine": {"floor": 0.1}}, "clip": None}}
    assert flat(nested) == {
        "lr": 0.1,
        "het.shares": "[3.0, 1.0]",
        "het.schedule": "{cosine: {floor: 0.1}}",
        "het.clip": None,
    }


# ---------------------------------------------------------------- whole sweeps


def test_a_trials_settings_are_in_its_job(tmp_path: Path) -> None:
    sweep = sweep_of(
        tmp_path,
        space={
            "alpha": {"uniform": [-1, 1]},
            "schedule": {"choice": ["inverse_time", {"cosine": {"floor": 0.1}}, None]},
            "compression.topk.density": {"loguniform": [0.001, 0.1]},
            "epochs": {"integers": [2, 5]},
        },
        set={"lr": 0.3, "het.shares": "auto"},
        workers=[{"count": 3}],
    )
    job = sweep.job_of(
        {"alpha": 0.5, "schedule": "{cosine: {floor: 0.1}}", "compression.topk.density": 0.02, "epochs": 4}
    )
    assert (job.het.alpha, job.het.schedule, job.het.compression) == (
        0.5,
        {"cosine": {"floor": 0.1}},
        "topk(density=0.02)",
    )
    assert isinstance(job, DigitsJob)
    assert (job.lr, job.epochs, job.num_workers, job.het.shares) == (0.3, 4, 3, "auto")
    assert sweep.job_of({"schedule": "null"}).het.schedule is None
    assert (sweep.num_trials, sweep.max_epochs) == (20, 5)


def test_a_sweep_reads_back_as_itself_from_the_files_it_leaves(tmp_path: Path) -> None:
    sweep = sweep_of(
        tmp_path,
        set={"epochs": 2, "het.shares": "auto"},
        workers=[{"count": 1}],
        search={"optuna": {"startup_trials": 3}},
        time_budget_s=60,
    )
    for name, text in sweep.files().items():
        (tmp_path / "left" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "left" / name).write_text(text)
    again = load_sweep(tmp_path / "left" / "sweep.yaml")
    assert again.jobs == sweep.jobs and again.dimensions == sweep.dimensions and again.files() == sweep.files()
    assert again.config.time_budget_s is None, "each time that it goes on has a budget of its own"


def test_several_jobs_are_compared_as_one_more_dimension(tmp_path: Path) -> None:
    for name, lr in (("a", 0.1), ("b", 0.2)):
        (tmp_path / f"{name}.yaml").write_text(f"kind: digits\nlr: {lr}\n")
    sweep = sweep_of(tmp_path, job=["a.yaml", "b.yaml"], space={"seed": {"grid": [1, 2, 3]}}, search="grid")
    assert sweep.num_trials == 6
    job = sweep.job_of({"job": "b", "seed": 2})
    assert isinstance(job, DigitsJob) and (job.lr, job.het.seed) == (0.2, 2)


def test_the_sweeps_of_this_repository_are_good() -> None:
    files = sorted((ROOT / "experiments" / "sweeps").glob("*.yaml"))
    assert files
    for file in files:
        load_sweep(file)


def test_a_grid_beside_what_is_drawn_divides_the_trials(tmp_path: Path) -> None:
    space = {"alpha": {"uniform": [-1, 1]}, "seed": {"grid": [1, 2, 3]}}
    assert sweep_of(tmp_path, space=space, trials=12).num_trials == 12
    assert sweep_of(tmp_path, space=space).num_trials == 21
    many = {"seed": {"grid": list(range(24))}, "alpha": {"uniform": [-1, 1]}}
    assert sweep_of(tmp_path, space=many).num_trials == 24
    few = {"seed": {"grid": [1, 2, 3]}, "schedule": {"choice": ["step", "cosine"]}}
    assert sweep_of(tmp_path, space=few).num_trials == 6, "no more than there are, unless they are asked for"
    said = error_of(tmp_path, space=space, trials=13)
    assert "trials=13 is not valid" in said and "a multiple of the grid's 3 points. Write trials: 12" in said


def in_lr(kind: str, *values: Any) -> dict[str, Any]:
    return {"space": {"lr": {kind: list(values)}}}


_LOW = {"uniform": [0.1, 0.2]}
_WARM_UP = {"het.schedule": {"cosine": {"warmup_epochs": 2}}}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"space": {}}, "space={} is empty: nothing is varied. Write space: {alpha: {uniform: [-1, 1]}}"),
        (in_lr("uniform", 0.2, 0.1), "lr.uniform=[0.2, 0.1] is not valid: the range is empty. Write [0.1, 0.2]"),
        (in_lr("uniform", 0.2, 0.2), "the range is empty. For one value write {choice: [...]}"),
        (in_lr("loguniform", 0, 0.2), "on a logarithmic scale numbers are above 0"),
        (in_lr("choice"), "space.lr.choice=[] is not valid: allowed is a list of one value or more"),
        (in_lr("choice", 0.1, 0.1), "a value is there twice"),
        ({"space": {"lr": [0.1, 0.2]}}, "space.lr=[0.1, 0.2] is not valid: allowed is {uniform: [-1, 1]}"),
        (in_lr("unifrom", 0.1, 0.2), "Did you mean 'uniform'?"),
        ({"space": {"epochs": {"integers": [1, 2.5]}}}, "allowed is [low, high], two whole numbers"),
        (in_lr("uniform", -1, 1), "with lr=-1.0 there is no job: lr=-1.0 is not valid: allowed is a number above 0"),
        ({"space": {"schedule": {"choice": ["cosin"]}}}, "with schedule='cosin' there is no job"),
        ({"space": {"alpha": _LOW, "het.alpha": _LOW}}, "the same setting is there as 'alpha'"),
        (
            {"space": {"compression.topk.density": _LOW, "compression.randomk.density": _LOW}},
            "Write compression: {choice: [randomk, topk]} too",
        ),
        ({"space": {"epochs": {"choice": [1, 5]}}, "set": _WARM_UP}, "warmup_epochs=2"),
        ({"metric": "acuracy"}, "metric='acuracy': the job does not report it; did you mean 'accuracy'?"),
        ({"metric": "x"}, "Allowed: accuracy, held_out_loss, train_loss; of any run seconds, bytes_sent"),
        ({"metric": {"time_to": {"seconds": 3}}}, "the job does not report it"),
        ({"metric": {"time_to": {"accuracy": "high"}}}, "allowed for 'accuracy' is a number"),
        ({"metric": {"tiem_to": {"accuracy": 0.9}}}, "Write metric: {time_to: {accuracy: 0.97}}"),
        ({"space": {"epochs": {"uniform": [2, 6]}}}, "epochs=3.27"),
        (in_lr("grid", *range(1, 60), -1), "with lr=-1 there is no job"),
        (
            {"space": {"seed": {"grid": [1, 2]}}, "search": "grid", "trials": 1},
            "search='grid' tries all 2 combinations",
        ),
        ({"space": {"seed": {"choice": [1, 2]}}, "trials": 3}, "there are 2 combinations. Write search: grid"),
        ({"simulate": [1, 0]}, "simulate.1=0"),
        ({"search": {"random": {"startup_trials": 10}}}, "'random' has no option 'startup_trials'; it has none. Write"),
        ({"search": "gird"}, "search='gird' is not valid: allowed is grid, random, optuna"),
        (
            {"search": "grid"},
            "space.alpha: search='grid' tries every value, and a range has no end of them. Write alpha",
        ),
        ({"search": "optuna", "space": {"seed": {"grid": [1]}}}, "search='optuna' draws, it does not try every value"),
        (
            {"scheduler": {"asha": {"grace_epochs": 20}}},
            "grace_epochs=20 is not valid: allowed is less than the job's 20",
        ),
        ({"scheduler": "asah"}, "Write scheduler='asha'"),
        ({"trials": 0}, "trials=0 is not valid: allowed is a number from 1"),
        ({"trails": 5}, "did you mean 'trials'?"),
        ({"set": {"epohcs": 5}}, "set.epohcs=5: there is no such setting; did you mean 'epochs'?"),
        ({"set": {"lr": -1}}, "lr=-1"),
        ({"workers": [{"count": 0}]}, "workers.0.count=0"),
        ({"set": {"het.shares": [1, 2, 3]}}, "het.shares=[1, 2, 3]"),
        ({"job": "nowhere.yaml"}, "nowhere.yaml' does not exist"),
    ],
)
def test_a_sweep_that_makes_no_sense_is_refused_with_the_path_of_what_is_wrong(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    assert said in error_of(tmp_path, **changes)


def test_a_kind_that_is_chosen_keeps_the_options_that_the_job_gives_it(tmp_path: Path) -> None:
    sweep = sweep_of(
        tmp_path,
        set={"compression.topk.density": 0.05},
        space={
            "compression": {"choice": ["topk", "int8"]},
            "clip": {"choice": [None, {"norm": 1.0}]},
            "clip.norm": {"uniform": [0.5, 2]},
        },
    )
    norm = "{norm: 1.0}"
    job = sweep.job_of({"compression": "topk", "clip": norm, "clip.norm": 0.7})
    assert (job.het.compression, job.het.clip) == ("topk(density=0.05)", {"norm": 0.7})
    settings = {"compression": "int8", "clip": "null", "clip.norm": 0.7}
    assert (sweep.job_of(settings).het.compression, sweep.job_of(settings).het.clip) == ("int8", None)
    assert sweep.data_of(settings)[1] == ["clip.norm"]


def test_files_that_a_job_names_are_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials run in folders of their own."""
    (tmp_path / "t.yaml").write_text("kind: tabular\ndata: a.csv\n")
    monkeypatch.chdir(tmp_path)
    sweep = sweep_of(tmp_path, job="t.yaml", metric="held_out_mse", space={"data": {"choice": ["b.csv", "c.csv"]}})
    monkeypatch.chdir("/")
    assert sweep.jobs["t"]["data"] == str(tmp_path / "a.csv")
    assert sweep.data_of({"data": "b.csv"})[0]["data"] == str(tmp_path / "b.csv")
    for name, text in sweep.files().items():
        (tmp_path / "left" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "left" / name).write_text(text)
    assert load_sweep(tmp_path / "left" / "sweep.yaml").files() == sweep.files()


def test_a_sweep_from_python_is_checked_as_one_from_a_file() -> None:
    workers: Any = [{"count": 3}]
    assert make_sweep(SweepConfig(**GOOD, workers=workers, set={"het.shares": "auto"})).default_job().num_workers == 3  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="trials=-1 is not valid"):
        make_sweep(SweepConfig(**GOOD, trials=-1))  # type: ignore[arg-type]


def test_the_best_job_is_stored_and_kept_as_its_file_says(tmp_path: Path) -> None:
    (tmp_path / "j.yaml").write_text("kind: digits\nkeep_checkpoints: null\nstorage: elsewhere\n")
    job = sweep_of(tmp_path, job="j.yaml").default_job()
    assert (job.keep_checkpoints, job.storage, job.name) == (None, "elsewhere", None)


def test_all_mistakes_of_a_space_are_told_at_once(tmp_path: Path) -> None:
    said = error_of(tmp_path, space={"alhpa": {"uniform": [0, 1]}, "lr": {"uniform": [1, 0]}}, metric="loss")
    assert len(said.splitlines()) == 3


def test_a_jobs_setting_is_not_a_sweeps(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(GOOD))
    with pytest.raises(ConfigError, match=r"has no 'epochs'; allowed is space, .* write --set set\.epochs=2"):
        load_sweep(tmp_path / "s.yaml", ["epochs=2"])
    assert load_sweep(tmp_path / "s.yaml", ["set.epochs=2"]).max_epochs == 2
    with pytest.raises(ConfigError, match="did you mean 'trials'"):
        load_sweep(tmp_path / "s.yaml", ["trails=2"])


def test_an_override_is_named_as_it_was_written(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(GOOD))
    with pytest.raises(ConfigError, match=r"--set trials=0 is not valid"):
        load_sweep(tmp_path / "s.yaml", ["trials=0"])
    with pytest.raises(ConfigError, match=r"sweep file '.*none.yaml' does not exist"):
        load_sweep(tmp_path / "none.yaml")


def test_the_data_of_every_trial_is_looked_at(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.yaml").write_text(f"kind: tabular\ntask: regression\ndata: {name}.csv\ntarget: y\n")
    said = ["b.csv", "c.csv"]
    sweep = sweep_of(
        tmp_path, job="a.yaml", space={"data": {"choice": said}, "lr": {"uniform": [0.1, 1]}}, metric="train_loss"
    )
    assert [Path(job.data).name for job in sweep.jobs_by_data()] == said  # type: ignore[attr-defined]
    sweep = sweep_of(tmp_path, job=["a.yaml", "c.yaml"], space={"lr": {"uniform": [0.1, 1]}}, metric="train_loss")
    assert [Path(job.data).name for job in sweep.jobs_by_data()] == ["a.csv", "c.csv"]  # type: ignore[attr-defined]
