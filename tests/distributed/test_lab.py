"""The lab itself: what becomes of its processes when things go wrong around it."""

import os
import select
import subprocess
import sys

SCRIPT = """
import os, sys, time
from raytrain_het.testing.processes import ProcessLab

def train(directory):
    print(os.getpid(), flush=True)
    time.sleep(600)

{guard}
    ProcessLab(train, sys.argv[1], num_slots=2).run(60)
"""


def script(tmp_path, guard):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT.format(guard=guard))
    return [sys.executable, str(path), str(tmp_path / "lab")]


def test_workers_end_with_the_lab_even_if_it_is_killed(tmp_path):
    command = script(tmp_path, "if __name__ == '__main__':")
    lab = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    workers = [os.pidfd_open(int(lab.stdout.readline())) for _ in range(2)]
    lab.kill()
    lab.wait()
    for worker in workers:
        ended, _, _ = select.select([worker], [], [], 10)
        os.close(worker)
        assert ended


def test_a_script_without_the_main_guard_is_told_so(tmp_path):
    done = subprocess.run(script(tmp_path, "if True:"), capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "if __name__ == '__main__'" in done.stderr.splitlines()[-1]
