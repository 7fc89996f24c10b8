"""Kinds of layers that can be served: those that attend, keep states, or need neither.

Others are refused by the names that transformers gives them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn
from transformers import PretrainedConfig
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, LinearAttentionCacheLayerMixin

from quickchange_server.errors import UnsupportedModelError
from quickchange_server.model.architectures.recurrent_layers import RecurrentLayer
from quickchange_server.model.paged_attention import LayerShape

_ATTENTION = ("full_attention", "sliding_attention")
_STATELESS = ("moe", "mlp")  # layers without a token mixer


def _layer_count(config: PretrainedConfig) -> int:
    """Layers that generate: a decoder's, where an encoder's are what `num_hidden_layers` counts."""
    text = config.get_text_config()
    return int(getattr(text, "decoder_layers", None) or text.num_hidden_layers)


def refuse_headless(model: nn.Module) -> None:
    if model.get_output_embeddings() is None:  # type: ignore[operator]
        raise UnsupportedModelError(
            f"{type(model).__name__} has no module that makes its logits (get_output_embeddings); "
            "models without an LM head can't be served"
        )


def _layer_kinds(config: PretrainedConfig) -> list[str]:
    """Kind of each layer, in transformers' words; empty if the configuration doesn't say."""
    return list(getattr(config.get_text_config(), "layer_types", None) or ())


def _is_recurrent(kind: str) -> bool:
    """True if transformers' cache keeps a state for layers of this kind."""
    cache = DYNAMIC_LAYER_TYPE_MAPPING.get(kind)
    return isinstance(cache, type) and issubclass(cache, LinearAttentionCacheLayerMixin)


def keeps_states(config: PretrainedConfig) -> bool:
    return any(_is_recurrent(kind) for kind in _layer_kinds(config))


def refuse_other_state(config: PretrainedConfig) -> None:
    known = {*_ATTENTION, *_STATELESS}
    other = {kind for kind in _layer_kinds(config) if kind not in known and not _is_recurrent(kind)}
    if other:
        raise UnsupportedModelError(
            f"{config.model_type}: layers of type {', '.join(sorted(other))} are not supported yet"
        )


def refuse_other_layers(
    model: nn.Module, attention: Mapping[int, LayerShape], recurrent: Sequence[RecurrentLayer]
) -> None:
    """Refuse a model with layers that neither attend nor keep states as those known do."""
    text: PretrainedConfig = model.config.get_text_config()  # type: ignore[union-attr, operator]
    kinds = _layer_kinds(text)
    with_states = {layer.layer for layer in recurrent}
    layers = _layer_count(text) - sum(kind in _STATELESS for kind in kinds)
    served = len({*attention, *with_states})
    lost = {i for i, kind in enumerate(kinds) if _is_recurrent(kind)} - with_states
    if served != layers or lost or not served:
        raise UnsupportedModelError(
            f"{type(model).__name__}: {served} of {layers} layers use the attention "
            "interface or keep their states in transformers' cache; models with other kinds of "
            "layers are not supported yet"
        )
