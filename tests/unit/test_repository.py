"""The files around the code: what the README promises, the cluster file, the pair of quickstarts."""

from __future__ import annotations

import difflib
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).resolve().parents[2]


def bash_blocks() -> list[str]:
    return re.findall(r"^```bash\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.M | re.S)


def test_ray_accepts_the_cluster_file() -> None:
    config = prepare_config(yaml.safe_load((ROOT / "cluster.yaml").read_text()))
    validate_config(config)
    assert config["head_node_type"] in config["available_node_types"]


def test_the_readme_first_installs_and_trains_then_installs_and_tests() -> None:
    first, second = bash_blocks()
    assert "pip install" in first
    assert first.splitlines()[-1] == "raytrain-het train"
    assert "pip install" in second
    tested = [word for line in second.splitlines() if " pytest" in line for word in line.split()]
    kinds = sorted(path.name for path in (ROOT / "tests").iterdir() if any(path.glob("test_*.py")))
    assert sorted(word.removeprefix("tests/") for word in tested if word.startswith("tests/")) == kinds


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_ci_runs_exactly_the_readmes_second_block() -> None:
    shown = subprocess.run([ROOT / ".ci/run", "--block", "2"], capture_output=True, text=True, check=True).stdout
    assert shown == bash_blocks()[1]


def test_the_quickstarts_are_at_most_eight_lines_apart() -> None:
    plain, ours = ((ROOT / "experiments" / f"quickstart_{name}.py").read_text().splitlines() for name in ("ray", "het"))
    diff = [line for line in difflib.ndiff(plain, ours) if line[:2] in ("- ", "+ ")]
    assert 0 < sum(line.startswith("+ ") for line in diff) <= 8
    assert sum(line.startswith("- ") for line in diff) <= 8


def paths_of_the_file_tree() -> list[str]:
    """The tree is indented by two spaces a folder; a folder ends with a slash."""
    text = (ROOT / "README.md").read_text()
    (tree,) = re.findall(r"^```text\n(raytrain_het/\n.*?)^```", text, flags=re.M | re.S)
    paths, folders = [], [""]
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        name = line.split()[0]
        paths.append(folders[depth] + name)
        if name.endswith("/"):
            folders[depth + 1 :] = [folders[depth] + name]
    return paths


def test_every_path_of_the_readmes_file_tree_is_in_the_repository() -> None:
    paths = paths_of_the_file_tree()
    assert len(paths) > 10
    for path in paths:
        assert (ROOT / path).is_dir() if path.endswith("/") else (ROOT / path).is_file(), path


def test_every_folder_of_the_package_has_its_line_in_the_readmes_file_tree() -> None:
    package = ROOT / "raytrain_het"
    shown = {(ROOT / path) for path in paths_of_the_file_tree()}
    for parent in (package, package / "worker", package / "allreduce"):
        assert {str(path.parent) for path in parent.glob("*/*.py")} <= {str(path) for path in shown}


def test_each_line_of_the_readmes_diff_is_a_line_of_a_quickstart() -> None:
    (diff,) = re.findall(r"^```diff\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.M | re.S)
    for sign, name in (("-", "ray"), ("+", "het")):
        script = (ROOT / "experiments" / f"quickstart_{name}.py").read_text().splitlines()
        lines = [line[1:] for line in diff.splitlines() if line.startswith(sign)]
        assert len(lines) == 5
        assert [line for line in lines if line not in script] == []
