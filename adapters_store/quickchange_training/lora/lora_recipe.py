"""Recipe of a LoRA adapter: every choice that its training depends on besides the data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from quickchange_training.errors import RecipeError

TrainingDtype = Literal["float32", "bfloat16"]

ATTENTION = ("k_proj", "o_proj", "q_proj", "v_proj")


@dataclass(frozen=True)
class LoraRecipe:
    """Hyperparameters of a LoRA training.

    targets: module names, or ("all-linear",). steps: optimizer steps in all, None: one pass for
    each of `epochs`. dtype: that of the frozen base; A and B are trained in float32. peft_options:
    further fields of PEFT's LoraConfig. Raises RecipeError, naming the option.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = ATTENTION
    dropout: float = 0.0
    epochs: int = 1
    steps: int | None = None
    lr: float = 1e-3
    warmup: float = 0.1  # share of the steps
    weight_decay: float = 0.0
    clip: float = 1.0  # largest gradient norm
    batch_size: int = 8
    max_length: int = 512  # tokens, prompt and answer together
    seed: int = 0
    dtype: TrainingDtype = "float32"
    held_out: float = 0.05  # share of the examples, where none are held out by the caller
    peft_options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        positive = ("rank", "alpha", "epochs", "lr", "clip", "batch_size", "max_length")
        for name in positive:
            if not getattr(self, name) > 0:
                raise RecipeError(f"--{name.replace('_', '-')} must be more than 0")
        if self.steps is not None and self.steps < 1:
            raise RecipeError("--steps must be at least 1")
        if not self.targets:
            raise RecipeError("--targets names no module; give module names or all-linear")
        for name in ("dropout", "warmup", "held_out"):
            if not 0 <= getattr(self, name) < 1:
                raise RecipeError(f"--{name.replace('_', '-')} must be at least 0 and less than 1")
        if self.weight_decay < 0:
            raise RecipeError("--weight-decay must not be negative")

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain data for JSON."""
        own = {"targets": list(self.targets), "peft_options": dict(self.peft_options)}
        return asdict(self) | own


_RANKS = (4, 128)
_SCALES = (0.25, 8.0)


def lora_shape(recipe: LoraRecipe) -> list[str]:
    """Warnings about a LoRA's rank, scale or targets that look off."""
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
