"""The command `quickchange`: serve, adapters, keys, database, train, eval, bench.

A command's modules are imported only when it runs, so that `quickchange --help` is quick.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="quickchange",
    help="Multi-adapter inference server: one frozen base model, thousands of small adapters.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

SUB_APPS = {
    "adapters": ("quickchange_store.cli", "Add, list, alias, verify and remove adapters."),
    "keys": ("quickchange_server.tenants.cli", "Create, list, rotate and revoke API keys."),
    "database": ("quickchange_server.storage.cli", "Move what the server keeps elsewhere."),
    "train": ("quickchange_training.cli", "Train adapters."),
    "eval": ("quickchange_training.evaluation.cli", "Compare adapters on a task of your own."),
    "bench": ("quickchange_bench.cli", "Measure servers and kernels."),
}


def serve_command() -> Callable[..., None]:
    """The function `serve`, with an option for every field of `Settings`."""
    from quickchange_server.config import Settings

    def serve(**given: Any) -> None:
        """Serve the base model and the store's adapters over HTTP.

        Every option can be given in the environment as well: QUICKCHANGE_MODEL, QUICKCHANGE_PORT,
        and so on; an option wins over the environment.
        """
        from quickchange_server.entrypoints.serve import serve as launch

        demo = bool(given.pop("demo"))
        launch({name: value for name, value in given.items() if value is not None}, demo=demo)

    parameters = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[_option_type(field.annotation), _option(name, field)],
        )
        for name, field in Settings.model_fields.items()
    ]
    demo_help = "serve the demo model and its adapters, fetched and made ready once"
    parameters.append(
        inspect.Parameter(
            "demo",
            inspect.Parameter.KEYWORD_ONLY,
            default=False,
            annotation=Annotated[bool, typer.Option("--demo", help=demo_help)],
        )
    )
    serve.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    serve.__annotations__ = {p.name: p.annotation for p in parameters}
    return serve


def _option_type(annotation: Any) -> Any:
    """The type that typer parses; pydantic checks the value again, with the setting's bounds."""
    for known in (bool, int, float):
        if annotation is known or annotation == known | None:
            return known | None
    return str | None


def _option(name: str, field: Any) -> Any:
    flag = "--" + name.replace("_", "-")
    if field.annotation in (bool, bool | None):
        flag = f"{flag}/--no-{flag.removeprefix('--')}"
    default = "" if field.is_required() or field.default is None else f" (default {field.default})"
    return typer.Option(flag, help=_help(field) + default, show_default=False)


def _help(field: Any) -> str:
    choices = (
        getattr(field.annotation, "__args__", ()) if "Literal" in str(field.annotation) else ()
    )
    described = field.description or ""
    listed = " | ".join(str(choice) for choice in choices)
    return "; ".join(part for part in (described, listed) if part)


def forward(name: str, module: str, summary: str) -> None:
    """Register `quickchange NAME …`, which runs the typer application of `module`."""

    @app.command(
        name,
        help=summary,
        add_help_option=False,  # the sub-application has its own
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    )
    def run(context: typer.Context) -> None:
        sub_app = importlib.import_module(module).app
        sub_app(args=context.args, prog_name=f"quickchange {name}")


app.command("serve")(serve_command())
for _name, (_module, _summary) in SUB_APPS.items():
    forward(_name, _module, _summary)


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        from importlib.metadata import version as version_of

        typer.echo(f"quickchange {version_of('quickchange')}")
        raise typer.Exit


def main() -> None:
    """Entry point of the console script."""
    app(args=sys.argv[1:], prog_name="quickchange")
