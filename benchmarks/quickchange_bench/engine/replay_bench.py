"""The drafting bench: the engine's speculation against oracles, on recorded outputs and prices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from quickchange_bench.engine.draft_oracle import Oracle
from quickchange_bench.engine.draft_recording import (
    DraftRecording,
    completed,
    load_recording,
    save_recording,
)
from quickchange_bench.engine.draft_replay import DraftReplay, PricedMachine
from quickchange_bench.report_tables import MILLI, number, table
from quickchange_server.entrypoints.engine_start import token_text
from quickchange_server.frontend.tokenizer import Text


@dataclass(frozen=True, slots=True)
class ReplayOptions:
    """Options of the run. recording: a file; what it lacks of these is recorded first."""

    model: Path
    recording: Path
    tasks: tuple[str, ...]
    dtypes: tuple[str, ...]
    lanes: tuple[int, ...]
    requests: int = 64  # of each task, where they are recorded


@dataclass(frozen=True, slots=True)
class ReplayFigures:
    """One task with so many sequences at once at one dtype's prices. Rates in tokens/s."""

    task: str
    dtype: str
    lanes: int
    off: float
    online: float  # from the first step on
    later: float  # the second half of the steps
    rates: float  # of the oracle that knows how often drafts hold
    fates: float  # of the one that knows which do
    host: float  # seconds of the host for a sequence in a step
    tokens_per_step: float  # of a sequence
    rows_per_step: float  # bought for a sequence


def replay_drafting(options: ReplayOptions, say: Callable[[str], None]) -> list[ReplayFigures]:
    """Record what is missing, then replay all. `say` is called with the progress."""
    recording = _recording(options, say)
    words = token_text(Text.load(str(options.model)))
    figures = []
    for task in recording.tasks:
        if task.name not in options.tasks:
            continue
        rates, fates = (Oracle.of(task, words, knows) for knows in ("rates", "fates"))
        for dtype in options.dtypes:
            machine = PricedMachine(recording.prices[dtype])
            for lanes in options.lanes:
                say(f"{task.name}, {dtype}, {lanes} at once")
                replay = DraftReplay(task, lanes, machine, words)
                off = replay.off()[-1].rate
                sums = replay.online()
                every, later = sums[-1], sums[-1] - sums[len(sums) // 2]
                figures.append(
                    ReplayFigures(
                        task=task.name,
                        dtype=dtype,
                        lanes=lanes,
                        off=off,
                        online=every.rate,
                        later=later.rate,
                        rates=rates.best(lanes, machine, every.rate).rate,
                        fates=fates.best(lanes, machine, every.rate).rate,
                        host=every.host_a_sequence,
                        tokens_per_step=every.tokens / every.sequences,
                        rows_per_step=every.rows / every.sequences,
                    )
                )
    return figures


def _recording(options: ReplayOptions, say: Callable[[str], None]) -> DraftRecording:
    path = options.recording
    had = load_recording(path) if path.exists() else DraftRecording()
    say("recording what is missing …")
    found = completed(had, options.model, options.tasks, options.requests, options.dtypes)
    if found != had:
        save_recording(found, path)
    return found


def replay_table(figures: Sequence[ReplayFigures]) -> str:
    header = (
        "task", "prices", "at once", "off tok/s", "on / off", "later", "rates / off", "fates / off",
        "on / rates", "later", "tok/step", "rows bought", "host ms",
    )  # fmt: skip
    rows = [
        [
            one.task,
            one.dtype,
            str(one.lanes),
            number(one.off),
            *(number(r / one.off, 2) for r in (one.online, one.later, one.rates, one.fates)),
            *(number(r / one.rates, 2) for r in (one.online, one.later)),
            number(one.tokens_per_step, 2),
            number(one.rows_per_step, 2),
            number(one.host, 2, MILLI),
        ]
        for one in figures
    ]
    return table(header, rows)
