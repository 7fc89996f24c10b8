"""`quickchange eval`: compares adapters on a task file, as a table and plots."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer

from quickchange_training.adapters.adapter_job import PromptFormat
from quickchange_training.adapters.adapter_recipes import TrainingDtype
from quickchange_training.errors import RecipeError, TrainingError
from quickchange_training.evaluation.evaluation_report import MEASURES, Measure

app = typer.Typer(name="eval", add_completion=False, rich_markup_mode=None)

_DEMO = "demo"


@app.command()
def evaluate(
    task: Annotated[
        Path,
        typer.Argument(help='JSONL of {"prompt", "completion"} or {"messages"}, one a line.'),
    ],
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME or folder, may be given repeatedly; NAME+TURBO says how it drafts: auto "
            "(default), off, lookup, or the name or folder of Turbo heads. The base always comes "
            "first; base+TURBO is the base with heads. NAME*0.5,NAME*0.5 is the exact weighted "
            "sum, ties(…), dare_linear(…) and dare_ties(…) of it are merges."
        ),
    ] = None,
    store: Annotated[
        str | None,
        typer.Option(envvar="QUICKCHANGE_STORE", help="Store (default for the demo: its own)."),
    ] = None,
    model: Annotated[
        str, typer.Option(help="Base model: folder, hub id, or demo for the demo's base.")
    ] = _DEMO,
    density: Annotated[float, typer.Option(help="Share of the values that merges keep.")] = 0.5,
    limit: Annotated[int | None, typer.Option(min=1, help="Take the first N examples.")] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Of an answer (default: a quarter more than the longest wanted)."),
    ] = None,
    concurrency: Annotated[
        str, typer.Option(help="Requests at once; speed is measured at each.")
    ] = "1,16",
    prompt_format: Annotated[
        PromptFormat,
        typer.Option(help="chat: through the chat template, plain: as it is, auto: chat if any."),
    ] = "auto",
    max_length: Annotated[int, typer.Option(help="Largest example, in tokens.")] = 2048,
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Where the engine runs.")] = "cpu",
    dtype: Annotated[TrainingDtype, typer.Option(help="Of the base model.")] = "float32",
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw quality against size and speed here: .png, .svg or .pdf."),
    ] = None,
    measure: Annotated[
        Measure, typer.Option(help=f"The plot's quality: {', '.join(MEASURES)}.")
    ] = "token-f1",
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="Write figures and answers here, after each adapter."),
    ] = None,
) -> None:
    """Compare adapters on a task file: quality, loss, size, speed and accepted drafts.

    Exact match; JSON validity, of the answers whose reference is JSON; SQuAD's token F1; loss in
    nats a token of the references; values, bytes in a store and memory where the engine runs;
    tokens/s, tokens a step and time to the first token; the share of drafts accepted, depth by
    depth. Last, all of them in turn in one batch.
    """
    from quickchange_training.evaluation import evaluation_report
    from quickchange_training.evaluation.evaluation_job import EvaluationJob, run

    with _errors_shown():
        if plot is not None:
            evaluation_report.check_plot(plot)
        found = run(
            EvaluationJob(
                task=task,
                model=model,
                store=store,
                adapters=tuple(adapter or ()),
                density=_density(density),
                limit=limit,
                max_tokens=max_tokens,
                concurrency=_concurrency(concurrency),
                prompt_format=prompt_format,
                max_length=max_length,
                device=device,
                dtype=dtype,
                out=json_file,
            ),
            lambda stage: typer.echo(stage, err=True),
        )
        typer.echo(evaluation_report.as_table(found))
        typer.echo(f"\n{evaluation_report.mixed_line(found)}")
        if plot is not None:
            evaluation_report.plot(found, measure, plot)


def _density(value: float) -> float:
    if not 0 < value <= 1:
        raise RecipeError(f"--density {value:g}: give a share above 0, at most 1")
    return value


def _concurrency(text: str) -> tuple[int, ...]:
    """Parse `1,16` to distinct numbers, ascending."""
    try:
        found = sorted({int(part) for part in text.split(",")})
    except ValueError:
        found = []
    if not found or found[0] < 1:
        raise RecipeError(f"--concurrency {text!r}: give numbers from 1, as in 1,16")
    return tuple(found)


@contextmanager
def _errors_shown() -> Iterator[None]:
    from quickchange_server.errors import QuickchangeError
    from quickchange_store.errors import StoreError
    from quickchange_training.demo.demo_base import DemoBaseError

    try:
        yield
    except (TrainingError, StoreError, DemoBaseError, QuickchangeError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
