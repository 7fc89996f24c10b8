"""`quickchange train …`: trains adapters from data, and the demo adapters again."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quickchange_training.cli_options import (
    DEMO,
    base_of,
    errors_shown,
    pairs,
    publication_of,
    resumable,
    say_added,
    say_warnings,
)
from quickchange_training.errors import OutputError, RecipeError
from quickchange_training.examples import few_examples
from quickchange_training.lora.lora_job import LoraJob, PromptFormat
from quickchange_training.lora.lora_recipe import LoraRecipe, TrainingDtype, lora_shape
from quickchange_training.turbo_cli import (
    engine_outputs,
    print_turbo_report,
    turbo,
    turbo_lora,
)

if TYPE_CHECKING:
    from quickchange_training.lora.lora_trainer import TrainingReport

app = typer.Typer(
    name="train",
    help="Train adapters.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)
app.command()(turbo)
app.command("turbo-lora")(turbo_lora)

_D = LoraRecipe()


@app.command()
def lora(
    data: Annotated[
        Path,
        typer.Option(help='JSONL of {"prompt", "completion"} or {"messages"}, one a line.'),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the PEFT adapter; must not exist.")],
    model: Annotated[
        str, typer.Option(help="Base model: folder, hub id, or demo for the demo's base.")
    ] = DEMO,
    eval_data: Annotated[
        Path | None, typer.Option(help="JSONL held out of the training, for the final loss.")
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
    rank: Annotated[int, typer.Option(help="Rank r.")] = _D.rank,
    alpha: Annotated[float, typer.Option(help="LoRA alpha; the scale is alpha / rank.")] = _D.alpha,
    targets: Annotated[
        str, typer.Option(help="Module names, comma between, or all-linear.")
    ] = ",".join(_D.targets),
    dropout: Annotated[float, typer.Option(help="Dropout before A.")] = _D.dropout,
    epochs: Annotated[int, typer.Option(help="Passes over the data.")] = _D.epochs,
    steps: Annotated[
        int | None, typer.Option(help="Optimizer steps in all, instead of --epochs.")
    ] = _D.steps,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = _D.lr,
    warmup: Annotated[float, typer.Option(help="Share of the steps with a rising rate.")] = (
        _D.warmup
    ),
    weight_decay: Annotated[float, typer.Option(help="AdamW's weight decay.")] = _D.weight_decay,
    clip: Annotated[float, typer.Option(help="Largest gradient norm.")] = _D.clip,
    batch_size: Annotated[int, typer.Option(help="Examples a step.")] = _D.batch_size,
    max_length: Annotated[int, typer.Option(help="Largest example, in tokens.")] = _D.max_length,
    seed: Annotated[int, typer.Option(help="Of initial weights and order.")] = _D.seed,
    dtype: Annotated[
        TrainingDtype, typer.Option(help="Of the frozen base while training.")
    ] = _D.dtype,
    held_out: Annotated[
        float, typer.Option(help="Share of the data kept for the loss, without --eval-data.")
    ] = _D.held_out,
    peft_option: Annotated[
        list[str] | None,
        typer.Option(help="KEY=VALUE for PEFT's LoraConfig, e.g. use_rslora=true; repeatable."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from an interrupted run.")
    ] = False,
    checkpoint_every: Annotated[
        int, typer.Option(help="Optimizer steps between checkpoints.", min=1)
    ] = 200,
) -> None:
    """Train a LoRA adapter with PEFT; the loss is on the answers alone."""
    from quickchange_training.lora.lora_job import run

    with errors_shown(), resumable(out):
        recipe = LoraRecipe(
            rank=rank,
            alpha=alpha,
            targets=tuple(t.strip() for t in targets.split(",") if t.strip()),
            dropout=dropout,
            epochs=epochs,
            steps=steps,
            lr=lr,
            warmup=warmup,
            weight_decay=weight_decay,
            clip=clip,
            batch_size=batch_size,
            max_length=max_length,
            seed=seed,
            dtype=dtype,
            held_out=held_out,
            peft_options=pairs("--peft-option", peft_option or []),
        )
        publication = publication_of(store, name)
        folder, called = base_of(model, base_name)
        job = LoraJob(
            folder,
            called,
            data,
            eval_data,
            out,
            prompt_format,
            recipe,
            publication,
            resume,
            checkpoint_every,
        )
        report, added = run(job)
        _print_report(report, out)
        say_warnings([*few_examples(report.examples), *lora_shape(recipe)])
        say_added(added)


@app.command()
def demo(
    name: Annotated[
        str, typer.Argument(help="order-json, sql or docstring; with -heads, or base-heads.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the adapter; must not exist.")],
    steps: Annotated[
        int | None, typer.Option(help="Stop after so many steps (for a quick try).")
    ] = None,
) -> None:
    """Train a demo adapter again: its task's data, its recorded recipe."""
    from quickchange_training.demo.demo_adapters import DEMO_RECIPES, train_demo
    from quickchange_training.demo.demo_heads import DEMO_HEADS_RECIPES, train_demo_heads

    with errors_shown():
        if name in DEMO_HEADS_RECIPES:
            heads = DEMO_HEADS_RECIPES[name]
            if steps is not None:
                heads = replace(heads, turbo=replace(heads.turbo, steps=steps))
            print_turbo_report(train_demo_heads(name, heads, out, engine_outputs()), out)
        elif name in DEMO_RECIPES:
            recipe = DEMO_RECIPES[name]
            if steps is not None:
                recipe = replace(recipe, lora=replace(recipe.lora, steps=steps))
            _print_report(train_demo(name, recipe, out), out)
        else:
            known = ", ".join([*DEMO_RECIPES, *DEMO_HEADS_RECIPES])
            raise RecipeError(f"no demo adapter is called {name!r}; choose {known}")


