"""What the membership actor costs by the number of members: CPU time a second, and forming a generation.

The hub is the real one, in a process of its own. The members are real connections, from one other process: each greets,
answers pings, voids and wants, and with steps of 0.15 s says what a worker says (timings with what it saw of its paths,
and stats), as often as a worker of such a fleet does. Their work is not done: no gradient is sent.

With ``--real`` the members are real workers, which train with steps of that time: to see that the others cost the hub
what these do. CPU time is that of the hub's thread then.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import selectors
import socket
import statistics
import tempfile
import threading
import time
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import Any

from raytrain_het.balance.paths import watched
from raytrain_het.balance.profile import Measurement, Profile
from raytrain_het.config import HetConfig
from raytrain_het.membership import handshake
from raytrain_het.membership.pace import pace_s
from raytrain_het.membership.run_context import RunContext
from raytrain_het.membership.server import Hub
from raytrain_het.testing.lab_worker import WorkerFiles
from raytrain_het.testing.processes import LabSlots, ProcessLab
from raytrain_het.testing.regression import Regression, traces

STEP_S = 0.15
WARM_STEPS = 40
LOOK_S = 0.5
ZERO = {"epoch": 0, "offset": 0, "step": 0}


def host_a_hub(num_slots: int, pipe: Pipe) -> None:
    """The hub's process: says its address, and what CPU time it has used when asked."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (8192, 8192))
    hub = Hub(HetConfig(), RunContext(run_id="cost", num_slots=num_slots, host="127.0.0.1"))
    pipe.send(hub.address())
    while pipe.recv() != "end":
        status = hub.status()
        pipe.send((time.process_time(), status["generation"], [e["kind"] for e in hub.events(0)]))
    hub.shutdown()


class Members:
    """All members of a run, in one thread.

    Args:
        address: the hub's.
        size: how many.
    """

    def __init__(self, address: dict[str, Any], size: int) -> None:
        self.size, self.number, self.num_formed, self.num_met = size, 1, 0, 0
        self.incarnation = time.time_ns()
        self.selector = selectors.DefaultSelector()
        self.socks: list[socket.socket] = []
        self.rest = [b""] * size
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        for slot in range(size):
            sock = socket.create_connection(("127.0.0.1", address["port"]), timeout=30)
            handshake.call(sock, address["token"])
            sock.setblocking(True)
            self.socks.append(sock)
            self.selector.register(sock, selectors.EVENT_READ, slot)
            self.say(slot, self.hello(slot))
            self.read(0)
        self.untold: dict[int, list[list[float]]] = {slot: [] for slot in range(size)}
        self.payload = {slot: self.paths(slot) for slot in range(size)}

    def hello(self, slot: int) -> dict[str, Any]:
        """Who a member is, and what its hardware can do."""
        flops = {"fp32": Measurement(1e10, 0.0, 5)}
        profile = Profile(hardware="x", device="cpu", cores=1, num_threads=1, flops=flops).to_json()
        member = {"uid": f"{slot}-a", "slot": slot, "host": f"10.0.{slot // 250}.{slot % 250}", "device": "cpu"}
        member["state_port"] = self.listener.getsockname()[1]
        known = {"profile": profile, "global_batch_size": 16 * self.size}
        rest = {"healed": False, "fresh": False, "record": None, "answered": 0, "want": 0, "fingerprint": ""}
        return {"type": "hello", "member": member, "cursor": ZERO, "known": known, **rest} | {
            "checkpoint": None,
            "checkpoint_cursor": None,
        }

    def paths(self, slot: int) -> dict[str, Any]:
        """What it has seen of its paths."""
        to = [[peer, 3.0 / self.size, 0.01] for peer in sorted(watched(slot, self.size))]
        return {"to": to, "gradient_bytes": 4_000_000}

    def say(self, slot: int, message: dict[str, Any]) -> None:
        """Send a line."""
        self.socks[slot].sendall(json.dumps(message, separators=(",", ":")).encode() + b"\n")

    def read(self, timeout_s: float) -> None:
        """Answer what the hub asks."""
        for key, _ in self.selector.select(timeout_s):
            slot = key.data
            data = self.rest[slot] + self.socks[slot].recv(1 << 20)
            *lines, self.rest[slot] = data.split(b"\n")
            for line in lines:
                self.answer(slot, line)

    def answer(self, slot: int, line: bytes) -> None:
        """What a member answers to a line; of records only the kind and the number are looked at."""
        kind = line[9 : line.index(b'"', 9)]
        if kind == b"ping":
            self.say(slot, {"type": "pong", "position": 1})
        elif kind == b"record":
            self.num_formed += 1
            # Its address, for the others: what it takes to make a process group.
            group = f"{self.incarnation}.{self.number}"
            self.say(slot, {"type": "meet", "group": group, "key": str(slot), "value": "MTAuMC4wLjEgMzQ1Njc="})
        elif kind.startswith(b"meet"):
            self.num_met += line.count(b'"key"')
        elif kind in (b"void", b"want"):
            self.number = json.loads(line)["number"]
            answer = {"type": "answer", "number": self.number, "cursor": ZERO, "healed": True, "fresh": False}
            self.say(slot, answer | {"batch": None})
        elif kind in (b"fail", b"evicted", b"end"):
            raise SystemExit(f"member {slot} was told {line[:300]!r}")

    def wait_for_records(self, count: int, limit_s: float = 120.0) -> float:
        """Seconds until so many records more have come, and each member knows all others' addresses."""
        began, wanted = time.perf_counter(), self.num_formed + count
        self.num_met = 0
        while self.num_formed < wanted or self.num_met < self.size * (self.size - 1):
            self.read(0.05)
            if time.perf_counter() - began > limit_s:
                raise SystemExit(f"{self.num_formed} of {wanted} records have come in {limit_s:g} s")
        return time.perf_counter() - began

    def train(self, seconds: float) -> int:
        """Say what workers say for so long; returns the number of steps done."""
        began = time.perf_counter()
        steps = 0
        while time.perf_counter() - began < seconds:
            for slot in range(self.size):
                own_s = 0.1 * (1 + 0.001 * ((steps * 31 + slot * 17) % 10))
                self.untold[slot].append([16, own_s, STEP_S])
                # Not all in the same step, as workers do not begin at the same time.
                if (steps + slot) % max(1, round(pace_s(0.05, self.size) / STEP_S)) == 0:
                    timing = {"type": "timing", "global_batch_size": 16 * self.size, "steps": self.untold[slot]}
                    self.say(slot, timing | {"paths": self.payload[slot]})
                    self.untold[slot] = []
                if (steps + slot) % max(1, round(pace_s(LOOK_S, self.size) / STEP_S)) == 0:
                    self.say(slot, {"type": "stats", "step": steps, "samples": 16 * steps, "step_s": STEP_S})
                if slot % 16 == 0:
                    self.read(0)
            steps += 1
            while time.perf_counter() - began < steps * STEP_S:
                self.read(max(0.0, min(0.02, began + steps * STEP_S - time.perf_counter())))
        return steps


