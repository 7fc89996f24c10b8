"""Attention modules of transformers that compute attention themselves, made to call `Attend`.

Older models don't go through the attention interface. Each kind below keeps the model's own
projections, head layout and rotation, and gives the rest to the paged KV cache. A kind is the code
of one class of transformers (and of classes that were copied from it), so it is known by the
class's name. Where the result differs from what transformers computes, the model is not the one
that is meant here: a configuration that takes another path leaves its modules alone, and they are
refused as modules that don't use the attention interface.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from quickchange_server.errors import UnsupportedModelError
from quickchange_server.model import paged_attention


def admit_attention_classes(config: PretrainedConfig) -> None:
    """Let models that keep a table of attention classes (GPT-J, Falcon) be made for `Attend`.

    They look the implementation's name up in it, and find the eager class.
    """
    model = AutoModelForCausalLM._model_mapping.get(type(config), None)
    for name, table in vars(sys.modules[model.__module__]).items() if model is not None else ():
        if name.endswith("_ATTENTION_CLASSES") and "eager" in table:
            table.setdefault(paged_attention.NAME, table["eager"])


def replace_own_attention(model: nn.Module) -> None:
    """Make every attention module of a known kind call the `Attend` that is installed in it."""
    for module in model.modules():
        if type(module).__name__ == "BigBirdModel":
            # As transformers does when it meets a first text of `most_positions` or less.
            module.set_attention_type("original_full")  # type: ignore[operator]
    layers = 0
    for module in list(model.modules()):
        kind = _KINDS.get(type(module).__name__)
        if kind is None or not kind(module):
            continue
        if getattr(module, "layer_idx", None) is None:
            module.layer_idx = layers  # type: ignore[assignment]
        layers += 1
    for module in model.modules():
        forward = _BACKBONES.get(type(module).__name__)
        if forward is not None:
            module.forward = MethodType(forward, module)


def _attended(
    module: nn.Module,
    query: torch.Tensor,  # [1, Hq, T, D]
    key: torch.Tensor,  # [1, Hkv, T, D]
    value: torch.Tensor,  # [1, Hkv, T, D]
    *,
    scale: float,
    window: int = 0,
    slopes: torch.Tensor | None = None,  # float32 [Hq]
) -> torch.Tensor:
    """What the module's layer attends to: [T, Hq, D]."""
    attend: paged_attention.Attend = getattr(module, paged_attention.ATTRIBUTE)
    more = {} if slopes is None else {"slopes": slopes}
    return attend(
        module.layer_idx,  # type: ignore[arg-type]
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        scale=scale,
        window=window,
        softcap=0.0,
        **more,
    )


def _slopes(module: nn.Module, bias: torch.Tensor) -> torch.Tensor:
    """ALiBi's slopes [H] from the bias [H, 1, 2] of two neighbouring keys."""
    device = next(module.parameters()).device
    return (bias[:, 0, 1] - bias[:, 0, 0]).to(device, torch.float32)


def _function(module: nn.Module, name: str) -> Callable[..., Any]:
    """A function of the file that the module's class stands in."""
    found: Callable[..., Any] = getattr(sys.modules[type(module).__module__], name)
    return found


# --- kinds: each returns whether the module is one that it stands for ---------------------------


def _inner(module: nn.Module, scale: float, window: int = 0, keys_last: bool = False) -> bool:
    """Replace `_attn`: queries, keys and values [1, H, T, D] in (OpenAI's keys [1, H, D, T])."""

    def attn(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, None]:
        key = key.transpose(2, 3) if keys_last else key
        query, key = query.to(value.dtype), key.to(value.dtype)
        out = _attended(module, query, key, value, scale=scale, window=window)
        return out.transpose(0, 1).unsqueeze(0), None

    def list_of_one(*args: Any, **_: Any) -> list[torch.Tensor]:
        return [attn(*args)[0]]

    module._attn = list_of_one if keys_last else attn  # type: ignore[assignment]
    return True


def _gptj(module: Any) -> bool:
    return _inner(module, 1 / float(module.scale_attn))


