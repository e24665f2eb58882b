"""Starting a run is mostly imports: processes that hold no tensor load no torch."""

from __future__ import annotations

import subprocess
import sys


def test_a_controller_and_the_membership_actor_start_without_torch() -> None:
    # What the driver sends to the controller, read in a process of its own.
    code = """
import subprocess, sys
from ray import cloudpickle
from raytrain_het import HetConfig
from raytrain_het.ray_train.backend import HetBackendConfig, WorkerSetup
from raytrain_het.ray_train.controller import HetController, RunPlan
from raytrain_het.ray_train.hub import Parts

sent = [HetController, RunPlan(config=HetConfig(), parts=Parts.default()), HetBackendConfig(), WorkerSetup(True)]
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
print("sklearn" in sys.modules, "raytrain_het.training.session" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["False", "False"], done.stderr
