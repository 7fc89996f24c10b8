"""Recipes from `key=value` options, checked against the recipe's own fields."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, TypeVar

from quickchange_store.training.errors import RecipeError
from quickchange_store.training.recipe import LoraRecipe
from quickchange_store.training.turbo_recipe import TurboRecipe

Recipe = TypeVar("Recipe", LoraRecipe, TurboRecipe)


def pairs(option: str, given: Sequence[str]) -> dict[str, Any]:
    """`key=value` texts; a value is JSON where it reads as such, else text.

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
    """`recipe` with the fields that are given. Raises RecipeError, naming option and key."""
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