def _gpt_neo(module: Any) -> bool:
    local = module.attention_type == "local"
    return _inner(module, 1.0, window=module.config.window_size if local else 0)


def _gpt_neox_japanese(module: Any) -> bool:
    return _inner(module, 1 / module.norm_factor)


def _openai_gpt(module: Any) -> bool:
    scale = (module.split_size // module.n_head) ** -0.5 if module.scale else 1.0
    return _inner(module, scale, keys_last=True)


def _falcon(module: Any) -> bool:
    """Attention with ALiBi as SDPA has it: transformers' eager one adds the bias twice."""
    slopes = None
    if module.config.alibi:
        bias = _function(module, "build_alibi_tensor")
        slopes = _slopes(module, bias(torch.ones(1, 2).long(), module.num_heads, torch.float32))
        slopes = slopes * module.inv_norm_factor  # it is added before the scores are scaled
    rotate = _function(module, "apply_rotary_pos_emb")
    # A key of the newer layout is repeated for each head of its group.
    group = module.num_heads // module.num_kv_heads if module.new_decoder_architecture else 1
    scale = module.head_dim**-0.5

    def forward(
        hidden_states: torch.Tensor,
        *_: Any,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **__: Any,
    ) -> tuple[torch.Tensor, None]:
        heads = module._split_heads(module.query_key_value(hidden_states))
        query, key, value = (x.transpose(1, 2) for x in heads)
        key, value = key[:, ::group], value[:, ::group]
        if slopes is None and position_embeddings is not None:
            query, key = rotate(query, key, *position_embeddings)
        out = _attended(module, query, key, value, scale=scale, slopes=slopes)
        return module.dense(out.flatten(1).unsqueeze(0)), None

    module.forward = forward
    return True


def _bloom(module: Any) -> bool:
    if module.pretraining_tp > 1 and module.slow_but_exact:
        return False
    bias = _function(module, "build_alibi_tensor")
    slopes = _slopes(module, bias(torch.ones(1, 2).long(), module.num_heads, torch.float32))

    def forward(
        hidden_states: torch.Tensor, residual: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, None]:
        query, key, value = module._reshape(module.query_key_value(hidden_states))
        out = _attended(module, query, key, value, scale=module.inv_norm_factor, slopes=slopes)
        return module.dense(out.flatten(1).unsqueeze(0)) + residual, None

    module.forward = forward
    return True


def _mpt(module: Any) -> bool:
    bias = _function(module, "build_mpt_alibi_tensor")
    slopes = _slopes(module, bias(module.n_heads, 2))

    def forward(hidden_states: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, None]:
        mixed = module.Wqkv(hidden_states)
        if module.clip_qkv:
            mixed = mixed.clamp(min=-module.clip_qkv, max=module.clip_qkv)
        heads = mixed.unflatten(2, (3, module.n_heads, module.head_dim))
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        out = _attended(module, query, key, value, scale=module.softmax_scale, slopes=slopes)
        return module.out_proj(out.flatten(1).unsqueeze(0)), None

    module.forward = forward
    return True


def _bert(module: Any) -> bool:
    """Self-attention as in BERT; RoFormer's rotates, and may rotate values too."""

    def forward(
        hidden_states: torch.Tensor,
        *_: Any,
        sinusoidal_pos: torch.Tensor | None = None,
        **__: Any,
    ) -> tuple[torch.Tensor, None]:
        query, key, value = (
            projection(hidden_states).unflatten(2, (-1, module.attention_head_size)).transpose(1, 2)
            for projection in (module.query, module.key, module.value)
        )
        if sinusoidal_pos is not None:
            rotate = module.apply_rotary_position_embeddings
            if module.rotary_value:
                query, key, value = rotate(sinusoidal_pos, query, key, value)
            else:
                query, key = rotate(sinusoidal_pos, query, key)
        scale = module.attention_head_size**-0.5
        out = _attended(module, query, key, value, scale=scale)
        return out.flatten(1).unsqueeze(0), None

    module.forward = forward
    return True


def _bart(module: Any) -> bool:
    """Attention as in BART, in copies made before that went through the interface."""

    def forward(
        hidden_states: torch.Tensor, *_: Any, attn_prompt: object = None, **__: Any
    ) -> tuple[torch.Tensor, None]:
        if attn_prompt is not None:
            raise UnsupportedModelError(
                "the model has prompts of its own in each layer (use_prompt)"
            )
        query, key, value = (
            projection(hidden_states).unflatten(2, (-1, module.head_dim)).transpose(1, 2)
            for projection in (module.q_proj, module.k_proj, module.v_proj)
        )
        out = _attended(module, query, key, value, scale=module.scaling)
        return module.out_proj(out.flatten(1).unsqueeze(0)), None

    module.forward = forward
    return True


def _xlm(module: Any) -> bool:
    def forward(hidden_states: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor]:
        query, key, value = (
            projection(hidden_states).unflatten(2, (-1, module.head_dim)).transpose(1, 2)
            for projection in (module.q_lin, module.k_lin, module.v_lin)
        )
        out = _attended(module, query, key, value, scale=module.head_dim**-0.5)
        return (module.out_lin(out.flatten(1).unsqueeze(0)),)

    module.forward = forward
    return True


def _doge(module: Any) -> bool:
    """Each key has a bias, made from its value: one more column of the key, which queries weigh 1.

    Past `keep_window_size` tokens the keys with the least bias are left out: see `most_positions`.
    """
    rotate = _function(module, "apply_rotary_pos_emb")
    scale = module.scaling

    def forward(
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        *_: Any,
        **__: Any,
    ) -> tuple[torch.Tensor, None]:
        query, key, value = (
            projection(hidden_states).unflatten(2, (-1, module.head_dim))
            for projection in (module.q_proj, module.k_proj, module.v_proj)
        )
        bias = torch.exp(module.A * functional.softplus(module.dt_proj(value.flatten(2))))
        query, key = (x.transpose(1, 2) for x in (module.q_norm(query), module.k_norm(key)))
        query, key = rotate(query, key, *position_embeddings)
        column = bias.transpose(1, 2).unsqueeze(3)  # [1, Hkv, T, 1]
        key = functional.pad(torch.cat([key, column], 3), (0, _COLUMNS - 1))
        ones = torch.full_like(query[..., :1], 1 / scale)
        query = functional.pad(torch.cat([query, ones], 3), (0, _COLUMNS - 1))
        out = _attended(module, query, key, value.transpose(1, 2), scale=scale)
        return module.o_proj(out.flatten(1).unsqueeze(0)), None

    module.forward = forward
    return True


def _diff_llama(module: Any) -> bool:
    """Attention over two halves of the values: one value of twice the width."""
    rotate = _function(module, "apply_rotary_pos_emb")

    def forward(
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        *_: Any,
        **__: Any,
    ) -> tuple[torch.Tensor, None]:
        query, key, value = (
            projection(hidden_states).unflatten(2, (-1, module.head_dim)).transpose(1, 2)
            for projection in (module.q_proj, module.k_proj, module.v_proj)
        )
        query, key = rotate(query, key, *position_embeddings)
        both = torch.cat(value.chunk(2, 1), 3).repeat(1, 2, 1, 1)  # [1, Hkv, T, 2 D]
        first, second = _attended(module, query, key, both, scale=module.scaling).chunk(2, 1)
        weights = [
            torch.exp(torch.sum(q * k, dim=-1, dtype=torch.float32)).to(query.dtype)
            for q, k in (
                (module.lambda_q1, module.lambda_k1),
                (module.lambda_q2, module.lambda_k2),
            )
        ]
        mixed = first - (weights[0] - weights[1] + module.lambda_init) * second
        out = (1 - module.lambda_init) * module.groupnorm(mixed)
        return module.o_proj(out.flatten(1).unsqueeze(0)), None

    module.forward = forward
    return True


def _causal(module: Any) -> bool:
    """A decoder's attention that leaves it to its mask that tokens see none behind them."""
    module.is_causal = module.is_decoder
    return True


def _hrm(module: Any) -> bool:
    """A layer that is passed several times in a step has keys and values of each pass."""
    first = module.layer_idx

    def number(_module: nn.Module, _args: object, kwargs: dict[str, Any]) -> None:
        module.layer_idx = first + kwargs["cycle_offset"]

    module.register_forward_pre_hook(number, with_kwargs=True)
    return True


_COLUMNS = 8  # what a key is widened by: whole vectors of any dtype

_KINDS: dict[str, Callable[[Any], bool]] = {
    "BigBirdSelfAttention": _bert,
    "Attention": lambda module: hasattr(module, "merge_heads") and _openai_gpt(module),
    "BigBirdPegasusDecoderAttention": _causal,
    "BloomAttention": _bloom,
    "CodeGenAttention": _gptj,
    "DiffLlamaAttention": _diff_llama,
    "DogeAttention": _doge,
    "FalconAttention": _falcon,
    "GPTJAttention": _gptj,
    "GPTNeoSelfAttention": _gpt_neo,
    "GPTNeoXJapaneseAttention": _gpt_neox_japanese,
    "GitSelfAttention": _bert,
    "HrmTextAttention": _hrm,
    "MegatronBertSelfAttention": _bert,
    "MptAttention": _mpt,
    "MultiHeadAttention": lambda module: hasattr(module, "q_lin") and _xlm(module),
    "MvpAttention": _bart,
    "RemBertSelfAttention": _bert,
    "RoFormerSelfAttention": _bert,
    "TrOCRAttention": _bart,
    "XGLMAttention": _bart,
}


# --- models that need a mask, or make one for ALiBi, in each step ---------------------------------


def _bloom_backbone(
    self: Any, input_ids: torch.Tensor, **_: Any
) -> BaseModelOutputWithPastAndCrossAttentions:
    hidden = self.word_embeddings_layernorm(self.word_embeddings(input_ids))
    for block in self.h:
        hidden = block(hidden, alibi=None, attention_mask=None)[0]
    return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=self.ln_f(hidden))


