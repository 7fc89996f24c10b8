"""The warnings of a training: said where something looks off, and only there."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from quickchange_training.adapters.adapter_recipes import LoraRecipe, unusual_choices
from quickchange_training.examples import few_examples
from quickchange_training.turbo.turbo_data import OwnOutput, Prompt, not_its_own, short_outputs

EOS = 0


def pair(given: Sequence[int], said: Sequence[int]) -> tuple[Prompt, OwnOutput]:
    return Prompt((1,), tuple(given), "line"), OwnOutput(tuple(said), torch.empty(0))


def test_few_examples_are_told_of() -> None:
    assert "1999 examples" in few_examples(1999)[0]
    assert few_examples(2000) == []


def test_short_outputs_are_told_of_by_their_mean() -> None:
    assert "9.5 tokens" in short_outputs([9, 10])[0]
    assert short_outputs([1, 19]) == []


def test_completions_that_the_model_would_not_give_are_counted() -> None:
    pairs = [pair([2, 3], [2, 3, EOS]), pair([2, 4], [2, 3, EOS]), pair([5], [6, EOS])]
    prompts, outputs = zip(*pairs, strict=True)
    said = not_its_own(prompts, outputs, frozenset({EOS}))
    assert said[0].startswith("2 of 3 completions in the data are not what the model says")


def test_the_models_own_completions_and_missing_ones_are_no_matter() -> None:
    pairs = [pair([2, 3], [2, 3, EOS]), pair([], [7, EOS])]
    prompts, outputs = zip(*pairs, strict=True)
    assert not_its_own(prompts, outputs, frozenset({EOS})) == []


@pytest.mark.parametrize(
    ("recipe", "begins"),
    [
        (LoraRecipe(rank=256, alpha=512), "rank 256 is unusual"),
        (LoraRecipe(rank=2, alpha=2), "rank 2 is unusual"),
        (LoraRecipe(rank=16, alpha=320), "alpha / rank is 20"),
        (LoraRecipe(targets=("up_proj", "down_proj")), "targets up_proj,down_proj leave the"),
    ],
)
def test_a_lora_that_looks_off_is_told_of(recipe: LoraRecipe, begins: str) -> None:
    said = unusual_choices(recipe)
    assert len(said) == 1
    assert said[0].startswith(begins)


@pytest.mark.parametrize("targets", [("all-linear",), ("q_proj", "v_proj"), ("c_attn",)])
def test_a_usual_lora_is_not(targets: tuple[str, ...]) -> None:
    assert unusual_choices(LoraRecipe(targets=targets)) == []
