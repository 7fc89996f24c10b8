"""Environments of other makers' clients, made once and kept in the user's cache folder."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

from required_services import not_installed

MARK = "requires: "
INSTALL_SECONDS = 300
SCRIPT_SECONDS = 600


def run_client(script: Path, folder: Path, **environment: str) -> None:
    """Run a client's script, which asserts what the client gives it, in the packages that its first
    line requires. Skips the test where these can't be had."""
    requirements = script.read_text().splitlines()[0].partition(MARK)[2].split()
    if script.suffix == ".py":
        python = installed(f"python{sys.version_info.major}.{sys.version_info.minor}", requirements)
        command = [str(python / "bin" / "python"), str(script)]
    else:  # node looks for packages beside the script
        (folder / "node_modules").symlink_to(installed("node", requirements) / "node_modules")
        command = ["node", shutil.copy(script, folder)]
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=SCRIPT_SECONDS,
        env={**kept, **environment},
        cwd=folder,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"


def installed(language: str, requirements: list[str]) -> Path:
    """A folder that holds the packages, made once. Skips the test where none can be had."""
    if language == "node" and not (shutil.which("node") and shutil.which("npm")):
        not_installed("node and npm are not installed")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    digest = sha256(" ".join([language, *requirements]).encode()).hexdigest()[:16]
    folder = cache / "quickchange-tests" / f"{language}-{digest}"
    folder.mkdir(parents=True, exist_ok=True)
    packages, complete = folder / "packages", folder / "complete"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # test runs beside this one
        if not complete.exists():
            shutil.rmtree(packages, ignore_errors=True)
            try:
                install(language, packages, requirements)
            except subprocess.CalledProcessError as error:
                not_installed(f"can't install {requirements}: {error.stderr.decode()[-400:]}")
            except subprocess.TimeoutExpired as error:
                not_installed(f"can't install {requirements}: {error}")
            complete.touch()
    return packages


def install(language: str, packages: Path, requirements: list[str]) -> None:
    if language == "node":
        packages.mkdir()
        commands = [["npm", "install", "--no-audit", "--no-fund", *requirements]]
    else:
        python = str(packages / "bin" / "python")
        commands = [
            [sys.executable, "-m", "venv", str(packages)],
            [python, "-m", "pip", "install", "--quiet", *requirements],
        ]
    for command in commands:
        subprocess.run(
            command,
            check=True,
            capture_output=True,
            timeout=INSTALL_SECONDS,
            # pip would take what lies on this process's path for installed
            env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
            cwd=packages.parent if language != "node" else packages,
        )