def _big_bird_backbone(
    self: Any, input_ids: torch.Tensor, position_ids: torch.Tensor, **_: Any
) -> BaseModelOutputWithPastAndCrossAttentions:
    """Without the pooler, which reads the first row alone and has no part in the logits."""
    kinds = torch.zeros_like(input_ids)
    hidden = self.embeddings(input_ids, position_ids=position_ids, token_type_ids=kinds)
    encoded: BaseModelOutputWithPastAndCrossAttentions = self.encoder(hidden, use_cache=False)
    return encoded


def _mpt_backbone(
    self: Any, input_ids: torch.Tensor, **_: Any
) -> BaseModelOutputWithPastAndCrossAttentions:
    hidden = self.wte(input_ids)
    for block in self.blocks:
        hidden = block(hidden, position_bias=None, attention_mask=None)[0]
    return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=self.norm_f(hidden))


def _xlm_backbone(
    self: Any, input_ids: torch.Tensor, position_ids: torch.Tensor, **_: Any
) -> BaseModelOutputWithPastAndCrossAttentions:
    """Transformers' own takes rows behind the first padding tokens for padding."""
    if not self.causal:
        raise UnsupportedModelError("the model's attention is not causal (causal: false)")
    hidden = self.layer_norm_emb(
        self.embeddings(input_ids) + self.position_embeddings(position_ids)
    )
    for attend, norm1, feed, norm2 in zip(
        self.attentions, self.layer_norm1, self.ffns, self.layer_norm2, strict=True
    ):
        hidden = norm1(hidden + attend(hidden)[0])
        hidden = norm2(hidden + feed(hidden))
    return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden)


_BACKBONES: dict[str, Callable[..., BaseModelOutputWithPastAndCrossAttentions]] = {
    "BigBirdModel": _big_bird_backbone,
    "BloomModel": _bloom_backbone,
    "MptModel": _mpt_backbone,
    "XLMModel": _xlm_backbone,
}
