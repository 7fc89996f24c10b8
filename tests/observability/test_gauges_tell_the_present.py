"""Gauges after aborts, after an engine's death and without any engine are those of the moment."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from client_support import client_of, generation, make_settings, next_of, rest_of, run, until
from fake_engine import ADAPTER_BYTES, Behaviour
from prometheus_client.parser import text_string_to_metric_families

from quickchange_server.engine_client.client import DeltaStream, EngineClient
from quickchange_server.engine_client.local import supervisor
from quickchange_server.errors import EngineFailedError
from quickchange_server.observability.metrics import Metrics
from quickchange_server.protocol import Component

NOTHING_RUNS = {
    "requests_running": 0,
    "requests_waiting": 0,
    "kv_used_blocks": 0,
}
NO_ENGINE = {
    **NOTHING_RUNS,
    "engine_up": 0,
    "kv_capacity_blocks": 0,
    "kv_cached_blocks": 0,
    "tier_adapters": 0,
    "tier_used_bytes": 0,
    "tier_capacity_bytes": 0,
    "adapter_resident_bytes": 0,
}


def gauges(metrics: Metrics, names: dict[str, int]) -> dict[str, float]:
    text = metrics.render()[0].decode()
    found = {
        family.name.removeprefix("quickchange_"): sum(sample.value for sample in family.samples)
        for family in text_string_to_metric_families(text)
    }
    return {name: found.get(name, 0) for name in names}


async def three(client: EngineClient) -> list[DeltaStream]:
    streams = [
        client.generate([generation(f"r{i}", 100_000, adapters=(Component(f"d{i}"),))], label="a")
        for i in range(3)
    ]
    for stream in streams:
        await next_of(stream)
    return streams


def test_after_aborts_nothing_runs_or_holds_blocks() -> None:
    async def scenario() -> None:
        metrics = Metrics(make_settings())
        async with client_of(Behaviour(step_seconds=0.005), metrics) as client:
            streams = await three(client)
            busy = {"kv_used_blocks": 3, "requests_running": 3, "tier_adapters": 3}
            await until(lambda: gauges(metrics, busy) == busy)
            for stream in streams:
                stream.close()
            await until(lambda: gauges(metrics, NOTHING_RUNS) == NOTHING_RUNS)
            still = {"kv_capacity_blocks": 128, "tier_used_bytes": 3 * ADAPTER_BYTES}
            assert gauges(metrics, still) == still

    run(scenario())


def test_while_an_engine_restarts_its_gauges_are_0_and_its_requests_wait() -> None:
    async def scenario() -> None:
        metrics = Metrics(make_settings())
        behaviour = Behaviour(step_seconds=0.005, start_seconds=0.3)
        async with client_of(behaviour, metrics) as client:
            streams = await three(client)
            assert client.pid is not None
            os.kill(client.pid, signal.SIGKILL)
            await until(lambda: client.state == "restarting")
            waits = {**NO_ENGINE, "requests_waiting": 3}
            assert gauges(metrics, waits) == waits
            for stream in streams:
                stream.close()

    run(scenario())


def test_where_no_engine_can_be_had_all_gauges_are_0(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "MAX_FAILURES", 2)
    monkeypatch.setattr(supervisor, "FIRST_BACKOFF_SECONDS", 0.01)
    broken = tmp_path / "broken"

    async def scenario() -> None:
        metrics = Metrics(make_settings())
        async with client_of(Behaviour(step_seconds=0.005, broken=broken), metrics) as client:
            streams = await three(client)
            broken.touch()
            assert client.pid is not None
            os.kill(client.pid, signal.SIGKILL)
            await until(lambda: client.state == "failed")
            for stream in streams:
                with pytest.raises(EngineFailedError):
                    await rest_of(stream)
            assert gauges(metrics, NO_ENGINE) == NO_ENGINE

    run(scenario())
