"""Which workers a run has: pure functions over node dictionaries."""

from __future__ import annotations

import numpy as np
import pytest

from raytrain_het.config import HetConfig
from raytrain_het.errors import ConfigError, ResourceError
from raytrain_het.ray_train.resources import NodeShape, check_feasible, matches, num_fitting, resolve_auto, shapes_of
from raytrain_het.ray_train.scaling import HetScalingConfig, WorkerSpec
from raytrain_het.ray_train.trainer import HetTrainer
from raytrain_het.ray_train.versions import check_ray


def node(name: str, *, labels: dict[str, str] | None = None, alive: bool = True, **resources: float) -> dict:
    return {"NodeID": name, "NodeManagerAddress": name, "Alive": alive, "Resources": resources, "Labels": labels or {}}


def specs(*workers: WorkerSpec) -> tuple:
    return HetScalingConfig(list(workers)).slots


def test_a_misspelt_setting_is_refused_with_the_nearest_right_one() -> None:
    with pytest.raises(ConfigError, match=r"WorkerSpec\(recources=\{'CPU': 2\}\).*Write resources=\{'CPU': 2\}"):
        WorkerSpec(recources={"CPU": 2})  # type: ignore[call-arg]
    with pytest.raises(
        ConfigError, match=r"HetConfig\(aplha=0.5\): there is no such setting. Write alpha=0.5. Allowed: "
    ):
        HetConfig(aplha=0.5)  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match=r"HetConfig\(zzz=1\).*Leave it out"):
        HetConfig(zzz=1)  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match=r"HetScalingConfig\(workrs='auto'\).*Write workers='auto'"):
        HetScalingConfig(workrs="auto")
    with pytest.raises(ConfigError, match=r"HetTrainer\(het_confg=1\).*Write het_config=1. Allowed: train_loop_per_w"):
        HetTrainer(print, het_confg=1)


def test_auto_gives_one_worker_per_gpu_and_one_per_cpu_only_node() -> None:
    nodes = [node("c", CPU=6), node("g", CPU=9, GPU=2), node("head", CPU=0), node("x", CPU=4, alive=False)]
    slots = resolve_auto(nodes)
    assert [s.resources for s in slots] == [{"GPU": 1, "CPU": 4}, {"GPU": 1, "CPU": 4}, {"CPU": 6}]
    assert [s.node_id for s in slots] == ["g", "g", "c"]


def test_auto_leaves_what_others_hold() -> None:
    nodes = [node("a", CPU=4), node("g", CPU=4, GPU=2)]
    slots = resolve_auto(nodes, {"a": {"CPU": 3.0}, "g": {"CPU": 4.0, "GPU": 1.0}})
    assert [s.resources for s in slots] == [{"GPU": 1, "CPU": 4}, {"CPU": 3}]


def test_auto_shares_few_cpus_among_many_gpus() -> None:
    assert resolve_auto([node("g", CPU=2, GPU=4)])[3].resources == {"GPU": 1, "CPU": 0.5}
    assert resolve_auto([node("g", GPU=1)])[0].resources == {"GPU": 1}


def test_auto_with_nothing_free_is_an_error_that_says_so() -> None:
    with pytest.raises(ResourceError, match=r"no free CPU or GPU.*ray status"):
        resolve_auto([node("a", CPU=4)], {"a": {}})


def test_a_spec_no_node_can_satisfy_names_the_resource_and_what_there_is() -> None:
    with pytest.raises(ResourceError, match=r"workers\[1\].*GPU: 2 \(the most any one node has is 1\).*n1 .*'GPU': 1"):
        check_feasible(
            specs(WorkerSpec(), WorkerSpec(resources={"CPU": 1, "GPU": 2})), shapes_of([node("n1", CPU=4, GPU=1)])
        )


def test_labels_no_node_has_are_named() -> None:
    with pytest.raises(ResourceError, match=r"labels=\{'zone': 'b'\} match no node.*'zone': 'a'"):
        check_feasible(specs(WorkerSpec(labels={"zone": "b"})), shapes_of([node("n", CPU=1, labels={"zone": "a"})]))


def test_more_workers_than_the_nodes_hold_together() -> None:
    nodes = shapes_of([node("a", CPU=3), node("b", CPU=3)])
    check_feasible(specs(WorkerSpec(count=2, resources={"CPU": 2})), nodes)
    with pytest.raises(ResourceError, match="ask for 8 CPU together, the cluster has 6"):
        check_feasible(specs(WorkerSpec(count=4, resources={"CPU": 2})), nodes)
    with pytest.raises(ResourceError, match="do not fit on the cluster's nodes together"):
        check_feasible(specs(WorkerSpec(count=3, resources={"CPU": 2})), nodes)


def test_the_packing_check_finds_the_one_assignment_that_fits() -> None:
    nodes = shapes_of([node("a", CPU=7), node("b", CPU=5)])
    check_feasible(specs(*(WorkerSpec(resources={"CPU": n}) for n in (3, 2, 2, 4, 1))), nodes)


