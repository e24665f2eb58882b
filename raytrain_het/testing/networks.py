"""Network namespaces, each with a link of a limited rate to a common bridge (Linux, as root)."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from raytrain_het.testing.cgroups import LabError

TOOLS = {"ip": "iproute2", "tc": "iproute2", "nsenter": "util-linux"}
"""Commands that are run, and the packages that have them."""
PREFIX = "rhl"
_NETWORK = re.compile(r"\b(\d+\.\d+\.\d+)\.\d+\b")
_CLONE_NEWNET = 0x40000000


class Network:
    """A bridge, and namespaces on it.

    Args:
        name: The bridge's name: ``PREFIX``, the maker's process id and a letter. Leftovers are found by it.
        rates_mbit: By namespace, its link's rate each way; None is as fast as memory is.

    Attributes:
        host: The bridge's address, by which processes in the namespaces reach this one.
        ips: By namespace, its address.
        namespaces: Their names.

    Raises:
        LabError: It cannot be made here.
    """

    def __init__(self, name: str, rates_mbit: Sequence[float | None]) -> None:
        for i, rate in enumerate(rates_mbit):
            check_rate(f"rates_mbit[{i}]", rate)
        self.name = name
        network = free_network()
        self.host = f"{network}.1"
        self.ips = [f"{network}.{i + 2}" for i in range(len(rates_mbit))]
        self.namespaces = [f"{name}{i}" for i in range(len(rates_mbit))]
        try:
            run(f"ip link add {name} type bridge")
            run(f"ip addr add {self.host}/24 dev {name}")
            run(f"ip link set {name} up")
            for namespace, ip, rate in zip(self.namespaces, self.ips, rates_mbit, strict=True):
                _plug_in(name, namespace, ip, rate)
        except BaseException:
            self.close()
            raise

    def unplug(self, index: int) -> None:
        """Pull a namespace's cable: nothing goes in or out, and nobody is told."""
        run(f"ip link set {self.namespaces[index]} down")

    def plug_in(self, index: int) -> None:
        """Plug it in again."""
        run(f"ip link set {self.namespaces[index]} up")

    def hide_host(self) -> None:
        """This machine's own processes are not reached any more, as if their machine's cable were pulled."""
        run(f"ip addr del {self.host}/24 dev {self.name}")

    def show_host(self) -> None:
        """They are reached again."""
        run(f"ip addr add {self.host}/24 dev {self.name}")

    def mute(self, index: int) -> None:
        """What a namespace sends goes nowhere; it still receives."""
        for ip in self._others(index):
            run(f"ip -n {self.namespaces[index]} neigh replace {ip} lladdr 02:00:00:00:00:01 dev eth0 nud permanent")

    def unmute(self, index: int) -> None:
        """What it sends arrives again."""
        for ip in self._others(index):
            run(f"ip -n {self.namespaces[index]} neigh del {ip} dev eth0")

    def _others(self, index: int) -> list[str]:
        return [self.host, *(ip for k, ip in enumerate(self.ips) if k != index)]

    def close(self) -> None:
        """Remove the bridge and the namespaces."""
        remove(self.name)


def check_rate(name: str, rate_mbit: float | None) -> None:
    """Refuse a rate that a link cannot have.

    Raises:
        ValueError: It is out of range.
    """
    if rate_mbit is not None and not 0.1 <= rate_mbit <= 100_000:
        raise ValueError(f"{name}={rate_mbit!r}: allowed is 0.1 to 100000, or None.")


def enter(namespace: str) -> None:
    """Move the calling thread, and all threads that it starts from now on, into a namespace."""
    with open(f"/run/netns/{namespace}") as file:
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), _CLONE_NEWNET) != 0:
            raise LabError(f"namespace {namespace} cannot be entered: {os.strerror(ctypes.get_errno())}")


def sent() -> tuple[int, int]:
    """Bytes and packets that the calling thread's namespace has sent over its link."""
    (line,) = re.findall(r"^\s*eth0:(.*)$", Path("/proc/thread-self/net/dev").read_text(), flags=re.M)
    num_bytes, num_packets = line.split()[8:10]
    return int(num_bytes), int(num_packets)


def _plug_in(bridge: str, name: str, ip: str, rate_mbit: float | None) -> None:
    run(f"ip netns add {name}")
    run(f"ip link add {name} type veth peer name eth0 netns {name}")
    run(f"ip link set {name} master {bridge} up")
    run(f"ip -n {name} addr add {ip}/24 dev eth0")
    run(f"ip -n {name} link set eth0 up")
    run(f"ip -n {name} link set lo up")
    if rate_mbit is not None:
        # A burst is what the rate sends in 10 ms, and at least a packet of 64 KiB.
        burst = max(round(rate_mbit * 1e6 / 8 * 0.01), 70_000)
        rate = f"root tbf rate {rate_mbit:g}mbit burst {burst} latency 50ms"
        run(f"tc qdisc add dev {name} {rate}")
        run(f"tc -n {name} qdisc add dev eth0 {rate}")


def remove_leftovers() -> None:
    """Remove the networks of processes that have ended."""
    for name in set(re.findall(rf"\b{PREFIX}\d+[a-z]", f"{run('ip -o link show')} {run('ip netns list')}")):
        if not maker_lives(name):
            remove(name)


def maker_lives(name: str) -> bool:
    """Whether the process still exists whose id is in a network's name."""
    return Path("/proc", name.removeprefix(PREFIX)[:-1]).exists()


def remove(name: str) -> None:
    """Remove a network's namespaces, links and bridge."""
    for namespace in re.findall(rf"^{name}\d+\b", run("ip netns list"), flags=re.M):
        run(f"ip netns del {namespace}")
    for link in re.findall(rf"^\d+: ({name}\d*)[@:]", run("ip -o link show"), flags=re.M):
        with contextlib.suppress(LabError):  # A link may be gone with its namespace.
            run(f"ip link del {link}")


def free_network() -> str:
    """The first three numbers of a /24 that this machine does not use."""
    used = {match for text in (run("ip -o -4 addr"), run("ip -4 route")) for match in re.findall(_NETWORK, text)}
    candidates = (f"10.{213 + i // 256}.{i % 256}" for i in range(42 * 256))
    return next(network for network in candidates if network not in used)


def run(command: str) -> str:
    """Run a command; returns its output.

    Raises:
        LabError: There is no such command, or it failed.
    """
    try:
        done = subprocess.run(command.split(), capture_output=True, text=True)
    except OSError as error:
        raise LabError(f"no lab here: `{command}` cannot be run ({error.strerror})") from None
    if done.returncode != 0:
        raise LabError(f"no lab here: `{command}` says {done.stderr.strip()!r}")
    return done.stdout
