"""`quickchange train turbo` and `train turbo-lora`: options to jobs, reports to the terminal."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quickchange_training.adapters.adapter_job import PromptFormat
from quickchange_training.adapters.adapter_recipes import LoraRecipe, TrainingDtype
from quickchange_training.cli_options import (
    DEMO,
    base_of,
    changed,
    errors_shown,
    publication_of,
    resumable,
    say_added,
    say_warnings,
)
from quickchange_training.errors import RecipeError
from quickchange_training.turbo.recorded_requests import RecordingServer
from quickchange_training.turbo.turbo_recipe import HeadKind, Sharing, TurboRecipe

if TYPE_CHECKING:
    from quickchange_training.turbo.head_maker import GenerateFor, TurboReport

DEFAULT_SERVER = "http://127.0.0.1:8000"
KEY_VARIABLE = "QUICKCHANGE_API_KEY"

_D = TurboRecipe()


def turbo(
    out: Annotated[Path, typer.Option(help="Folder for the heads; must not exist.")],
    data: Annotated[
        Path | None,
        typer.Option(
            help='JSONL of {"prompt"} or {"messages"}, one a line; completions are not learned.'
        ),
    ] = None,
    model: Annotated[
        str, typer.Option(help="Base model: folder, hub id, or demo for the demo's base.")
    ] = DEMO,
    adapter: Annotated[
        Path | None,
        typer.Option(help="Folder of the LoRA that the heads are for; it goes into --out as well."),
    ] = None,
    on: Annotated[
        str | None,
        typer.Option(help="Adapter or alias in --store that the heads are for, not --adapter."),
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(
            "--from",
            help="Heads to go on from: a name in --store or a folder (default: those that draft "
            "for --on, else none).",
        ),
    ] = None,
    recorded: Annotated[
        bool,
        typer.Option("--recorded", help="Learn from requests that a server recorded, not --data."),
    ] = False,
    server: Annotated[
        str,
        typer.Option(help="Where --recorded asks, with the key in QUICKCHANGE_API_KEY if any."),
    ] = DEFAULT_SERVER,
    base_name: Annotated[
        str | None,
        typer.Option(help="What the heads call their base (default: hub id or folder's name)."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Publish under this name (needs --store).")] = (
        None
    ),
    store: Annotated[str | None, typer.Option(help="Store to publish in (needs --name).")] = None,
    prompt_format: Annotated[
        PromptFormat,
        typer.Option(help="chat: through the chat template, plain: as it is, auto: chat if any."),
    ] = "auto",
    depth: Annotated[int, typer.Option(help="Tokens drafted at most.")] = _D.depth,
    kind: Annotated[
        HeadKind,
        typer.Option(help="sequential: a head sees the token before (Hydra); parallel: Medusa."),
    ] = _D.kind,
    share: Annotated[
        Sharing, typer.Option(help="Heads that have the same blocks: all, all but the first, none.")
    ] = _D.share,
    blocks: Annotated[int, typer.Option(help="Residual blocks a head.")] = _D.blocks,
    vocabulary: Annotated[
        int, typer.Option(help="Most frequent tokens that are drafted; 0: every token.")
    ] = _D.vocabulary,
    epochs: Annotated[int, typer.Option(help="Passes over the outputs.")] = _D.epochs,
    steps: Annotated[
        int | None, typer.Option(help="Optimizer steps in all, instead of --epochs.")
    ] = _D.steps,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = _D.lr,
    warmup: Annotated[float, typer.Option(help="Share of the steps with a rising rate.")] = (
        _D.warmup
    ),
    weight_decay: Annotated[float, typer.Option(help="AdamW's weight decay.")] = _D.weight_decay,
    clip: Annotated[float, typer.Option(help="Largest gradient norm.")] = _D.clip,
    batch_size: Annotated[int, typer.Option(help="Positions a step.")] = _D.batch_size,
    depth_decay: Annotated[
        float, typer.Option(help="Weight of a head's loss against the head's before it.")
    ] = _D.depth_decay,
    spread: Annotated[
        float, typer.Option(help="Weight of being unsure where the token is not in --vocabulary.")
    ] = _D.spread,
    kl: Annotated[
        float, typer.Option(help="Weight of the divergence from the model's own distribution.")
    ] = _D.kl,
    held_out: Annotated[
        float, typer.Option(help="Share of the prompts kept for the report.")
    ] = _D.held_out,
    max_new_tokens: Annotated[
        int, typer.Option(help="Longest output, in tokens.")
    ] = _D.max_new_tokens,
    max_length: Annotated[
        int, typer.Option(help="Longest prompt and output together, in tokens.")
    ] = _D.max_length,
    seed: Annotated[int, typer.Option(help="Of the order and of what is held out.")] = _D.seed,
    dtype: Annotated[
        TrainingDtype, typer.Option(help="Of the base while it makes its outputs.")
    ] = _D.dtype,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from an interrupted run.")
    ] = False,
    checkpoint_every: Annotated[
        int, typer.Option(help="Optimizer steps between checkpoints.", min=1)
    ] = 200,
) -> None:
    """Train Turbo heads for the base or a LoRA, on the model's own outputs to the prompts."""
    from quickchange_training.turbo.turbo_job import TurboJob, run

    with errors_shown(), resumable(out):
        recipe = TurboRecipe(
            depth=depth,
            kind=kind,
            share=share,
            blocks=blocks,
            vocabulary=vocabulary,
            epochs=epochs,
            steps=steps,
            lr=lr,
            warmup=warmup,
            weight_decay=weight_decay,
            clip=clip,
            batch_size=batch_size,
            depth_decay=depth_decay,
            spread=spread,
            kl=kl,
            held_out=held_out,
            max_new_tokens=max_new_tokens,
            max_length=max_length,
            seed=seed,
            dtype=dtype,
        )
        source = _source_of(data, server if recorded else None)
        _check_adapter(adapter, on, store)
        read_alone = name is None and (on is not None or start is not None)
        publication = None if read_alone else publication_of(store, name)
        folder, called = base_of(model, base_name)
        job = TurboJob(
            folder,
            called,
            source,
            adapter,
            out,
            prompt_format,
            recipe,
            publication,
            resume,
            checkpoint_every,
            on,
            start,
            store,
        )
        report, added = run(job, engine_outputs())
        print_turbo_report(report, out)
        say_added(added)


