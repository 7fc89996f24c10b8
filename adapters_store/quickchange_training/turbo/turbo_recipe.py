"""Recipe of Turbo heads: every choice that their training depends on besides the prompts."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from quickchange_training.adapters.adapter_recipes import TrainingDtype
from quickchange_training.errors import RecipeError

HeadKind = Literal["sequential", "parallel"]
Sharing = Literal["all", "rest", "none"]


@dataclass(frozen=True)
class TurboRecipe:
    """Hyperparameters of a heads training.

    share: "all" heads have the same blocks, "none" do, or all but the first ("rest"). vocabulary:
    how many of the most frequent tokens of the outputs are drafted, 0: every token of the base's.
    spread: weight of the loss that makes heads unsure where the next token is not in the
    vocabulary. kl: weight of the divergence from the model's own distribution over the vocabulary.
    dtype: that of the frozen base while it makes outputs. Raises RecipeError, naming the option.
    """

    depth: int = 12
    kind: HeadKind = "sequential"
    share: Sharing = "all"
    blocks: int = 1  # per head
    vocabulary: int = 1024
    epochs: int = 6
    steps: int | None = None  # optimizer steps in all, instead of epochs
    lr: float = 2e-3
    warmup: float = 0.05  # share of the steps
    weight_decay: float = 0.0
    clip: float = 1.0  # largest gradient norm
    batch_size: int = 512  # positions per step
    depth_decay: float = 0.9  # weight of a head's loss against that of the head before it
    spread: float = 0.3
    kl: float = 0.0
    held_out: float = 0.05  # share of the prompts, for the report
    max_new_tokens: int = 160  # limit of an output
    max_length: int = 1024  # tokens, prompt and output together
    seed: int = 0
    dtype: TrainingDtype = "bfloat16"

    def __post_init__(self) -> None:
        positive = ("depth", "blocks", "epochs", "lr", "clip", "batch_size", "depth_decay")
        for name in (*positive, "max_new_tokens", "max_length"):
            if not getattr(self, name) > 0:
                raise RecipeError(f"--{name.replace('_', '-')} must be more than 0")
        if self.steps is not None and self.steps < 1:
            raise RecipeError("--steps must be at least 1")
        for name in ("vocabulary", "weight_decay", "spread", "kl"):
            if getattr(self, name) < 0:
                raise RecipeError(f"--{name.replace('_', '-')} must not be negative")
        for name in ("warmup", "held_out"):
            if not 0 <= getattr(self, name) < 1:
                raise RecipeError(f"--{name.replace('_', '-')} must be at least 0 and less than 1")
        if self.kind == "parallel" and self.share != "none":
            raise RecipeError(
                f"--share {self.share}: parallel heads that share blocks would draft the same "
                "token at every depth; give --share none"
            )

    @property
    def heads(self) -> tuple[tuple[int, ...], ...]:
        """The blocks of each head, as `TurboHeads` numbers them."""
        sets = {"all": [0] * self.depth, "rest": [0] + [1] * (self.depth - 1)}
        chosen = sets.get(self.share, list(range(self.depth)))
        return tuple(tuple(range(s * self.blocks, (s + 1) * self.blocks)) for s in chosen)

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain data for JSON."""
        return asdict(self)
