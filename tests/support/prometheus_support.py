"""Prometheus itself, from the machine's packages, with the repository's rules."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from http_support import wait_until

FILES = Path(__file__).parents[2] / "docker" / "prometheus"
SCRAPE_SECONDS = 1
STOP_SECONDS = 10.0


def program(name: str) -> str:
    """A program's path. Skips the test where it is missing, unless services are required."""
    found = shutil.which(name)
    if found is None:
        reason = f"{name} is not on PATH; Debian's package `prometheus` has it"
        if os.environ.get("QUICKCHANGE_REQUIRE_SERVICES") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    return found


def rules(name: str) -> list[dict[str, Any]]:
    """All rules of one of the files."""
    groups = yaml.safe_load((FILES / name).read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


@dataclass(frozen=True)
class Prometheus:
    """A running one."""

    http: httpx.Client
    config: Path
    process_id: int

    def ask(self, path: str, **params: str | float) -> Any:
        answer = self.http.get(path, params=params)
        told = answer.json()
        assert told["status"] == "success", (params, told)
        return told["data"]

    def scrape_no_more(self) -> None:
        """Keep what is there; the other tests need the machine."""
        config = yaml.safe_load(self.config.read_text())
        self.config.write_text(yaml.safe_dump({**config, "scrape_configs": []}))
        os.kill(self.process_id, signal.SIGHUP)  # read it again
        wait_until(lambda: not self.ask("/api/v1/targets")["activeTargets"])

    def at(self, expression: str, when: float) -> list[float]:
        """All values of an expression at one time."""
        result = self.ask("/api/v1/query", query=expression, time=when)["result"]
        return [float(series["value"][1]) for series in result]

    def over(self, expression: str, start: float, end: float) -> list[float]:
        """All values of an expression over a time, a second apart."""
        result = self.ask("/api/v1/query_range", query=expression, start=start, end=end, step=1)
        return [float(value) for series in result["result"] for _, value in series["values"]]

    def label_values(self, selector: str, label: str, start: float) -> list[str]:
        """What Grafana's `label_values(selector, label)` gives."""
        path = f"/api/v1/label/{label}/values"
        values: list[str] = self.ask(path, **{"match[]": selector, "start": start})
        return values


@dataclass(frozen=True)
class Observed:
    """What Prometheus holds of a server under load, and of the same as a cluster tells it."""

    prometheus: Prometheus
    start: float  # Unix seconds
    end: float
    instances: Mapping[str, str]  # of "machine" and "cluster"


def configuration(targets: Sequence[str], authorization: str | None) -> dict[str, Any]:
    """The repository's own, with these targets, their key and a faster clock."""
    config: dict[str, Any] = yaml.safe_load((FILES / "prometheus.yml").read_text())
    every = f"{SCRAPE_SECONDS}s"
    config["global"] = {"scrape_interval": every, "evaluation_interval": every}
    config["rule_files"] = [str(FILES / name) for name in config["rule_files"]]
    (job,) = config["scrape_configs"]
    del job["dns_sd_configs"]
    job["static_configs"] = [{"targets": list(targets)}]
    if authorization is not None:
        kind, _, credentials = authorization.partition(" ")
        job["authorization"] = {"type": kind, "credentials": credentials}
    return config


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


@contextmanager
def prometheus(
    folder: Path, targets: Sequence[str], authorization: str | None
) -> Iterator[Prometheus]:
    """Scrapes each target (host:port), once at least; data and log lie in `folder`.

    Ended by its process id.
    """
    binary = program("prometheus")
    config = folder / "prometheus.yml"
    config.write_text(yaml.safe_dump(configuration(targets, authorization)))
    address = f"127.0.0.1:{free_port()}"
    command = [
        binary,
        f"--config.file={config}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address={address}",
    ]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        with httpx.Client(base_url=f"http://{address}", timeout=10.0) as http:
            wait_until(lambda: process.poll() is not None or _ready(http))
            assert process.poll() is None, (folder / "log").read_text()
            running = Prometheus(http, config, process.pid)
            wait_until(lambda: running.at("up", time.time()) == [1.0] * len(targets))
            yield running
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _ready(http: httpx.Client) -> bool:
    try:
        return http.get("/-/ready").status_code == 200
    except httpx.TransportError:
        return False
