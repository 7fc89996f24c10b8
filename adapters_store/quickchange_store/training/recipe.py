"""The recipe of a LoRA adapter: every choice that its training depends on besides the data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from quickchange_store.training.errors import RecipeError

TrainingDtype = Literal["float32", "bfloat16"]

ATTENTION = ("k_proj", "o_proj", "q_proj", "v_proj")


@dataclass(frozen=True)
class LoraRecipe:
    """Raises RecipeError, naming the option, for a value that can't be trained with.

    targets: module names, or ("all-linear",). steps: optimizer steps in all, None: one pass for
    each of `epochs`. dtype: of the frozen base; A and B are trained in float32 whatever it is.
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

    def __post_init__(self) -> None:
        positive = ("rank", "alpha", "epochs", "lr", "clip", "batch_size", "max_length")
        for name in positive:
            if not getattr(self, name) > 0:
                raise RecipeError(f"--{name.replace('_', '-')} must be more than 0")
        if self.steps is not None and self.steps < 1:
            raise RecipeError("--steps must be at least 1")
        if not self.targets:
            raise RecipeError("--targets names no module; give module names or all-linear")
        for name in ("dropout", "warmup"):
            if not 0 <= getattr(self, name) < 1:
                raise RecipeError(f"--{name} must be at least 0 and less than 1")
        if self.weight_decay < 0:
            raise RecipeError("--weight-decay must not be negative")

    def as_dict(self) -> dict[str, Any]:
        """For JSON; `from_dict` reads it back."""
        return asdict(self) | {"targets": list(self.targets)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LoraRecipe:
        return cls(**(values | {"targets": tuple(values["targets"])}))
