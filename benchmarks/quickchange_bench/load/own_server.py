"""Quickchange's server in a benchmark: its start and its adapter routes."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx

from quickchange_bench.load.load_client import ServedNames, bearer
from quickchange_bench.load.server_process import (
    RunningServer,
    free_port,
    quickchange_command,
    running,
)

BASE_NAME = "base"
VALUE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
ADMIN_SECONDS = 120.0  # longest wait for one administrative call


@dataclass(frozen=True, slots=True)
class OwnServer:
    """Options of a server's start. `environment` holds further QUICKCHANGE_ settings."""

    model: str
    store: str | Path
    device: str = "cpu"
    dtype: str = "float32"
    environment: Mapping[str, str] = field(default_factory=dict)
    key: str | None = field(default=None, repr=False)  # API key, where the server needs one

    @contextmanager
    def running(self, log: Path) -> Iterator[RunningServer]:
        """Run the server on a free port until the block ends."""
        port = free_port()
        arguments = {
            "--model": self.model,
            "--store": str(self.store),
            "--host": "127.0.0.1",
            "--port": str(port),
            "--device": self.device,
            "--dtype": self.dtype,
        }
        flat = [part for pair in arguments.items() for part in pair]
        with running(
            quickchange_command("serve", *flat),
            url=f"http://127.0.0.1:{port}",
            target=ServedNames(BASE_NAME, key=self.key),
            log=log,
            environment={"QUICKCHANGE_SERVED_MODEL_NAME": BASE_NAME, **self.environment},
        ) as server:
            yield server


@contextmanager
def working_folder(given: Path | None, purpose: str) -> Iterator[Path]:
    """The folder given, or a temporary one until the block ends."""
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given
    else:
        with TemporaryDirectory(prefix=f"quickchange-{purpose}-") as made:
            yield Path(made)


def admin_key(store: Path) -> str:
    """A new API key with the scope admin, in the database of a store's folder.

    Raises:
        RuntimeError: the command that makes it failed; says why.
    """
    command = quickchange_command(
        "keys", "create", "--tenant", "operator", "--scope", "admin", "--store", str(store)
    )
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode != 0:
        raise RuntimeError(f"making an API key: {made.stderr[-400:]}")
    return made.stdout.strip()


def create(url: str, path: str, body: Mapping[str, Any], key: str | None = None) -> dict[str, Any]:
    """POST a definition (an experiment, an API key) and return the server's answer.

    Raises:
        RuntimeError: the server refused it; says why.
    """
    headers = {} if key is None else bearer(key)
    with httpx.Client(base_url=url, timeout=ADMIN_SECONDS, trust_env=False) as http:
        response = http.post(path, json=body, headers=headers)
    _check(response, f"POST {path}")
    answer: dict[str, Any] = response.json()
    return answer


def register(url: str, adapters: Mapping[str, Path]) -> None:
    """Add adapters from folders, by name, through vLLM's route.

    Raises:
        RuntimeError: the server refused one; says which and why.
    """
    with httpx.Client(base_url=url, timeout=ADMIN_SECONDS, trust_env=False) as http:
        for name, folder in adapters.items():
            body = {"lora_name": name, "lora_path": str(folder.resolve())}
            _check(http.post("/v1/load_lora_adapter", json=body), f"adding {name}")


def pin(url: str, name: str) -> None:
    """Keep an adapter on the device."""
    with httpx.Client(base_url=url, timeout=ADMIN_SECONDS, trust_env=False) as http:
        _check(http.post(f"/v1/adapters/{name}/pin"), f"pinning {name}")


def _check(response: httpx.Response, what: str) -> None:
    if response.status_code >= 300:
        raise RuntimeError(f"{what}: status {response.status_code}: {response.text[:400]}")


def device_loads(url: str) -> int:
    """Loads onto the device since the server started, from its metrics."""
    with httpx.Client(base_url=url, timeout=ADMIN_SECONDS, trust_env=False) as http:
        response = http.get("/metrics")
    _check(response, "reading /metrics")
    return count_device_loads(response.text)


def count_device_loads(exposition: str) -> int:
    """The count of quickchange_adapter_load_seconds with tier="device", in Prometheus' text."""
    total = 0.0
    for line in exposition.splitlines():
        if line.startswith("quickchange_adapter_load_seconds_count{") and 'tier="device"' in line:
            total += float(line.rsplit(" ", 1)[1])
    return int(total)
