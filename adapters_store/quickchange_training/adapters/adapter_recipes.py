"""Recipes of adapters by kind: every choice that a training depends on besides the data."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal

from quickchange_training.errors import RecipeError

TrainingDtype = Literal["float32", "bfloat16"]
Placement = Literal["houlsby", "pfeiffer", "parallel"]
BottleneckActivation = Literal["relu", "swish", "gelu", "gelu_new", "tanh"]

ATTENTION = ("k_proj", "o_proj", "q_proj", "v_proj")
_ALL_LINEAR = ("all-linear",)
_FEEDFORWARD = "down_proj"


@dataclass(frozen=True, kw_only=True)
class TrainingRecipe:
    """Hyperparameters that all kinds of adapters have.

    steps: optimizer steps in all, None: one pass for each of `epochs`. dtype: that of the frozen
    base; what is trained is float32. Raises RecipeError, naming the option.
    """

    kind: ClassVar[str]  # as in `quickchange train KIND`
    positive: ClassVar[tuple[str, ...]] = ("epochs", "lr", "clip", "batch_size", "max_length")
    shares: ClassVar[tuple[str, ...]] = ("warmup", "held_out")

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

    def __post_init__(self) -> None:
        for name in self.positive:
            if not getattr(self, name) > 0:
                raise RecipeError(f"--{name.replace('_', '-')} must be more than 0")
        if self.steps is not None and self.steps < 1:
            raise RecipeError("--steps must be at least 1")
        for name in self.shares:
            if not 0 <= getattr(self, name) < 1:
                raise RecipeError(f"--{name.replace('_', '-')} must be at least 0 and less than 1")
        if self.weight_decay < 0:
            raise RecipeError("--weight-decay must not be negative")

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain data for JSON."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


@dataclass(frozen=True, kw_only=True)
class PeftRecipe(TrainingRecipe, ABC):
    """Hyperparameters of what PEFT trains.

    targets: module names, or ("all-linear",). peft_options: further fields of PEFT's configuration.
    """

    targets: tuple[str, ...] = ATTENTION
    peft_options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.targets:
            raise RecipeError("--targets names no module; give module names or all-linear")

    @property
    @abstractmethod
    def peft_type(self) -> str:
        """PEFT's name of the type."""

    def own_fields(self) -> dict[str, Any]:
        """Fields of PEFT's configuration that the recipe's other options set."""
        targets = "all-linear" if self.targets == _ALL_LINEAR else list(self.targets)
        return {"task_type": "CAUSAL_LM", "target_modules": targets}

    def usual_fields(self) -> dict[str, Any]:
        """Fields of PEFT's configuration that are so unless `peft_options` say otherwise."""
        return {}


@dataclass(frozen=True, kw_only=True)
class LoraRecipe(PeftRecipe):
    """Hyperparameters of a LoRA: A and B are trained, and added times alpha / rank."""

    kind: ClassVar[str] = "lora"
    positive: ClassVar[tuple[str, ...]] = ("rank", "alpha", *TrainingRecipe.positive)
    shares: ClassVar[tuple[str, ...]] = ("dropout", *TrainingRecipe.shares)

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0

    @property
    def peft_type(self) -> str:
        return "LORA"

    def own_fields(self) -> dict[str, Any]:
        return super().own_fields() | {
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
        }


@dataclass(frozen=True, kw_only=True)
class DoraRecipe(LoraRecipe):
    """Hyperparameters of a DoRA: a LoRA, and a trained norm for each of a module's outputs."""

    kind: ClassVar[str] = "dora"

    def own_fields(self) -> dict[str, Any]:
        return super().own_fields() | {"use_dora": True}


@dataclass(frozen=True, kw_only=True)
class AloraRecipe(LoraRecipe):
    """Hyperparameters of an activated LoRA, which acts from its invocation on.

    invocation: its text, or the token ids. Prompts must contain it; the last place counts.
    """

    kind: ClassVar[str] = "alora"

    invocation: str | tuple[int, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.invocation:
            raise RecipeError("--invocation is empty; give the text that prompts contain")

    def own_fields(self) -> dict[str, Any]:
        if isinstance(self.invocation, str):
            raise RecipeError(f"--invocation {self.invocation!r} has not been made token ids")
        return super().own_fields() | {"alora_invocation_tokens": list(self.invocation)}


@dataclass(frozen=True, kw_only=True)
class Ia3Recipe(PeftRecipe):
    """Hyperparameters of an IA3: a trained factor for each output, or each input of down_proj."""

    kind: ClassVar[str] = "ia3"

    targets: tuple[str, ...] = ("k_proj", "v_proj", _FEEDFORWARD)
    lr: float = 1e-2

    @property
    def peft_type(self) -> str:
        return "IA3"

    def usual_fields(self) -> dict[str, Any]:
        inputs = [t for t in self.targets if t.rpartition(".")[2] == _FEEDFORWARD]
        return {"feedforward_modules": inputs}


@dataclass(frozen=True, kw_only=True)
class PeftTypeRecipe(PeftRecipe):
    """Hyperparameters of another of PEFT's types, by `peft_options` alone.

    type: PEFT's name, e.g. "VERA". targets: of no meaning to types that have none.
    """

    kind: ClassVar[str] = "peft"

    type: str

    @property
    def peft_type(self) -> str:
        return self.type.upper()


@dataclass(frozen=True, kw_only=True)
class BottleneckRecipe(TrainingRecipe):
    """Hyperparameters of bottlenecks: down, an activation and up, added to a sub-layer's output.

    placement: houlsby reads the outputs of attention and MLP, pfeiffer the residual stream behind
    the MLP, parallel the one that enters the MLP. reduction_factor: the model's width over the
    bottleneck's.
    """

    kind: ClassVar[str] = "bottleneck"
    positive: ClassVar[tuple[str, ...]] = ("reduction_factor", *TrainingRecipe.positive)

    placement: Placement = "houlsby"
    reduction_factor: float = 16.0
    activation: BottleneckActivation = "relu"


AdapterRecipe = PeftRecipe | BottleneckRecipe
KINDS: tuple[type[AdapterRecipe], ...] = (
    LoraRecipe,
    DoraRecipe,
    AloraRecipe,
    Ia3Recipe,
    BottleneckRecipe,
    PeftTypeRecipe,
)

_RANKS = (4, 128)
_SCALES = (0.25, 8.0)


def unusual_choices(recipe: AdapterRecipe) -> list[str]:
    """Warnings about a LoRA's rank, scale or targets that look off; none for other kinds."""
    if not isinstance(recipe, LoraRecipe):
        return []
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
    if recipe.targets != _ALL_LINEAR and not named:
        said.append(
            f"targets {','.join(recipe.targets)} leave the attention out: begin with its "
            "projections, then add the MLP's"
        )
    return said
