"""Between steps the engine's loop answers pings, and says what changed without a step."""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from engine_driver import make_engine, request
from turbo_models import make_turbo_models

from quickchange_server.engine.process import Waker, _serve
from quickchange_server.protocol import Began, Cancel, Ping, Pulse, Report, Shutdown, StepReport

LIMIT_SECONDS = 180.0


@pytest.fixture(scope="module")
def near(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Connection]:
    """The API process's end of a loop over a small engine."""
    models = make_turbo_models(tmp_path_factory.mktemp("models") / "base")
    waker = Waker()
    engine = make_engine(
        models.path,
        models.adapters.__getitem__,
        on_wake=waker.wake,
        max_model_len=256,
        on_begun=lambda ids: far.send(Began(ids)),
    )
    near, far = multiprocessing.Pipe()
    loop = threading.Thread(target=_serve, args=(far, engine, waker), daemon=True)
    loop.start()
    yield near
    near.send(Shutdown())
    loop.join(LIMIT_SECONDS)
    assert not loop.is_alive()
    engine.close()


def until(near: Connection, found: Callable[[Report], bool]) -> list[Report]:
    """Reports up to the first that is found."""
    end = time.monotonic() + LIMIT_SECONDS
    reports: list[Report] = []
    while not reports or not found(reports[-1]):
        assert near.poll(max(end - time.monotonic(), 0)), reports[-3:]
        reports.append(near.recv())
    return reports


def idle(report: Report) -> bool:
    return isinstance(report, Pulse) and not report.stats.running and not report.stats.waiting


def test_an_idle_engine_answers_each_ping(near: Connection) -> None:
    for _ in range(3):
        near.send(Ping())
        [pulse] = until(near, lambda report: isinstance(report, Pulse))
        assert isinstance(pulse, Pulse)
        assert (pulse.stats.rows, pulse.stats.kv_blocks_used) == (0, 0)


def test_after_a_cancel_the_blocks_are_told_to_be_free(near: Connection) -> None:
    near.send(request("gone", list(range(1, 20)), max_tokens=230))
    until(near, lambda report: isinstance(report, StepReport) and report.stats.kv_blocks_used > 5)
    near.send(Cancel("gone"))
    pulse = until(near, idle)[-1]
    assert isinstance(pulse, Pulse)
    assert pulse.stats.kv_blocks_used == 0
    assert pulse.stats.kv_blocks_cached > 0


def test_a_cancel_of_one_that_waits_for_its_adapter_is_told(near: Connection) -> None:
    near.send(request("never", [1, 2], [("unknown", 1.0)], max_tokens=5))
    until(near, lambda report: isinstance(report, StepReport | Pulse) and not report.stats.running)
    near.send(Cancel("never"))
    near.send(Ping())
    assert until(near, idle)


def test_requests_are_told_before_the_first_step_that_has_them(near: Connection) -> None:
    for name in ("one", "two"):
        near.send(request(name, [1, 2, 3], max_tokens=3))
    ended: set[str] = set()
    begun: list[str] = []

    def both(report: Report) -> bool:
        if isinstance(report, Began):
            begun.extend(report.request_ids)
        if isinstance(report, StepReport):
            assert {delta.request_id for delta in report.deltas} <= set(begun)
            ended.update(delta.request_id for delta in report.deltas if delta.finish_reason)
        return ended == {"one", "two"}

    until(near, both)
    assert sorted(begun) == ["one", "two"]


def test_pings_are_answered_by_steps_while_there_is_work(near: Connection) -> None:
    near.send(request("busy", [5, 6, 7], max_tokens=100))
    until(near, lambda report: isinstance(report, StepReport))
    near.send(Ping())
    until(near, lambda report: isinstance(report, StepReport))
    near.send(Cancel("busy"))
    until(near, idle)


def test_a_model_folder_is_not_needed_to_end(tmp_path: Path) -> None:
    """A pipe that is closed before `Begin` ends the process without a word."""
    from quickchange_server.config import Settings
    from quickchange_server.engine.process import main

    near, far = multiprocessing.Pipe()
    near.close()
    main(far, Settings(model=str(tmp_path / "none"), store=tmp_path), lambda _: (None, None))
