"""`quickchange train …`: trains adapters from data, and the demo adapters again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from quickchange_training.adapter_cli import HELP, print_training_report, training_command
from quickchange_training.adapters.adapter_recipes import KINDS
from quickchange_training.cli_options import errors_shown
from quickchange_training.errors import OutputError, RecipeError
from quickchange_training.turbo_cli import (
    engine_outputs,
    print_turbo_report,
    turbo,
    turbo_lora,
)

app = typer.Typer(
    name="train",
    help="Train adapters.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)
app.command()(turbo)
app.command("turbo-lora")(turbo_lora)

for kind in KINDS:
    app.command(kind.kind, help=HELP[kind.kind])(training_command(kind))


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
            print_training_report(train_demo(name, recipe, out), out)
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
