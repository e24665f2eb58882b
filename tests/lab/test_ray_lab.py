"""A cluster of unequal nodes on this machine: what it is, and that nothing of it is left."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import ray

import raytrain_het as het
from raytrain_het.testing import cluster, networks
from raytrain_het.testing.cgroups import CpuQuota, LabError, leftovers
from raytrain_het.testing.cluster import Node, RayLab

pytest_plugins = ["raytrain_het.testing.plugin"]


def buildable() -> str:
    try:
        cluster.check()
    except LabError as error:
        return str(error)
    return ""


needs_root = pytest.mark.skipif(bool(buildable()), reason=buildable())


def make_train_fn() -> Any:
    # Made in here, so that it travels by value: nodes need not find this file.
    def train_fn(config: dict[str, Any]) -> None:
        import torch
        from torch.nn import functional as F
        from torch.utils.data import DataLoader, TensorDataset

        torch.manual_seed(0)
        x = torch.randn(4096, 256)
        data = TensorDataset(x, x.sum(dim=1, keepdim=True).tanh())
        net = torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.ReLU(), torch.nn.Linear(512, 1))
        model = het.prepare_model(net)
        optimizer = het.prepare_optimizer(torch.optim.SGD(model.parameters(), lr=0.02))
        loader = het.prepare_data_loader(DataLoader(data, shuffle=True), global_batch_size=1024)
        for _ in loader.epochs(config["epochs"]):
            for a, b in loader:
                loss = F.mse_loss(model(a), b)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            het.report({"loss": loss.item()})

    return train_fn


def runs(pid: int) -> bool:
    """Whether it is there, and not only its name, until init takes note of its end."""
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())
    except OSError:
        return False


def network() -> str:
    return "".join(
        subprocess.run(command.split(), capture_output=True, text=True, check=True).stdout
        for command in ("ip netns list", "ip -o link show")
    )


NODES = [Node(cores=0.4, rate_mbit=400), Node(cores=0.4, rate_mbit=400), Node(cores=0.7, rate_mbit=10)]
"""The fastest node, which would own the most by speed, is the one behind the slow link."""


@needs_root
def test_shares_follow_cores_and_owners_follow_links_and_nothing_is_left_behind(ray_lab: Any, tmp_path: Path) -> None:
    lab = ray_lab(NODES)
    trainer = het.HetTrainer(
        make_train_fn(),
        train_loop_config={"epochs": 5},
        scaling_config=het.HetScalingConfig(workers="auto"),
        run_config=ray.train.RunConfig(name="lab", storage_path=str(tmp_path)),
    )
    result = trainer.fit()
    assert trainer.summary["steps"] == 20
    assert result.metrics["loss"] < 0.9
    events = [json.loads(line) for line in (tmp_path / "lab" / "events.jsonl").read_text().splitlines()]
    slots = {w["node_ip"]: str(w["world_rank"]) for w in trainer.summary["workers"]}
    in_order = [slots[ip] for ip in lab.node_ips]
    check_that_the_faster_node_gets_the_larger_share(events, *in_order)
    check_that_the_worker_behind_the_slow_link_owns_less(events, *in_order)
    check_that_nothing_is_left_behind(lab)


def check_that_the_faster_node_gets_the_larger_share(
    events: list[dict[str, Any]], first: str, second: str, fast: str
) -> None:
    """Workers see their quotas: shares are unequal from the first step on. Blind, they would be equal.

    By how much is up to what else the machine does in the second that the benchmark takes.
    """
    tables = [e["shares"] for e in events if e["kind"] == "table" and len(e["shares"]) == 3]
    assert all(sum(table.values()) == 1024 for table in tables)
    for slow in (first, second):
        assert tables[0][fast] > 1.15 * tables[0][slow]
        # One table follows what the host does in its second, too.
        assert sum(table[fast] for table in tables) > 1.2 * sum(table[slow] for table in tables)


def check_that_the_worker_behind_the_slow_link_owns_less(
    events: list[dict[str, Any]], fast: str, second: str, slow: str
) -> None:
    tables = [e for e in events if e["kind"] == "table"]
    table = next((e for e in tables if e["reason"].startswith("owner shards by links")), None)
    assert table is not None, tables
    links_s = table["links_s"]
    # 10 Mbit/s are 1.25 MB/s, for 0.53 MB of gradients: 0.42 s.
    assert 0.3 < links_s[slow] < 0.6
    assert max(links_s[fast], links_s[second]) < links_s[slow] / 4
    formed = next(e for e in events if e["kind"] == "formed" and e["table"] == table["version"])
    assert formed["slots"] == [0, 1, 2]
    assert formed["owners"][int(slow)] < 0.15


def check_that_nothing_is_left_behind(lab: RayLab) -> None:
    """After one of its nodes was killed, and the lab closed."""
    last = len(lab.nodes) - 1
    groups, processes = [g.path for g in lab._groups], [pid for node in range(last + 1) for pid in lab.pids(node)]
    lab.kill_node(last)
    assert lab.pids(last) == []
    lab.close()
    assert not ray.is_initialized()
    assert not any(group.exists() for group in groups)
    assert not any(runs(pid) for pid in processes)
    assert lab._name not in network()
    assert not lab._folder.exists()


@needs_root
def test_links_have_their_rate_and_nodes_an_address_each() -> None:
    shaped = networks.Network(f"{networks.PREFIX}{os.getpid()}q", [100, 100])
    try:
        # 4 MB through 100 Mbit/s, 12.5 MB/s: never in less time, and nothing like what memory would take.
        receive = "import socket; s = socket.create_server(('', 5000)); print(1, flush=True); c = s.accept()[0]\n"
        receive += "while c.recv(1 << 16): pass\nc.send(b'.')"
        send = f"import socket, time; s = socket.create_connection(('{shaped.ips[1]}', 5000)); t = time.monotonic()\n"
        send += "s.sendall(bytes(4_000_000)); s.shutdown(socket.SHUT_WR); s.recv(1); print(time.monotonic() - t)"
        inside = [["ip", "netns", "exec", namespace, "python3", "-c"] for namespace in shaped.namespaces]
        receiver = subprocess.Popen([*inside[1], receive], stdout=subprocess.PIPE, text=True)
        receiver.stdout.readline()
        taken_s = float(subprocess.run([*inside[0], send], check=True, capture_output=True, text=True).stdout)
        receiver.communicate()
    finally:
        shaped.close()
    # At a tenth of the rate, as with a bucket that is too small for a packet, it would take 3.2 s.
    assert 0.9 * 4 / 12.5 < taken_s < 2.5
    assert shaped.name not in network()


@needs_root
def test_leftovers_of_a_killed_lab_are_removed() -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    name = f"rhl{gone.pid}a"
    networks.Network(name, [None])
    group = CpuQuota(0.5, kind="node")
    path = group.path.rename(group.path.with_name(re.sub(r"_\d+_", f"_{gone.pid}_", group.path.name)))
    process = subprocess.Popen(["sleep", "600"])
    (path / "cgroup.procs").write_text(str(process.pid))
    assert leftovers("node") == [path]
    cluster.remove_leftovers()
    assert process.wait(10) == -9
    assert name not in network()
    deadline = time.monotonic() + 10
    while leftovers("node") and time.monotonic() < deadline:
        CpuQuota(0.5).close()  # Groups go when the next one is made, once the kernel has seen that they are empty.
    assert leftovers("node") == []


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr("shutil.which", lambda tool: None)
    with (
        pytest.raises(LabError, match=r"missing: root, ip, tc, nsenter \(of iproute2 and util-linux\).*plain=True"),
        RayLab([Node()]),
    ):
        pass


def test_without_ip_the_lab_says_so_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(LabError, match="missing: .*ip, tc, nsenter"), RayLab([Node()]):
        pass
    with pytest.raises(LabError, match="`ip netns list` cannot be run"):
        networks.run("ip netns list")


def test_a_lab_that_breaks_while_it_is_built_fails_the_test_and_a_lack_skips_it(
    ray_lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise LabError("node0 ended at once")

    monkeypatch.setattr("raytrain_het.testing.plugin.check", lambda: None)
    monkeypatch.setattr(RayLab, "__enter__", broken)
    with pytest.raises(LabError, match="ended at once"):
        ray_lab([Node()])
    monkeypatch.setattr("raytrain_het.testing.plugin.check", broken)
    with pytest.raises(pytest.skip.Exception, match="ended at once"):
        ray_lab([Node()])


def test_a_node_that_ends_at_once_is_not_said_to_be_slow(tmp_path: Path) -> None:
    lab = RayLab([Node()])
    lab._folder = tmp_path
    (tmp_path / "head.log").write_text("no such option")
    lab._processes.append(subprocess.Popen(["false"]))
    lab._processes[0].wait()
    with pytest.raises(LabError, match="head ended at once, with status 1: no such option"):
        lab._await_start(0)


def test_a_network_that_there_is_only_a_route_to_is_not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    said = {
        "ip -o -4 addr": "2: eth0    inet 10.213.0.7/24 brd 10.213.0.255",
        "ip -4 route": "10.213.1.0/24 dev eth1\n",
    }
    monkeypatch.setattr(networks, "run", said.__getitem__)
    assert networks.free_network() == "10.213.2"


def test_a_plain_lab_says_that_its_nodes_are_not_slow() -> None:
    lab = RayLab([Node(cores=0.5)], plain=True)
    try:
        with pytest.warns(UserWarning, match="neither throttled"):
            lab.__enter__()
        ray.init(address=lab.address, log_to_driver=False)
        assert sum(node["Alive"] for node in ray.nodes()) == 2
    finally:
        lab.close()
    assert not ray.is_initialized()


@pytest.mark.parametrize("node", [Node(rate_mbit=0), Node(rate_mbit=float("nan"))])
def test_a_rate_that_is_none_is_refused(node: Node) -> None:
    with pytest.raises(ValueError, match=r"nodes\[0\].rate_mbit=.*allowed is 0.1 to 100000"):
        RayLab([node])