@app.command("demo-data")
def demo_data(
    task: Annotated[str, typer.Argument(help="order-json, sql or docstring.")],
    out: Annotated[Path, typer.Option(help="JSONL file to write; must not exist.")],
    count: Annotated[int, typer.Option(help="Examples.", min=1)] = 1000,
    split: Annotated[str, typer.Option(help="train, or held-out: other words in it.")] = "train",
    seed: Annotated[int, typer.Option(help="Of the examples.")] = 0,
) -> None:
    """Write examples of a demo task, to train or to evaluate with."""
    from quickchange_training.demo.tasks import TASKS

    with errors_shown():
        if task not in TASKS:
            raise RecipeError(f"no demo task is called {task!r}; choose {', '.join(TASKS)}")
        if split not in ("train", "held-out"):
            raise RecipeError(f"--split is train or held-out, not {split!r}")
        examples = TASKS[task].examples("train" if split == "train" else "held-out", count, seed)
        lines = [json.dumps({"prompt": e.prompt, "completion": e.completion}) for e in examples]
        try:
            with out.open("x") as file:
                file.write("\n".join(lines) + "\n")
        except FileExistsError as error:
            raise OutputError(f"{out} is there already; give another file or remove it") from error
    typer.echo(f"{len(lines)} examples in {out}")


@app.command("eval-demo")
def eval_demo(
    tasks: Annotated[
        list[str] | None, typer.Argument(help="Tasks to score (default: all three).")
    ] = None,
    count: Annotated[int, typer.Option(help="Held-out examples a task.", min=1)] = 100,
    seed: Annotated[int, typer.Option(help="Of the held-out examples.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Prompts answered together.", min=1)] = 25,
    answers: Annotated[
        Path | None, typer.Option(help="Write prompts and answers to this JSONL file.")
    ] = None,
) -> None:
    """Print held-out scores of the demo adapters beside the base's, as a Markdown table."""
    from quickchange_training.demo import DEMO_ADAPTERS
    from quickchange_training.demo.demo_evaluation import as_table, compare
    from quickchange_training.demo.tasks import TASKS

    with errors_shown():
        chosen = tasks or list(TASKS)
        for task in chosen:
            if task not in TASKS:
                raise RecipeError(f"no demo task is called {task!r}; choose {', '.join(TASKS)}")
        found = [
            compare(TASKS[task], DEMO_ADAPTERS[task].path, count, seed, batch_size)
            for task in chosen
        ]
        if answers is not None:
            lines = [json.dumps(answer) for c in found for answer in c.answers()]
            answers.write_text("\n".join(lines) + "\n")
        typer.echo(as_table(found))


def _print_report(report: TrainingReport, out: Path) -> None:
    printed: dict[str, Any] = {"out": str(out), **asdict(report)}
    typer.echo(json.dumps(printed, indent=2))
