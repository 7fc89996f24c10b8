"""What `make test` runs its commands under: no process stays, however the run ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

SCRIPT = Path(__file__).parents[1] / "support" / "whole_tree.py"
SECONDS = 60
# A worker that starts a server in a session of its own, as a browser's, which ignores SIGTERM.
WORKER = """
import subprocess, sys, time
code = "import signal, time; signal.signal(15, signal.SIG_IGN); print(flush=True); time.sleep(900)"
server = subprocess.Popen([sys.executable, "-c", code], stdout=-1, start_new_session=True)
server.stdout.readline()
print(server.pid, flush=True)
time.sleep(float(sys.argv[1]))
sys.exit(3)
"""


def started(seconds: float) -> tuple[subprocess.Popen[str], int]:
    """The script over such a worker, and the server's process id."""
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), sys.executable, "-c", WORKER, str(seconds)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    with process.stdout as said:
        return process, int(said.readline())


def test_a_run_that_ends_by_itself_keeps_its_status_and_leaves_no_process() -> None:
    process, server = started(0)
    assert process.wait(SECONDS) == 3
    assert not psutil.pid_exists(server)


@pytest.mark.parametrize("received", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_no_process(received: signal.Signals) -> None:
    process, server = started(900)
    if received == signal.SIGINT:
        os.killpg(process.pid, received)  # as a terminal does
    else:
        process.send_signal(received)  # as make does
    assert process.wait(SECONDS) == 128 + received
    assert not psutil.pid_exists(server)
