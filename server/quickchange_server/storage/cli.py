"""The command `quickchange database`."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from typing import Annotated

import typer

from quickchange_server.errors import QuickchangeError
from quickchange_server.storage import maintenance

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None)


@app.callback()
def root() -> None:
    """Experiments, keys and usage: what the server keeps in a database."""


@app.command()
def move(
    source: Annotated[str, typer.Argument(help="the database's URL, sqlite:///FILE")],
    target: Annotated[str, typer.Argument(help="the URL of an empty one, postgresql+psycopg://…")],
) -> None:
    """Copy all that a database keeps into an empty one. Stop the servers first."""
    try:
        maintenance.move(source, target, lambda table, rows: typer.echo(f"{table}: {rows} rows"))
    except QuickchangeError as error:
        sys.exit(f"quickchange: {error}")


@app.command()
def prune(
    url: Annotated[str, typer.Argument(help="the database's URL")],
    before: Annotated[
        datetime,
        typer.Option("--before", formats=["%Y-%m-%d"], help="the first day, in UTC, that stays"),
    ],
) -> None:
    """Delete the usage of the days before one. Servers may run."""
    first = before.replace(tzinfo=UTC)
    if first > datetime.now(UTC):
        raise typer.BadParameter(
            "is in the future; give a day that has begun", param_hint="--before"
        )
    try:
        typer.echo(f"usage: {maintenance.prune_usage(url, int(first.timestamp()))} rows deleted")
    except QuickchangeError as error:
        sys.exit(f"quickchange: {error}")
