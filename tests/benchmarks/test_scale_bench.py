"""Phases and memory samples of the benchmark with many adapters."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest

from quickchange_bench.load import own_server
from quickchange_bench.load.load_client import Client, ServedNames
from quickchange_bench.load.memory_growth import Samples, growth_table
from quickchange_bench.load.server_process import RunningServer
from quickchange_bench.service import adapters_at_scale
from quickchange_bench.service.adapters_at_scale import PhaseKind, ScaleBench, ScaleOptions, Traffic

OPTIONS = ScaleOptions(
    model=Path("model"),
    adapters=30,
    resident=8,
    host_resident=12,
    phase_seconds=0.3,
    workers=2,
    steady=2,
)


def phase(fake: Any, kind: PhaseKind) -> Traffic:
    async def run() -> Traffic:
        async with Client(fake.url, ServedNames("base", tuple(OPTIONS.names))) as client:
            server = RunningServer(url=fake.url, pid=os.getpid(), start_seconds=0.0)
            return await ScaleBench(OPTIONS, server, client).phase(kind)

    return asyncio.run(run())


@pytest.fixture(autouse=True)
def no_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_server, "device_loads", lambda _url: 0)


def adapters(bodies: list[dict[str, Any]], tokens: int) -> set[str]:
    return {body["model"] for body in bodies if body["max_tokens"] == tokens}


@pytest.mark.parametrize("kind", ["quiet", "loads"])
def test_steady_streams_stay_on_their_own_adapters(fake_server: Any, kind: PhaseKind) -> None:
    traffic = phase(fake_server, kind)
    assert adapters(fake_server.bodies, adapters_at_scale.STEADY_TOKENS) == {
        "scale-0000",
        "scale-0001",
    }
    assert fake_server.most_running == OPTIONS.steady + OPTIONS.workers
    assert traffic.phase().errors == 0
    assert traffic.phase().itl_p99 is not None


def test_a_quiet_background_stays_within_the_resident_adapters(fake_server: Any) -> None:
    phase(fake_server, "quiet")
    asked = adapters(fake_server.bodies, adapters_at_scale.BACKGROUND_TOKENS)
    assert asked <= set(OPTIONS.names[OPTIONS.steady : OPTIONS.hot])


def test_a_loading_background_goes_beyond_them(fake_server: Any) -> None:
    phase(fake_server, "loads")
    asked = adapters(fake_server.bodies, adapters_at_scale.BACKGROUND_TOKENS)
    assert asked - set(OPTIONS.names[: OPTIONS.resident])


def test_a_budget_too_small_for_the_quiet_phases_is_refused() -> None:
    with pytest.raises(ValueError, match="3 resident adapters"):
        ScaleOptions(model=Path("model"), resident=3)


def test_growth_has_a_slope_for_each_process() -> None:
    samples = Samples()
    samples.names[1] = "engine"
    samples.readings[1] = [(60.0 * k, 1000 + 10 * k, 500) for k in range(5)]
    (growth,) = samples.growth()
    assert growth.rss_slope == pytest.approx(10)
    assert growth.pss_slope == pytest.approx(0)
    assert (growth.rss_first, growth.rss_last, growth.rss_peak) == (1000, 1040, 1040)
    assert "engine (1)" in growth_table([growth])


def test_samples_see_this_process() -> None:
    samples = Samples()
    samples.take(os.getpid())
    samples.take(os.getpid())
    assert samples.growth()[0].pid == os.getpid()
