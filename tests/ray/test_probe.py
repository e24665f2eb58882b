"""`raytrain-het probe` on a cluster: one actor in the place of each worker."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ray_waiting import eventually, free

from raytrain_het.jobs.probe import run_probe
from raytrain_het.jobs.probe_report import to_json
from raytrain_het.jobs.table import load_job

JOB = Path(__file__).parents[2] / "experiments" / "jobs" / "tabular.yaml"


@pytest.mark.usefixtures("cluster")
def test_each_node_is_measured_once_and_a_jobs_workers_where_ray_would_place_them() -> None:
    eventually(lambda: free()["CPU"] >= 4, "the last test's resources")
    before, said = free(), []
    workers: Any = "[{count: 2, labels: {kind: cpu-box}}, {count: 1, labels: {kind: gpu-box}}]"
    job = load_job(JOB, ["rows=1000", "global_batch_size=96", f"workers={workers}"])
    found = json.loads(
        to_json(run_probe(job=job, address="auto", say=said.append, seconds_each=0.01, step_seconds=0.1))
    )
    nodes = [device["node"] for device in found["devices"]]
    assert len(nodes) == len(set(nodes)) == 2
    assert [w["node"] for w in found["model"]["workers"]] == [nodes[0], nodes[0], nodes[1]]
    assert sum(w["share"] for w in found["model"]["workers"]) == 96
    (link,) = found["links"]
    assert {link["from"], link["to"]} == set(nodes) and link["latency_s"]["median"] > 0
    assert found["model"]["communication_s"] > 0
    assert "measuring 2 devices on 2 nodes" in said
    eventually(lambda: free() == before, "what the probe took is free again")
