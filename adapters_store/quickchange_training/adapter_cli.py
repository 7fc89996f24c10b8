"""`quickchange train KIND` for every kind of adapter: its recipe's fields are its options."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import MISSING, Field, asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quickchange_training.adapters.adapter_job import AdapterJob, PromptFormat
from quickchange_training.adapters.adapter_recipes import (
    AdapterRecipe,
    BottleneckActivation,
    Placement,
    TrainingDtype,
    unusual_choices,
)
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
from quickchange_training.examples import few_examples

if TYPE_CHECKING:
    from quickchange_training.adapters.adapter_trainer import TrainingReport

HELP = {
    "lora": "Train a LoRA adapter with PEFT; the loss is on the answers alone.",
    "dora": "Train a DoRA with PEFT: a LoRA with a norm for each output.",
    "alora": "Train an activated LoRA with PEFT: it acts from its invocation on.",
    "ia3": "Train an IA3 with PEFT: a factor for each output, or input of an MLP's end.",
    "bottleneck": "Train bottlenecks as AdapterHub has them: Houlsby, Pfeiffer or parallel.",
    "peft": "Train another of PEFT's types that is served exactly, by its name.",
}
_OPTIONS: dict[str, Any] = {
    "rank": Annotated[int, typer.Option(help="Rank r.")],
    "alpha": Annotated[float, typer.Option(help="LoRA alpha; the scale is alpha / rank.")],
    "dropout": Annotated[float, typer.Option(help="Dropout before A.")],
    "invocation": Annotated[
        str,
        typer.Option(
            help="Text from which on the adapter acts, or its token ids: [1, 2]. Every prompt "
            "must contain it."
        ),
    ],
    "type": Annotated[str, typer.Option(help="PEFT's name of the type, e.g. VERA.")],
    "placement": Annotated[
        Placement,
        typer.Option(
            help="houlsby: behind attention and MLP; pfeiffer: on the stream behind the MLP; "
            "parallel: beside the MLP."
        ),
    ],
    "reduction_factor": Annotated[
        float, typer.Option(help="The model's width over the bottleneck's.")
    ],
    "activation": Annotated[BottleneckActivation, typer.Option(help="Between down and up.")],
    "targets": Annotated[str, typer.Option(help="Module names, comma between, or all-linear.")],
    "epochs": Annotated[int, typer.Option(help="Passes over the data.")],
    "steps": Annotated[
        int | None, typer.Option(help="Optimizer steps in all, instead of --epochs.")
    ],
    "lr": Annotated[float, typer.Option(help="Peak learning rate.")],
    "warmup": Annotated[float, typer.Option(help="Share of the steps with a rising rate.")],
    "weight_decay": Annotated[float, typer.Option(help="AdamW's weight decay.")],
    "clip": Annotated[float, typer.Option(help="Largest gradient norm.")],
    "batch_size": Annotated[int, typer.Option(help="Examples a step.")],
    "max_length": Annotated[int, typer.Option(help="Largest example, in tokens.")],
    "seed": Annotated[int, typer.Option(help="Of initial weights and order.")],
    "dtype": Annotated[TrainingDtype, typer.Option(help="Of the frozen base while training.")],
    "held_out": Annotated[
        float, typer.Option(help="Share of the data kept for the loss, without --eval-data.")
    ],
    "peft_options": Annotated[
        list[str] | None,
        typer.Option(
            "--peft-option",
            help="KEY=VALUE for PEFT's configuration, e.g. use_rslora=true; repeatable.",
        ),
    ],
}


def training_command(kind: type[AdapterRecipe]) -> Callable[..., None]:
    """The command that trains adapters of a kind; an option for each field of its recipe."""

    def train(
        data: Annotated[
            Path,
            typer.Option(help='JSONL of {"prompt", "completion"} or {"messages"}, one a line.'),
        ],
        out: Annotated[Path, typer.Option(help="Folder for the adapter; must not exist.")],
        model: Annotated[
            str, typer.Option(help="Base model: folder, hub id, or demo for the demo's base.")
        ] = DEMO,
        eval_data: Annotated[
            Path | None, typer.Option(help="JSONL held out of the training, for the final loss.")
        ] = None,
        base_name: Annotated[
            str | None,
            typer.Option(
                help="What the adapter calls its base (default: hub id or folder's name)."
            ),
        ] = None,
        name: Annotated[
            str | None, typer.Option(help="Publish under this name (needs --store).")
        ] = None,
        store: Annotated[
            str | None, typer.Option(help="Store to publish in (needs --name).")
        ] = None,
        prompt_format: Annotated[
            PromptFormat,
            typer.Option(
                help="chat: through the chat template, plain: as it is, auto: chat if any."
            ),
        ] = "auto",
        resume: Annotated[
            bool, typer.Option("--resume", help="Go on from an interrupted run.")
        ] = False,
        checkpoint_every: Annotated[
            int, typer.Option(help="Optimizer steps between checkpoints.", min=1)
        ] = 200,
        **given: Any,
    ) -> None:
        from quickchange_training.adapters.adapter_job import run

        with errors_shown(), resumable(out):
            recipe = kind(**{name: _value(name, value) for name, value in given.items()})
            publication = publication_of(store, name)
            folder, called = base_of(model, base_name)
            job = AdapterJob(
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
            print_training_report(report, out)
            say_warnings([*few_examples(report.examples), *unusual_choices(recipe)])
            say_added(added)

    known = {field.name: field for field in fields(kind)}
    signature = inspect.signature(train, eval_str=True)
    common = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    train.__dict__["__signature__"] = inspect.Signature(
        [p.replace(kind=p.KEYWORD_ONLY) for p in common]
        + [_parameter(known[name]) for name in _OPTIONS if name in known]
    )
    return train


def _parameter(field: Field[Any]) -> inspect.Parameter:
    """The option of a recipe's field, with the field's default."""
    default = field.default
    if field.name == "peft_options":
        default = None
    elif default is MISSING:
        default = inspect.Parameter.empty
    elif isinstance(default, tuple):
        default = ",".join(default)
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=_OPTIONS[field.name],
    )


def _value(name: str, given: Any) -> Any:
    """A field's value from its option's. Raises RecipeError, naming the option."""
    if name == "targets":
        return tuple(part.strip() for part in given.split(",") if part.strip())
    if name == "peft_options":
        return pairs("--peft-option", given or [])
    if name == "invocation":
        return _invocation(given)
    return given


def _invocation(text: str) -> str | tuple[int, ...]:
    """Token ids where `text` is a JSON list of them, else the text."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        return text
    ids = isinstance(found, list) and all(type(each) is int for each in found)
    return tuple(found) if ids else text


def print_training_report(report: TrainingReport, out: Path) -> None:
    """Print the report as JSON."""
    typer.echo(json.dumps({"out": str(out), **asdict(report)}, indent=2))