def _source_of(data: Path | None, server: str | None) -> Path | RecordingServer:
    """Where the prompts come from. Raises RecipeError without one and with both."""
    if (data is None) == (server is None):
        raise RecipeError("--data: give a file of prompts, or --recorded, one of the two")
    if server is not None:
        return RecordingServer(server, os.environ.get(KEY_VARIABLE))
    assert data is not None
    return data


def _check_adapter(adapter: Path | None, on: str | None, store: str | None) -> None:
    if on is None:
        return
    if adapter is not None:
        raise RecipeError("--on: names the adapter, and --adapter is its folder; give one of them")
    if store is None:
        raise RecipeError("--on: the adapter is in a store; give --store")


def engine_outputs() -> GenerateFor:
    """Maker of outputs by the server's engine, imported only when it runs."""
    from quickchange_training.engine_outputs import generate_for

    return generate_for


def print_turbo_report(report: TurboReport, out: Path) -> None:
    """Print the report as JSON on stdout and its warnings on stderr."""
    typer.echo(json.dumps({"out": str(out), **asdict(report)}, indent=2))
    say_warnings(report.warnings)


def turbo_lora(
    data: Annotated[
        Path,
        typer.Option(help='JSONL of {"prompt", "completion"} or {"messages"}, one a line.'),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the Turbo LoRA; must not exist.")],
    model: Annotated[
        str, typer.Option(help="Base model: folder, hub id, or demo for the demo's base.")
    ] = DEMO,
    eval_data: Annotated[
        Path | None, typer.Option(help="JSONL held out of the LoRA's training, for its loss.")
    ] = None,
    base_name: Annotated[
        str | None,
        typer.Option(help="What the adapter calls its base (default: hub id or folder's name)."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Publish under this name (needs --store).")] = (
        None
    ),
    store: Annotated[str | None, typer.Option(help="Store to publish in (needs --name).")] = None,
    prompt_format: Annotated[
        PromptFormat,
        typer.Option(help="chat: through the chat template, plain: as it is, auto: chat if any."),
    ] = "auto",
    lora: Annotated[
        list[str] | None,
        typer.Option(help="KEY=VALUE of the LoRA's recipe, as `train lora` has it: rank=8."),
    ] = None,
    turbo: Annotated[
        list[str] | None,
        typer.Option(help="KEY=VALUE of the heads' recipe, as `train turbo` has it: depth=6."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from an interrupted run.")
    ] = False,
    checkpoint_every: Annotated[
        int, typer.Option(help="Optimizer steps between checkpoints.", min=1)
    ] = 200,
) -> None:
    """Train a LoRA, then Turbo heads on what it says: one Turbo LoRA."""
    from quickchange_training.turbo.turbo_lora_job import TurboLoraJob, run

    with errors_shown(), resumable(out):
        publication = publication_of(store, name)
        folder, called = base_of(model, base_name)
        job = TurboLoraJob(
            model=folder,
            base_name=called,
            data=data,
            held_out=eval_data,
            out=out,
            prompt_format=prompt_format,
            lora=changed("--lora", LoraRecipe(), lora or []),
            turbo=changed("--turbo", TurboRecipe(), turbo or []),
            publication=publication,
            resume=resume,
            checkpoint_every=checkpoint_every,
        )
        of_lora, of_heads, added = run(job, engine_outputs())
        printed = {"out": str(out), "lora": of_lora, "turbo": asdict(of_heads)}
        typer.echo(json.dumps(printed, indent=2))
        say_warnings(of_heads.warnings)
        say_added(added)
