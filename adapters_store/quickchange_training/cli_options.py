"""Options common to the training commands: base, publication, recipe fields, errors, warnings."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import typer

from quickchange_store.base_model.base_source import base_name
from quickchange_store.hub_access import look_for_hub
from quickchange_training.adapters.adapter_job import Publication, work_folder
from quickchange_training.adapters.adapter_recipes import LoraRecipe
from quickchange_training.errors import RecipeError, TrainingError
from quickchange_training.turbo.turbo_recipe import TurboRecipe

if TYPE_CHECKING:
    from quickchange_store.importing import Added

DEMO = "demo"


def base_of(model: str, name: str | None) -> tuple[str, str]:
    """The model's folder or hub id, and the name that the adapter gives it."""
    from quickchange_training.demo.demo_base import BASE_MODEL_ID, ensure_demo_base

    if model == DEMO:
        return str(ensure_demo_base()), name or BASE_MODEL_ID
    look_for_hub(model)
    return model, name or base_name(model)


def publication_of(store: str | None, name: str | None) -> Publication | None:
    """Where to publish; None without store and name. Raises RecipeError where one is missing."""
    if store is None and name is None:
        return None
    if store is None or name is None:
        lacking = "--store" if store is None else "--name"
        raise RecipeError(f"{lacking} is missing: publishing needs both --store and --name")
    return Publication(store, name)


def say_added(added: Added | None) -> None:
    """Print the published version, and its warnings on stderr."""
    if added is not None:
        say_warnings(added.warnings)
        typer.echo(f"published {added.version}  {added.version.digest}")


def say_warnings(warnings: Sequence[str]) -> None:
    """Print warnings on stderr, one a line."""
    for warning in warnings:
        typer.echo(f"warning: {warning}", err=True)


@contextmanager
def errors_shown() -> Iterator[None]:
    """Turn errors that name their remedy into one line on stderr and exit status 1."""
    from quickchange_store.errors import StoreError
    from quickchange_training.demo.demo_base import DemoBaseError

    try:
        yield
    except (TrainingError, StoreError, DemoBaseError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error


@contextmanager
def resumable(out: Path) -> Iterator[None]:
    """Where the run for `out` is interrupted, say what goes on with it, or that nothing is kept."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        given = sys.argv[1:] if "--resume" in sys.argv else [*sys.argv[1:], "--resume"]
        command = shlex.join(["quickchange", *given])
        kept = f"{work_folder(out)} keeps what is done; go on with: {command}"
        said = kept if work_folder(out).exists() else "nothing was done yet"
        typer.echo(f"interrupted: {said}", err=True)
        raise


Recipe = TypeVar("Recipe", LoraRecipe, TurboRecipe)


def pairs(option: str, given: Sequence[str]) -> dict[str, Any]:
    """Parse `key=value` texts; a value is JSON where it reads as such, else text.

    Raises RecipeError, naming the option, for a text without "=" and a key given twice.
    """
    found: dict[str, Any] = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise RecipeError(f"{option} {text!r}: write it as KEY=VALUE")
        if key in found:
            raise RecipeError(f"{option} {key} is given twice")
        try:
            found[key] = json.loads(value)
        except json.JSONDecodeError:
            found[key] = value
    return found


def changed(option: str, recipe: Recipe, given: Sequence[str]) -> Recipe:
    """Copy of `recipe` with the given fields. Raises RecipeError, naming option and key."""
    values = pairs(option, given)
    known = {field.name for field in fields(recipe)}
    kinds = recipe.as_dict()
    for key, value in values.items():
        if key not in known:
            raise RecipeError(f"{option} {key}: not known; choose from {', '.join(sorted(known))}")
        wanted = kinds[key]
        if key == "targets" and isinstance(value, str):
            values[key] = tuple(target.strip() for target in value.split(","))
        elif isinstance(wanted, float) and type(value) is int:
            values[key] = float(value)
        elif wanted is not None and type(value) is not type(wanted):
            raise RecipeError(f"{option} {key}={value!r}: {type(wanted).__name__} is expected")
    return type(recipe)(**(vars(recipe) | values))
