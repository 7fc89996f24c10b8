"""lorax-client in a virtual environment of its own, made once and kept in the cache folder."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from required_services import not_installed

REQUIREMENT = "lorax-client==0.6.3"


def python_with_client() -> Path:
    """The interpreter of that environment. Skips the test where pip can't make it."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    folder = cache / "quickchange-tests" / f"{REQUIREMENT}-python{version}"
    folder.mkdir(parents=True, exist_ok=True)
    python, complete = folder / "venv" / "bin" / "python", folder / "complete"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # test runs beside this one
        if not complete.exists():
            shutil.rmtree(folder / "venv", ignore_errors=True)
            try:
                _run(sys.executable, "-m", "venv", str(folder / "venv"))
                _run(str(python), "-m", "pip", "install", "--quiet", REQUIREMENT)
            except (subprocess.SubprocessError, OSError) as error:
                not_installed(f"pip can't install {REQUIREMENT}: {error}")
            complete.touch()
    return python


def run_script(python: Path, script: Path, *arguments: str) -> Any:
    """What a script prints as JSON."""
    done = subprocess.run(
        [python, script, *arguments],
        capture_output=True,
        timeout=1200,
        env=_environment(),
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=300, env=_environment())


def _environment() -> dict[str, str]:
    """This process's, without its packages."""
    return {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
