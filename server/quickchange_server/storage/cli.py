"""The command `quickchange database`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from quickchange_server.errors import QuickchangeError
from quickchange_server.storage import moving

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


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
        moving.move(source, target, lambda table, rows: typer.echo(f"{table}: {rows} rows"))
    except QuickchangeError as error:
        sys.exit(f"quickchange: {error}")
