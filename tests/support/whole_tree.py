"""Run a command and end all that it leaves: python whole_tree.py COMMAND…

A test run that is interrupted may leave servers, databases and browsers of its workers. Here every
process that loses its parent becomes a child of this one (Linux), which ends them when the command
has ended. SIGTERM is passed on to the command; a terminal's Ctrl-C reaches it by itself, and pytest
would take a second one for haste.
"""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
import time
from types import FrameType

import psutil

PR_SET_CHILD_SUBREAPER = 36
END_SECONDS = 20.0  # for the command after a signal, and then for what it left
KILLS = 5
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main(command: list[str]) -> int:
    """The command's exit status, or the shell's for the signal that ended the run."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        received.append(number)

    for number in SIGNALS:
        signal.signal(number, note)
    process = subprocess.Popen(command)
    status = wait(process, received)
    end_all()
    return 128 + received[0] if received else status


def wait(process: subprocess.Popen[bytes], received: list[int]) -> int:
    """Wait for the command, which is killed some time after the first signal."""
    deadline = None
    while process.poll() is None:
        if received and deadline is None:
            if received[0] != signal.SIGINT:
                process.send_signal(received[0])
            deadline = time.monotonic() + END_SECONDS
        if deadline is not None and time.monotonic() > deadline:
            process.kill()
        time.sleep(0.1)
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


def end_all() -> None:
    """End every process below this one: asked first, then killed."""
    left = psutil.Process().children(recursive=True)
    for process in left:
        _send(process, signal.SIGTERM)
    psutil.wait_procs(left, timeout=END_SECONDS / 4)
    for _ in range(KILLS):  # again for those that they started meanwhile
        left = psutil.Process().children(recursive=True)
        for process in left:
            _send(process, signal.SIGKILL)
        psutil.wait_procs(left, timeout=1)


def _send(process: psutil.Process, number: int) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:  # it has ended by itself
        return


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
