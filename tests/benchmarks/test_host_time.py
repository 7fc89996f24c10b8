"""The host's work is hidden behind a simulated device, whose steps take 5 ms each."""

from __future__ import annotations

import pytest

from quickchange_bench.engine.host_time import HostLoad, OwnClock, SimulatedDevice, host_times

T = 0.005
SLACK = 0.0003


class HandClock:
    """Stands still but for what is waited."""

    def __init__(self) -> None:
        self.time = 0.0

    def now(self) -> float:
        return self.time

    def wait_until(self, moment: float) -> None:
        self.time = max(self.time, moment)


def test_the_device_computes_in_order_and_rests_when_it_has_nothing() -> None:
    device = SimulatedDevice(T, clock := HandClock())
    assert [device.launch(), device.launch()] == pytest.approx([T, 2 * T])
    clock.wait_until(5 * T)
    assert device.launch() == pytest.approx(6 * T)


def test_steps_in_flight_follow_each_other_without_a_gap() -> None:
    """By the host's own time, which other work on the machine does not lengthen much: a device of
    ten times the time has room for it."""
    loads = [HostLoad(64, True, depth) for depth in (1, 2)]
    one, two = host_times(loads, 10 * T, steps=20, clock=OwnClock)
    assert two.period == pytest.approx(10 * T, abs=SLACK)
    apart = one.period - two.period
    assert apart > one.host / 2, "the host's time shows where steps don't overlap"
