"""Clients of other makers, unmodified, against a server with a real model.

Each script in `scripts/` names what it requires in its first line, and asserts what the client
gives it. It runs in an environment of its own, made once and kept in the user's cache folder.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest
from required_services import not_installed
from tool_templates import MARKED

from quickchange_bench.load.own_server import BASE_NAME, OwnServer, register
from quickchange_bench.models.random_adapters import AdapterSpec, write_adapters
from quickchange_training.demo.demo_base import ensure_demo_base

pytestmark = pytest.mark.slow

SCRIPTS = sorted((Path(__file__).parent / "scripts").glob("client_*"))
MARK = "requires: "
ADAPTER = "tuned"
INSTALL_SECONDS = 300
SCRIPT_SECONDS = 600


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of the demo's base model, with a chat template that takes tools, and an adapter."""
    folder = tmp_path_factory.mktemp("clients")
    base, model = ensure_demo_base(), folder / "model"
    model.mkdir()
    for file in base.iterdir():
        (model / file.name).symlink_to(file)
    template = model / "chat_template.jinja"
    template.unlink(missing_ok=True)
    template.write_text(MARKED)
    write_adapters(base, folder, [ADAPTER], AdapterSpec(rank=4))
    own = OwnServer(model=str(model), store=folder / "store")
    with own.running(folder / "server.log") as server:
        register(server.url, {ADAPTER: folder / ADAPTER})
        yield server.url


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_a_client_gets_what_it_asks_for(script: Path, url: str, tmp_path: Path) -> None:
    requirements = script.read_text().splitlines()[0].partition(MARK)[2].split()
    if script.suffix == ".py":
        python = installed(f"python{sys.version_info.major}.{sys.version_info.minor}", requirements)
        command = [str(python / "bin" / "python"), str(script)]
    else:  # node looks for packages beside the script
        (tmp_path / "node_modules").symlink_to(installed("node", requirements) / "node_modules")
        command = ["node", shutil.copy(script, tmp_path)]
    environment = {
        **{name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ},
        "URL": url,
        "MODEL": BASE_NAME,
        "ADAPTER": ADAPTER,
    }
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=SCRIPT_SECONDS,
        env=environment,
        cwd=tmp_path,
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
            cwd=packages.parent if language != "node" else packages,
        )
