"""A lab of Ray nodes on this one machine: nodes with slow CPUs and slow links (Linux, as root).

A node is a ``raylet`` with all its processes, in

- a group of processes under a CPU quota (:mod:`raytrain_het.testing.cgroups`), which its workers inherit;
- a network namespace, with an address of its own and a link to a common bridge, whose rate ``tc ... tbf`` limits;
- a temporary folder of its own, since nodes would otherwise use the same sockets.

The head node has no CPUs, no quota and the bridge's address. A driver that connects is on that node.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from raytrain_het.testing import networks
from raytrain_het.testing.cgroups import CpuQuota, LabError, available, leftovers, members

_GROUP = "node"
_NO_LIMIT = 1000.0
"""Cores: as if there were no quota."""
_START_S = 120.0
_OBJECT_STORE_BYTES = 100 * 2**20
_letters = itertools.cycle("abcdefghijklmnopqrstuvwxyz")


@dataclass(frozen=True, kw_only=True)
class Node:
    """A machine of the lab."""

    cores: float | None = None
    """How much of a core all its processes get together, once the node has started; None is no quota."""

    rate_mbit: float | None = None
    """Its link's rate, each way; None is as fast as memory is."""

    num_cpus: float = 1
    """The CPUs that Ray counts."""

    resources: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Custom resources, by Ray's names."""


