"""Provenance of a published figure: machine, commit, command."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

from quickchange_bench.bench_results import MachineInfo


def machine() -> MachineInfo:
    return MachineInfo(
        cpu=_cpu_name(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else _cores(),
        memory=_memory(),
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        gpu=_gpu_name(),
    )


def _cores() -> int:
    return os.cpu_count() or 1


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _memory() -> int:
    """Physical memory in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _gpu_name() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    return answer.stdout.strip() or None


def commit() -> str | None:
    """The checkout's commit, with "+" where files differ from it; None outside a checkout."""
    folder = Path(__file__).parent
    if (head := _git(folder, "rev-parse", "--short=12", "HEAD")) is None:
        return None
    return head + ("+" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")


def _git(folder: Path, *arguments: str) -> str | None:
    if shutil.which("git") is None:
        return None
    answer = subprocess.run(
        ["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=30, check=False
    )
    return answer.stdout.strip() if answer.returncode == 0 else None


def command() -> str:
    """The command line of this process, the program by its bare name and the home folder as ~."""
    line = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    return line.replace(str(Path.home()), "~")


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