def measure(size: int, seconds: float) -> dict[str, Any]:
    """What one hub with so many members costs."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=host_a_hub, args=(size, there))
    process.start()
    address = here.recv()

    def cpu() -> tuple[float, int, list[str]]:
        here.send("cpu")
        answer: tuple[float, int, list[str]] = here.recv()
        return answer

    began = time.perf_counter()
    members = Members(address, size)
    members.wait_for_records(max(0, size - members.num_formed))
    started_s = time.perf_counter() - began
    members.train(2.0)
    before, wall = cpu()[0], time.perf_counter()
    members.train(seconds)
    wall = time.perf_counter() - wall
    used = cpu()[0] - before
    forming = []
    for _ in range(3):
        at = cpu()[0]
        members.say(0, {"type": "failed", "generation": cpu()[1], "reason": "for the measurement"})
        wait_s = members.wait_for_records(size)
        forming.append((wait_s, cpu()[0] - at))
    kinds = cpu()[2]
    here.send("end")
    process.join()
    return {
        "members": size,
        "cpu_part": used / wall,
        "behind": wall / seconds - 1,
        "start_s": started_s,
        "forming_s": statistics.median(w for w, _ in forming),
        "forming_cpu_s": statistics.median(c for _, c in forming),
        "lost": sum(kinds.count(k) for k in ("lost", "evicted", "suspended")),
        "tables": kinds.count("table"),
    }


class Window:
    """Once a lab's workers train: what the hub's thread uses in some seconds, in which the lab asks it nothing."""

    def __init__(self, lab: ProcessLab, seconds: float) -> None:
        self._lab, self._seconds = lab, seconds
        self.cpu_part: float | None = None

    def __call__(self) -> None:
        """To be called at every poll."""
        if self.cpu_part is not None or max((step for step, *_ in traces(self._lab.directory)), default=0) < WARM_STEPS:
            return
        before, began = self._used_s(), time.perf_counter()
        time.sleep(self._seconds)
        self.cpu_part = (self._used_s() - before) / (time.perf_counter() - began)

    def _used_s(self) -> float:
        (hub,) = [thread for thread in threading.enumerate() if thread.name == "het-hub"]
        return int(Path(f"/proc/self/task/{hub.native_id}/schedstat").read_text().split()[0]) / 1e9


def measure_real(size: int, seconds: float) -> dict[str, Any]:
    """What the hub costs with so many real workers."""
    steps = WARM_STEPS + int(2 * seconds / STEP_S) + 10
    task = Regression(num_samples=16 * size * steps, global_batch_size=16 * size, epochs=1, pace_s=STEP_S, report=False)
    with tempfile.TemporaryDirectory() as directory:
        lab = ProcessLab(task, directory, LabSlots(num_slots=size), files=WorkerFiles(ledger=False))
        window = Window(lab, seconds)
        lab.run(300 + 4 * seconds, on_poll=window)
        kinds = [event["kind"] for event in lab.events]
    return {
        "members": size,
        "cpu_part": window.cpu_part,
        "lost": sum(kinds.count(k) for k in ("lost", "evicted", "suspended")),
        "tables": kinds.count("table"),
    }


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--members", type=int, nargs="+", default=[16, 64, 100, 256, 1000])
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--real", action="store_true", help="with real workers, and CPU time only")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    args = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_NOFILE, (8192, 8192))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    results = [(measure_real if args.real else measure)(size, args.seconds) for size in args.members]
    if args.json:
        print(json.dumps({"rows": results}))
        return
    if args.real:
        for r in results:
            print(f"{r['members']:>8} {100 * r['cpu_part']:>7.2f} % of a core, {r['lost']} lost")
        return
    print(f"{'members':>8} {'CPU %':>7} {'start s':>8} {'forming s':>10} {'its CPU s':>10} {'tables':>7} {'lost':>5}")
    for r in results:
        print(
            f"{r['members']:>8} {100 * r['cpu_part']:>7.1f} {r['start_s']:>8.2f} {r['forming_s']:>10.3f} "
            f"{r['forming_cpu_s']:>10.3f} {r['tables']:>7} {r['lost']:>5}"
        )


if __name__ == "__main__":
    main()
