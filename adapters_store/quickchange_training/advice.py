"""Best practice: what a training's owner should hear, though nothing is refused.

Each check gives sentences; none where all is well.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quickchange_training.lora.lora_recipe import LoraRecipe
    from quickchange_training.turbo.turbo_data import Output, Prompt

FEW_EXAMPLES = 2000
SHORT_OUTPUT = 10  # tokens
_OWN_SHARE = 0.5  # of the completions, given by the data, that the model says itself
_RANKS = (4, 128)
_SCALES = (0.25, 8.0)


def few_examples(count: int) -> list[str]:
    """Of any training."""
    if count >= FEW_EXAMPLES:
        return []
    return [
        f"{count} examples: with fewer than {FEW_EXAMPLES} an adapter tends to learn them by "
        "heart; compare its held-out loss with its training loss, and gather more if they differ"
    ]


def short_outputs(lengths: Sequence[int]) -> list[str]:
    """Of Turbo heads: drafts save steps only where there are steps to save."""
    if not lengths or mean(lengths) >= SHORT_OUTPUT:
        return []
    return [
        f"outputs have {mean(lengths):.1f} tokens on average: under {SHORT_OUTPUT} a request is "
        "mostly its prompt, and drafting can save little"
    ]


def not_its_own(
    prompts: Sequence[Prompt], outputs: Sequence[Output], stop: frozenset[int]
) -> list[str]:
    """Of Turbo heads: completions in the data that the model would not give."""
    given = [
        (prompt.completion, tuple(t for t in output.tokens if t not in stop))
        for prompt, output in zip(prompts, outputs, strict=True)
        if prompt.completion
    ]
    own = sum(completion == said for completion, said in given)
    if not given or own >= _OWN_SHARE * len(given):
        return []
    return [
        f"{len(given) - own} of {len(given)} completions in the data are not what the model says: "
        "heads learn from its own outputs instead; if the data is what it should say, train a "
        "LoRA on it first (quickchange train turbo-lora)"
    ]


def lora_shape(recipe: LoraRecipe) -> list[str]:
    """Of a LoRA: rank, scale or targets that look off."""
    said = []
    low, high = _RANKS
    if not low <= recipe.rank <= high:
        said.append(
            f"rank {recipe.rank} is unusual: ranks of 8 to 64 do for most tasks, and every rank "
            "costs memory and time in each step"
        )
    scale = recipe.alpha / recipe.rank
    if not _SCALES[0] <= scale <= _SCALES[1]:
        said.append(f"alpha / rank is {scale:g}: 1 to 2 is usual, with --lr to tune the rest")
    attention = ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "query_key_value", "c_attn")
    named = any(target.endswith(attention) for target in recipe.targets)
    if recipe.targets != ("all-linear",) and not named:
        said.append(
            f"targets {','.join(recipe.targets)} leave the attention out: begin with its "
            "projections, then add the MLP's"
        )
    return said
