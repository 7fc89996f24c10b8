"""What the training commands share: the base, the publication, errors and warnings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from quickchange_store.training.errors import RecipeError, TrainingError
from quickchange_store.training.job import Publication

if TYPE_CHECKING:
    from quickchange_store.importing import Added

DEMO = "demo"


def base_of(model: str, base_name: str | None) -> tuple[str, str]:
    """The model's folder or hub id, and the name that the adapter gives it."""
    from quickchange_store.demo.base import BASE_MODEL_ID, ensure_demo_base

    if model == DEMO:
        return str(ensure_demo_base()), base_name or BASE_MODEL_ID
    folder = Path(model)
    return model, base_name or (folder.resolve().name if folder.is_dir() else model)


def publication_of(store: Path | None, name: str | None) -> Publication | None:
    """None where neither is given. Raises RecipeError where one is missing."""
    if store is None and name is None:
        return None
    if store is None or name is None:
        lacking = "--store" if store is None else "--name"
        raise RecipeError(f"{lacking} is missing: publishing needs both --store and --name")
    return Publication(store, name)


def say_added(added: Added | None) -> None:
    """What was published, and what its owner should know."""
    if added is not None:
        say_warnings(added.warnings)
        typer.echo(f"published {added.version}  {added.version.digest}")


def say_warnings(warnings: Sequence[str]) -> None:
    """On stderr, one a line."""
    for warning in warnings:
        typer.echo(f"warning: {warning}", err=True)


@contextmanager
def errors_shown() -> Iterator[None]:
    """Errors that name their remedy end the command with their message alone."""
    from quickchange_store.demo.base import DemoBaseError
    from quickchange_store.errors import StoreError

    try:
        yield
    except (TrainingError, StoreError, DemoBaseError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
