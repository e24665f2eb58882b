"""Starting is mostly imports: processes without tensors load no torch, and a typo waits for neither torch nor Ray."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


def test_a_controller_and_the_membership_actor_start_without_torch() -> None:
    # What the driver sends to the controller, read in a process of its own.
    code = """
import subprocess, sys
from ray import cloudpickle
from raytrain_het import HetConfig
from raytrain_het.ray_train.backend import HetBackendConfig, WorkerSetup
from raytrain_het.ray_train.controller import HetController, RunSettings
from raytrain_het.ray_train.hub import Parts

sent = [HetController, RunSettings(config=HetConfig(), parts=Parts.default()), HetBackendConfig(), WorkerSetup(True)]
again = [sys.executable, "-c", "import sys; from ray import cloudpickle;"
         "cloudpickle.loads(sys.stdin.buffer.read())[1].parts.actor; print('torch' in sys.modules)"]
print(subprocess.run(again, input=cloudpickle.dumps(sent), capture_output=True, check=True).stdout.decode())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["False"], done.stderr


def test_a_job_is_sent_without_loading_what_it_trains_with() -> None:
    code = """
import sys
from ray import cloudpickle
from raytrain_het.jobs.table import load_job
from raytrain_het.jobs.trainer import make_trainer

cloudpickle.dumps(make_trainer(load_job()))
print("sklearn" in sys.modules, "raytrain_het.worker.session" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["False", "False"], done.stderr


AT_ONCE = [
    "--help",
    "train --help",
    "probe --help",
    "sweep --help",
    "schedule --help",
    "trian",
    "train --nmae x",
    "train --keys",
    "train --set epohcs=3",
    "train --set epochs=three",
    "train --set epochs 3",
    "train --set het.shares=[1,-1]",
    "train --set het.compression=tpok",
    "train --set workers.0.cuont=3",
    "train nowhere.yaml",
    "train key.yaml",
    "train broken.yaml",
    "train no_data.yaml",
    "train table.yaml --set target=prcie",
    "train table.yaml --set features=[x]",
    "train headless.yaml",
    "train --simulate 1,x",
    "train --storage t.csv/x",
    "train --address nowhere",
    "train --name a/b",
    "probe --model nowhere.yaml",
    "probe --model key.yaml",
    "probe --model no_data.yaml",
    "probe --compression",
    "probe --address nowhere",
    "sweep nowhere.yaml",
    "sweep spcae.yaml",
    "sweep path.yaml",
    "sweep metric.yaml",
    "sweep no_data_sweep.yaml",
    "sweep sweep.yaml --set trails=3",
    "sweep sweep.yaml --resume",
    "sweep sweep.yaml --resume --name other",
    "sweep sweep.yaml --simulate 1,x",
    "sweep sweep.yaml --address nowhere",
    "schedule cosin",
    "schedule --out x.pgn",
]


def test_help_typos_and_missing_files_load_neither_torch_nor_ray(tmp_path: Path) -> None:
    files = {
        "key.yaml": "kind: digits\nepohcs: 3\n",
        "broken.yaml": "kind: digits\n  epochs: [3\n",
        "no_data.yaml": "kind: tabular\ndata: nowhere.csv\n",
        "table.yaml": "kind: tabular\ndata: t.csv\n",
        "headless.yaml": "kind: tabular\ndata: h.csv\n",
        "t.csv": "a,b,price\n" + "".join(f"{i}.5,{i % 7},{i * i}\n" for i in range(50)),
        "h.csv": "".join(f"{i}.5,{i % 7},{i * i}\n" for i in range(50)),
        "sweep.yaml": "space: {lr: {uniform: [0.1, 1]}}\nmetric: accuracy\n",
        "spcae.yaml": "spcae: {lr: {uniform: [0.1, 1]}}\nmetric: accuracy\n",
        "path.yaml": "space: {lrr: {uniform: [0.1, 1]}}\nmetric: accuracy\n",
        "metric.yaml": "space: {lr: {uniform: [0.1, 1]}}\nmetric: acuracy\n",
        "no_data_sweep.yaml": "job: no_data.yaml\nspace: {lr: {uniform: [0.1, 1]}}\nmetric: held_out_mse\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    # One process for all of them, which looks after each: what one has loaded would be seen at once.
    code = """
import contextlib, io, json, sys
from raytrain_het.cli import main

for command in json.load(sys.stdin):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            status = main(command.split())
        except SystemExit as end:
            status = end.code
    loaded = sorted({"torch", "ray", "pandas", "numba", "matplotlib"} & set(sys.modules))
    if loaded or status != (0 if "--help" in command or "--keys" in command else 2):
        print(command, status, loaded)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(AT_ONCE),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
    )
    assert (done.stdout, done.returncode) == ("", 0), done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(files), "nothing was started"
