"""Input embeddings and LM head of a base model with an adapter, which Turbo heads share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quickchange_store.base_model.base_weights import load_base
from quickchange_store.errors import BaseModelError
from quickchange_training.errors import RecipeError, model_error
from quickchange_training.turbo.turbo_trainer import BaseEnds

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from quickchange_store.canonical.canonical_adapter import BaseSpec, CanonicalAdapter


def base_ends(model: str, spec: BaseSpec, adapter: CanonicalAdapter | None) -> BaseEnds:
    """Float32 embeddings and LM head of `model`, the head with the adapter's update of it.

    Raises ModelError where the model can't be loaded, RecipeError for an adapter that changes the
    LM head by more than low-rank matrices.
    """
    import torch

    try:
        loaded = load_base(model, dtype=torch.float32)
    except (OSError, ValueError, BaseModelError) as error:
        raise model_error(model, error) from error
    embeddings = loaded.get_input_embeddings().weight.detach()
    head = loaded.get_output_embeddings().weight.detach()
    update = None if adapter is None else adapter.updates.get(spec.output_head or "")
    if update is not None:
        if not update.plain or update.bias is not None:
            raise RecipeError(
                f"the adapter changes {spec.output_head} by more than A and B: heads draft with "
                "its weight alone; leave that module out of the adapter"
            )
        head = head + update.scale * (update.b.float() @ update.a.float())
    return BaseEnds(embeddings, head)


def stop_token_ids(model: str, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that end an output: the eos of the tokenizer and of the generation config."""
    from transformers import GenerationConfig

    try:
        eos = GenerationConfig.from_pretrained(model).eos_token_id
    except OSError:
        eos = None  # a model without a generation config
    more = eos if isinstance(eos, list) else [eos]
    return frozenset(i for i in (tokenizer.eos_token_id, *more) if i is not None)