class RayLab:
    """Ray nodes of unequal speed, for the length of the block.

    Args:
        nodes: The machines, without the head.
        plain: Whether to do without root: nodes of ``ray.cluster_utils.Cluster``, all at full speed and with one
            address. A warning says so.

    Attributes:
        address: The address for ``ray.init(address=...)`` on this machine.
        node_ips: By node, its address.

    Raises:
        LabError: The lab cannot be built here; the message says what is missing.

    Example:
        with RayLab([Node(cores=0.8), Node(cores=0.4, rate_mbit=100)]) as lab:
            ray.init(address=lab.address)
    """

    def __init__(self, nodes: Sequence[Node], *, plain: bool = False) -> None:
        if not nodes or len(nodes) > 200:
            raise ValueError(f"nodes has {len(nodes)} entries: allowed are 1 to 200. Write RayLab([Node(cores=0.5)]).")
        for i, node in enumerate(nodes):
            networks.check_rate(f"nodes[{i}].rate_mbit", node.rate_mbit)
        self.nodes, self.plain = tuple(nodes), plain
        self.address = ""
        self.node_ips: list[str] = []
        self._name = f"{networks.PREFIX}{os.getpid()}{next(_letters)}"
        self._folder = _parent_folder() / self._name
        self._groups: list[CpuQuota] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        self._network: networks.Network | None = None
        self._cluster: Any = None
        self._plain_nodes: list[Any] = []

    def __enter__(self) -> RayLab:
        if not self.plain:
            check()  # Outside of the `try`: without these commands `close` would fail too.
        try:
            if self.plain:
                self._start_plain()
            else:
                remove_leftovers()
                self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def kill_node(self, index: int) -> None:
        """Kill all processes of a node at once."""
        if self.plain:
            self._cluster.remove_node(self._plain_nodes[index], allow_graceful=False)
        else:
            _kill(self._groups[index + 1].path)
            self._processes[index + 1].wait()

    def pids(self, index: int) -> list[int]:
        """The process ids of a node; a plain lab does not know them."""
        return members(self._groups[index + 1].path)

    def close(self) -> None:
        """End the lab, and remove everything of it. A second call does nothing. This process is disconnected from
        it."""
        self._disconnect()
        if self._cluster is not None:
            self._cluster.shutdown()
            self._cluster = None
        for group in reversed(self._groups):
            _kill(group.path)
            group.close()
        for process in self._processes:
            process.wait()
        self._groups, self._processes = [], []
        if self._network is not None:
            self._network.close()
            self._network = None
        shutil.rmtree(self._folder, ignore_errors=True)

    def _disconnect(self) -> None:
        """Disconnect this process: Ray ends a process whose node dies."""
        if self.address:
            import ray

            if ray.is_initialized() and ray.get_runtime_context().gcs_address == self.address:
                ray.shutdown()

    def _start(self) -> None:
        self._network = networks.Network(self._name, [node.rate_mbit for node in self.nodes])
        head_ip, self.node_ips = self._network.host, self._network.ips
        port, *others = _free_ports(4)
        self.address = f"{head_ip}:{port}"
        self._launch(
            "head",
            [],
            [
                "--head",
                f"--port={port}",
                f"--node-ip-address={head_ip}",
                "--num-cpus=0",
                "--include-dashboard=false",
                f"--ray-client-server-port={others[0]}",
                f"--dashboard-agent-listen-port={others[1]}",
                f"--dashboard-port={others[2]}",
            ],
        )
        self._await_start(0)
        for i, (node, ip, namespace) in enumerate(
            zip(self.nodes, self.node_ips, self._network.namespaces, strict=True)
        ):
            self._launch(
                f"node {i}",
                ["nsenter", f"--net=/run/netns/{namespace}"],
                [
                    f"--address={self.address}",
                    f"--node-ip-address={ip}",
                    f"--num-cpus={node.num_cpus:g}",
                    f"--resources={json.dumps(dict(node.resources))}",
                ],
            )
        for i, node in enumerate(self.nodes, start=1):
            self._await_start(i)
            if node.cores is not None:
                self._groups[i].set(node.cores)

    def _launch(self, what: str, prefix: list[str], arguments: list[str]) -> None:
        """Run ``ray start`` in a control group of its own."""
        folder = self._folder / what.replace(" ", "")
        folder.mkdir(parents=True)
        self._groups.append(CpuQuota(_NO_LIMIT, kind=_GROUP))
        group = self._groups[-1].path / "cgroup.procs"
        # Ray's command as a module, since a script named `ray` need not be on the path.
        ray = [sys.executable, "-c", "from ray.scripts.scripts import main; main()", "start", "--block"]
        common = [
            f"--temp-dir={folder}",
            "--disable-usage-stats",
            f"--object-store-memory={_OBJECT_STORE_BYTES}",
            "--min-worker-port=0",
            "--max-worker-port=0",
        ]
        # Enter the group first, then the namespace. `ip netns exec` would not do: it mounts another /sys, without
        # control groups, and a worker could not read its own quota.
        enter = ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(group)]
        # A Ray driver with a given address uses no token by default. The nodes must not use one either.
        environment = {"RAY_AUTH_MODE": "disabled", **os.environ, **_ENVIRONMENT}
        with (self._folder / f"{folder.name}.log").open("wb") as log:
            self._processes.append(
                subprocess.Popen(
                    [*enter, *prefix, *ray, *common, *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    env=environment,
                )
            )

    def _await_start(self, index: int) -> None:
        """Wait until Ray reports that the node has started, and that the head knows it."""
        what = "head" if index == 0 else f"node{index - 1}"
        log, deadline = self._folder / f"{what}.log", time.monotonic() + _START_S
        while b"Ray runtime started" not in (said := log.read_bytes()):
            status = self._processes[index].poll()
            if status is not None or time.monotonic() > deadline:
                how = f"did not start in {_START_S:g} s" if status is None else f"ended at once, with status {status}"
                raise LabError(f"{what} {how}: {said.decode(errors='replace')[-2000:]}")
            time.sleep(0.05)

    def _start_plain(self) -> None:
        from ray.cluster_utils import Cluster

        warnings.warn("a plain lab: its nodes are neither throttled nor behind links of their own", stacklevel=3)
        self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
        self._plain_nodes = [
            self._cluster.add_node(num_cpus=node.num_cpus, resources=dict(node.resources)) for node in self.nodes
        ]
        self.address = self._cluster.address
        self.node_ips = [node.node_ip_address for node in self._plain_nodes]


_ENVIRONMENT = {
    # Ray notices a lost node within seconds.
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_failure_threshold": "5",
    # On a busy machine a node takes longer to start.
    "RAY_raylet_start_wait_time_s": f"{_START_S:g}",
}


def check() -> None:
    """Check that a lab can be built here.

    Raises:
        LabError: Something is missing.
    """
    tools = [tool for tool in networks.TOOLS if shutil.which(tool) is None]
    missing = [] if sys.platform == "linux" else ["Linux"]
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        missing.append("root")
    if tools:
        packages = dict.fromkeys(networks.TOOLS[tool] for tool in tools)
        missing.append(f"{', '.join(tools)} (of {' and '.join(packages)})")
    if not available():
        missing.append("a CPU controller for control groups that may be written to")
    if missing:
        raise LabError(
            f"no lab of Ray nodes here, missing: {', '.join(missing)}. RayLab(..., plain=True) has nodes at full speed"
        )


def remove_leftovers() -> None:
    """Remove what killed labs have left: processes, namespaces, links, folders."""
    for group in leftovers(_GROUP):
        _kill(group)
    networks.remove_leftovers()
    for path in _parent_folder().glob(f"{networks.PREFIX}[0-9]*[a-z]"):
        if not networks.maker_lives(path.name):
            shutil.rmtree(path, ignore_errors=True)


def _parent_folder() -> Path:
    """The parent of labs' folders. Its path is short, since Ray has unix sockets below it, at most 107 bytes long."""
    return Path(os.environ.get("RAY_TMPDIR") or "/tmp")


def _kill(group: Path) -> None:
    """Kill all processes of a group, also those that are being started."""
    deadline = time.monotonic() + 10
    while (pids := members(group)) and time.monotonic() < deadline:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind(("", 0))
        return [s.getsockname()[1] for s in sockets]
