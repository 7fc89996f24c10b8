"""Adapters of PEFT's types around a model, and the files in which PEFT keeps them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from quickchange_store.formats.tuners.tuner_types import EXACT
from quickchange_training.adapters.adapter_recipes import PeftRecipe
from quickchange_training.errors import RecipeError

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel

WEIGHTS = "adapter_model.safetensors"
# AdaLoRA gives ranks away as it trains, CPT has a loss of its own, the third needs tasks by number.
_OTHER_LOOPS = frozenset({"ADALORA", "CPT", "MULTITASK_PROMPT_TUNING"})


def add_peft(model: PreTrainedModel, recipe: PeftRecipe) -> PeftModel:
    """`model` wrapped with a fresh adapter.

    Raises RecipeError where no module is called as a target says, for a type that isn't served
    exactly, and for options that PEFT does not have or that do not go together.
    """
    from peft import get_peft_model

    config = _config(recipe)
    with without_peft_noise():
        try:
            return get_peft_model(model, config)
        except ValueError as error:  # PEFT's way to say that no module is called so
            raise RecipeError(f"--targets {','.join(recipe.targets)}: {error}") from error


def _config(recipe: PeftRecipe) -> PeftConfig:
    made = _config_class(recipe.peft_type)
    known = made.__dataclass_fields__.keys()
    own = {key: value for key, value in recipe.own_fields().items() if key in known}
    for key in recipe.peft_options:
        if key in own:
            raise RecipeError(f"--peft-option {key}: it has an option of its own, or is set")
        if key not in known:
            raise RecipeError(
                f"--peft-option {key}: PEFT's {made.__name__} has no such field: "
                f"{', '.join(sorted(known - own.keys()))}"
            )
    try:
        return made(**own, **{**recipe.usual_fields(), **recipe.peft_options})
    except (TypeError, ValueError) as error:
        given = ", ".join(f"{key}={value}" for key, value in recipe.peft_options.items())
        raise RecipeError(f"--peft-option {given}: {error}") from error


def _config_class(name: str) -> type[PeftConfig]:
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    if name in _OTHER_LOOPS or name not in EXACT:
        known = ", ".join(sorted(EXACT.keys() - _OTHER_LOOPS))
        raise RecipeError(f"--type {name} is not trained here; choose {known}")
    made: type[PeftConfig] = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType[name]]
    return made


@contextmanager
def without_peft_noise() -> Iterator[None]:
    """Hide PEFT's warnings of a name that transformers has retired, and of norms as targets."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Unsupported layer type")
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        yield


def peft_tensors(adapted: PeftModel) -> dict[str, torch.Tensor]:
    """Tensors of the adapter by the names that PEFT saves them under."""
    from peft import get_peft_model_state_dict

    tensors: dict[str, torch.Tensor] = get_peft_model_state_dict(adapted)
    return tensors


def peft_config(adapted: PeftModel, base_name: str) -> dict[str, Any]:
    """Content of adapter_config.json, in which the base is called `base_name`."""
    config: dict[str, Any] = adapted.peft_config["default"].to_dict()
    config["base_model_name_or_path"] = base_name
    config["inference_mode"] = True
    return {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}
