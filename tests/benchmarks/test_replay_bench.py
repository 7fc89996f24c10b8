"""The replay of drafting: recorded outputs at known prices, by speculation and by oracles."""

from __future__ import annotations

from pathlib import Path

import pytest
from recorded_drafts import NO_TEXT, linear_prices, recorded_task

from quickchange_bench.engine.draft_oracle import Oracle
from quickchange_bench.engine.draft_recording import (
    DraftRecording,
    load_recording,
    save_recording,
)
from quickchange_bench.engine.draft_replay import DraftReplay, PricedMachine
from quickchange_bench.engine.replay_bench import ReplayFigures, replay_table

PRICES = linear_prices(0.010, 0.0005)
MACHINE = PricedMachine(PRICES)


def host() -> float:
    """A host that takes no time."""
    return 0.0


def test_a_recording_is_read_as_it_was_written(tmp_path: Path) -> None:
    task = recorded_task(lambda _: (0.5, 0.5), texts=3, length=5)
    recording = DraftRecording((task,), {"float32": PRICES})
    save_recording(recording, tmp_path / "recording.gz")
    assert load_recording(tmp_path / "recording.gz") == recording


def test_a_step_without_drafts_costs_its_rows_and_gives_each_a_token() -> None:
    task = recorded_task(lambda _: (0.5, 0.5))
    *_, last = DraftReplay(task, 4, MACHINE, NO_TEXT, host).off()
    assert last.tokens == 4 * last.steps
    assert last.seconds == pytest.approx(last.steps * (0.010 + 4 * 0.0005))


@pytest.mark.parametrize("lanes", [1, 8])
def test_the_oracles_are_no_slower_than_speculation_and_the_one_that_knows_more_is_the_faster(
    lanes: int,
) -> None:
    task = recorded_task(lambda chance: (said := chance.choice([0.3, 0.8, 0.97]), said))
    online = DraftReplay(task, lanes, MACHINE, NO_TEXT, host).online()[-1].rate
    rates, fates = (
        Oracle.of(task, NO_TEXT, knows).best(lanes, MACHINE, online).rate
        for knows in ("rates", "fates")
    )
    assert online <= rates <= fates


def test_drafts_that_all_hold_are_all_bought_by_the_oracles_where_rows_are_cheap() -> None:
    task = recorded_task(lambda _: (0.99, 1.0), length=36)
    cheap = PricedMachine(linear_prices(0.010, 1e-6, 1e-6))
    played = Oracle.of(task, NO_TEXT, "fates").best(1, cheap, 100.0)
    # one token, then seven a step: the heads draft six
    assert played.tokens == 6 * played.steps


def test_the_host_s_time_in_speculation_counts() -> None:
    task = recorded_task(lambda _: (0.9, 0.9))
    ticks = iter(range(10**9))
    slow = DraftReplay(task, 1, MACHINE, NO_TEXT, lambda: 1e-3 * next(ticks)).online()[-1]
    assert slow.host >= 2e-3 * slow.steps
    assert slow.seconds > slow.host + 0.010 * slow.steps


def test_the_table_holds_speculation_against_both_oracles() -> None:
    figures = ReplayFigures("sql", "int8", 8, 100.0, 150.0, 160.0, 200.0, 250.0, 1e-4, 2.0, 1.5)
    row = replay_table([figures]).splitlines()[-1]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[4:10] == ["1.50", "1.60", "2.00", "2.50", "0.75", "0.80"]
