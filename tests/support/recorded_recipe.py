"""A LoRA recipe read back from the JSON that a training records."""

from __future__ import annotations

from typing import Any

from quickchange_training.adapters.adapter_recipes import LoraRecipe


def recorded_recipe(values: dict[str, Any]) -> LoraRecipe:
    return LoraRecipe(**(values | {"targets": tuple(values["targets"])}))