def test_what_an_autoscaler_may_start_counts() -> None:
    live = shapes_of([node("head", CPU=1)])
    two = NodeShape(name="gpu", resources={"CPU": 8, "GPU": 1}, max_count=2)
    check_feasible(specs(WorkerSpec(count=2, resources={"GPU": 1})), [*live, two])
    with pytest.raises(ResourceError, match="ask for 3 GPU together, the cluster has 2"):
        check_feasible(specs(WorkerSpec(count=3, resources={"GPU": 1})), [*live, two])
    anything = NodeShape(name="gpu", resources={"GPU": 1}, max_count=None)
    check_feasible(specs(WorkerSpec(count=30, resources={"GPU": 1})), [*live, anything])


def test_runs_at_once_are_those_whose_workers_all_have_a_place() -> None:
    two = specs(WorkerSpec(count=2, resources={"CPU": 2}))
    nodes = shapes_of([node("a", CPU=5), node("b", CPU=5), node("c", CPU=1)])
    assert num_fitting(two, nodes) == 2, "11 CPUs, of which no node's last one holds a worker"
    assert num_fitting(specs(WorkerSpec(resources={"CPU": 5})), nodes) == 2
    more = NodeShape(name="type small", resources={"CPU": 2.0}, max_count=2)
    assert num_fitting(two, [*nodes, more]) == 3
    anything = NodeShape(name="type any", resources={"CPU": 2.0}, max_count=None)
    assert num_fitting(two, [anything], limit=7) == 7


@pytest.mark.parametrize(
    ("value", "wanted", "holds"),
    [("a", "a", True), ("a", "!a", False), ("b", "in(a, b)", True), ("c", "!in(a,b)", True), (None, "a", False)],
)
def test_label_selectors_read_as_rays(value: str | None, wanted: str, holds: bool) -> None:
    assert matches({"k": value} if value else {}, {"k": wanted}) is holds


@pytest.mark.parametrize(
    ("given", "instead"),
    [
        ({"num_workers": 3}, r"WorkerSpec\(count=3"),
        ({"use_gpu": True}, "workers='auto'"),
        ({"resources_per_worker": {"CPU": 2}}, r"resources=\{'CPU': 2\}"),
        ({"label_selector": {"a": "b"}}, r"labels=\{'a': 'b'\}"),
        ({"worker": 3}, "Write workers=3"),
    ],
)
def test_rays_settings_for_equal_workers_are_refused_with_what_to_write(given: dict, instead: str) -> None:
    with pytest.raises(ConfigError, match=instead):
        HetScalingConfig("auto", **given)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"count": 0}, "count=0"),
        ({"resources": {}}, "resources={}"),
        ({"resources": {"CPU": -1}}, "-1"),
        ({"resources": {"cpu": 1}}, "'CPU'"),
        ({"labels": {"a": 1}}, "labels"),
    ],
)
def test_a_malformed_worker_spec_is_named(given: dict, named: str) -> None:
    with pytest.raises(ConfigError, match=named.replace("{", r"\{")):
        WorkerSpec(**given)


@pytest.mark.parametrize("workers", [3, [], "all", [{"CPU": 1}]])
def test_workers_that_are_no_list_of_specs_are_refused(workers: object) -> None:
    with pytest.raises(ConfigError, match="list of WorkerSpec"):
        HetScalingConfig(workers)  # type: ignore[arg-type]


def test_ray_is_told_the_sum_and_the_common_part() -> None:
    scaling = HetScalingConfig([WorkerSpec(resources={"GPU": 1, "CPU": 4}), WorkerSpec(count=2, labels={"k": "v"})])
    assert scaling.num_workers == 3
    assert scaling.total_resources == {"GPU": 1, "CPU": 6}
    assert scaling._resources_per_worker_not_none == {"CPU": 1}
    assert scaling._label_selector_per_worker(3) == [{}, {"k": "v"}, {"k": "v"}]


def test_the_autoscaler_is_asked_for_the_real_bundles() -> None:
    from raytrain_het.ray_train.autoscaling import HetScalingPolicy

    scaling = HetScalingConfig().resolved(resolve_auto([node("g", CPU=4, GPU=1), node("c", CPU=2)]))
    resources, labels = HetScalingPolicy(scaling, autoscaler=True).resource_request()
    assert resources == [{"GPU": 1, "CPU": 4}, {"CPU": 2}]
    assert labels is None


def test_another_ray_is_refused_with_the_command_to_type() -> None:
    check_ray("2.60.3")
    with pytest.raises(ConfigError, match=r"ray==2.61.0 is installed, .*>=2.60,<2.61.*pip install"):
        check_ray("2.61.0")


def test_counts_and_resources_may_be_numpys() -> None:
    config = HetScalingConfig(workers=[WorkerSpec(count=np.int64(2), resources={"CPU": np.float32(1)})])
    assert config.slots is not None
    assert [type(slot.resources["CPU"]) for slot in config.slots] == [float, float]
    assert type(config.num_workers) is int
