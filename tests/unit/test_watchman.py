"""A worker's watchman says how its process is, whatever holds that up, and ends with it."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from raytrain_het.membership.record import Member
from raytrain_het.membership.watchman import Life, Watchman, life_of
from raytrain_het.membership.watchman_main import MAX_ASKING

PATIENCE_S = 20.0
WORKER = """
import sys, time
from raytrain_het.membership.watchman import Watchman
watchman = Watchman("127.0.0.1")
watchman.learn("token")
print(watchman.port, watchman._process.pid, flush=True)
time.sleep(600)
"""


def until(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + PATIENCE_S
    while not (found := condition()):
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.005)
    return found


def member(port: int, *, state_port: int = 1) -> Member:
    return Member(uid="0-a", slot=0, host="127.0.0.1", state_port=state_port, device="cpu", watch_port=port)


def life(port: int, token: str = "token", *, state_port: int = 1) -> Life:
    return asyncio.run(life_of(member(port, state_port=state_port), token, 5.0))


@pytest.fixture
def worker() -> Iterator[tuple[subprocess.Popen[str], int, int]]:
    """A process with a watchman: the process, the watchman's port, and its id."""
    process = subprocess.Popen([sys.executable, "-c", WORKER], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    port, pid = map(int, process.stdout.readline().split())
    yield process, port, pid
    process.kill()
    process.wait()
    process.stdout.close()


def ended(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0] == "Z"


def test_it_tells_running_stopped_and_ended_processes_apart(worker: Any) -> None:
    process, port, pid = worker
    until(lambda: life(port) is Life.RUNS)
    process.send_signal(signal.SIGSTOP)
    until(lambda: life(port) is Life.STOPPED)
    process.send_signal(signal.SIGCONT)
    until(lambda: life(port) is Life.RUNS)
    process.kill()
    assert until(lambda: life(port) in (Life.ENDED, Life.REFUSED))
    assert until(lambda: ended(pid)), "it does not outlive its worker for long"


def test_it_answers_while_the_interpreter_is_held() -> None:
    watchman = Watchman("127.0.0.1")
    watchman.learn("token")
    asked = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import asyncio, time\n"
            "from raytrain_het.membership.record import Member\n"
            "from raytrain_het.membership.watchman import life_of\n"
            f"m = Member(uid='0-a', slot=0, host='127.0.0.1', state_port=1, device='cpu', watch_port={watchman.port})\n"
            "print('asks', flush=True)\n"
            "input()\n"
            "at = time.time()\n"
            "print(asyncio.run(life_of(m, 'token', 5.0)).value, time.time())\n",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert asked.stdin is not None and asked.stdout is not None
    assert asked.stdout.readline() == "asks\n"
    asked.stdin.write("\n")
    asked.stdin.flush()
    ctypes.PyDLL(None).usleep(2_000_000)  # As any call into C that keeps the interpreter's lock.
    released_at = time.time()
    said, at = asked.stdout.read().split()
    asked.wait()
    asked.stdin.close()
    asked.stdout.close()
    watchman.close()
    assert said == "runs" and float(at) < released_at


def test_its_answers_are_believed_only_of_who_knows_the_token(worker: Any) -> None:
    _, port, _ = worker
    until(lambda: life(port) is Life.RUNS)
    assert life(port, "another") is Life.LISTENS


@pytest.mark.parametrize("words", ["asks", "calls", ""])
def test_it_signs_nothing_for_who_does_not_know_the_token(worker: Any, words: str) -> None:
    """What it signed for a stranger could else prove to the hub that the stranger is of the run."""
    _, port, _ = worker
    until(lambda: life(port) is Life.RUNS)
    nonce = f"{words:c<32}"
    with socket.create_connection(("127.0.0.1", port)) as stranger:
        stranger.settimeout(PATIENCE_S)
        stranger.sendall(f"{nonce} {'0' * 64}\n".encode())
        assert stranger.recv(100) == b""


def test_where_nobody_listens_the_process_has_ended_and_where_somebody_does_nothing_is_known() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert life(0, state_port=port) is Life.LISTENS
    assert life(0, state_port=port) is Life.REFUSED


def test_strangers_that_say_nothing_keep_nobody_from_asking(worker: Any) -> None:
    _, port, _ = worker
    until(lambda: life(port) is Life.RUNS)
    strangers = [socket.create_connection(("127.0.0.1", port)) for _ in range(2 * MAX_ASKING)]
    assert until(lambda: life(port) is Life.RUNS)
    for stranger in strangers:
        stranger.close()


def test_a_watchman_that_cannot_be_started_costs_a_warning_only(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    watchman = Watchman("127.0.0.1")
    assert watchman.port == 0
    watchman.learn("token")
    watchman.close()
    assert "no process can be started" in caplog.text


def test_it_is_ended_with_its_worker_in_good_order_too() -> None:
    watchman = Watchman("127.0.0.1")
    assert watchman._process is not None
    watchman.close()
    assert watchman._process.returncode is not None
