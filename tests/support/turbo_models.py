"""A tiny random model with Turbo heads that draft for it: some fitted to it, some random."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from quickchange_store.canonical.canonical_adapter import CanonicalAdapter, LowRankUpdate
from quickchange_store.canonical.turbo_part import DraftBlock, TurboHeads

VOCABULARY = 29
HIDDEN = 48
LAYERS = 2
KV_BYTES = 2 * 2 * 12 * 4 * LAYERS  # of one token: keys and values of two heads of 12, float32
_FIT_SEQUENCES, _FIT_LENGTH = 64, 48
_RIDGE = 1e-2
_SMALL, _LARGE = 0.1, 0.5  # standard deviations: of the layers' weights, and of both ends'


def turbo_base() -> LlamaForCausalLM:
    """Random, float32. Its last token says most of the next one, so that heads can foresee it."""
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=80,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=_SMALL,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config).float().eval()
    for end in (model.model.embed_tokens, model.lm_head):
        # Logits far apart, so that a last-bit difference can't change a token.
        torch.nn.init.normal_(end.weight, std=_LARGE)
    return model


@dataclass(frozen=True)
class TurboModels:
    """The base on disk; adapters by their name, which stands for the digest."""

    path: Path
    adapters: dict[str, CanonicalAdapter]


HEADS = {"two": 2, "three": 3, "five": 5}  # names of adapters with heads, and how many


def make_turbo_models(folder: Path) -> TurboModels:
    """Two LoRAs, and heads of three kinds; the five belong to a LoRA (a Turbo LoRA)."""
    model = turbo_base()
    model.save_pretrained(folder)
    states, tokens = _own_text(model)
    five = _lora(3)
    adapters = {
        "lora-a": _adapter(_lora(1)),
        "lora-b": _adapter(_lora(2)),
        "two": _adapter({}, _fitted(states, tokens, depth=2, sequential=False)),
        "three": _adapter({}, _random_heads(depth=3)),
        "five": _adapter(five, _fitted(states, tokens, depth=5, sequential=True, model=model)),
    }
    return TurboModels(folder, adapters)


def _adapter(
    updates: dict[str, LowRankUpdate], turbo: TurboHeads | None = None
) -> CanonicalAdapter:
    return CanonicalAdapter("LlamaForCausalLM", "turbo-base", updates, turbo=turbo)


def _lora(seed: int) -> dict[str, LowRankUpdate]:
    generator = torch.Generator().manual_seed(seed)

    def update(rows: int, columns: int) -> LowRankUpdate:
        rank = 4 * seed
        a = torch.randn(rank, columns, generator=generator) * 0.2
        return LowRankUpdate(a, torch.randn(rows, rank, generator=generator) * 0.2, scale=1.0)

    return {
        path: update(rows, columns)
        for layer in range(LAYERS)
        for path, rows, columns in (
            (f"model.layers.{layer}.self_attn.q_proj", HIDDEN, HIDDEN),
            (f"model.layers.{layer}.self_attn.v_proj", HIDDEN // 2, HIDDEN),
        )
    }


@torch.inference_mode()
def _own_text(model: LlamaForCausalLM) -> tuple[Tensor, Tensor]:
    """The model's greedy output from random beginnings: states [N, T, H] and tokens [N, T]."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(VOCABULARY, (_FIT_SEQUENCES, 4), generator=generator)
    for _ in range(_FIT_LENGTH):
        best = model(input_ids=tokens, use_cache=False).logits[:, -1].argmax(-1)
        tokens = torch.cat([tokens, best[:, None]], dim=1)
    states = model.model(input_ids=tokens, use_cache=False).last_hidden_state
    return states, tokens


def _block(generator: torch.Generator, columns: int) -> DraftBlock:
    weight = torch.randn(HIDDEN, columns, generator=generator) * 0.1
    return DraftBlock(weight, torch.randn(HIDDEN, generator=generator) * 0.1)


def _apply(block: DraftBlock, x: Tensor, z: Tensor) -> Tensor:
    return x + torch.nn.functional.silu(z @ block.weight.T + block.bias)


@torch.inference_mode()
def _fitted(
    states: Tensor,
    tokens: Tensor,
    *,
    depth: int,
    sequential: bool,
    model: LlamaForCausalLM | None = None,
) -> TurboHeads:
    """Random blocks, and LM heads of their own, by least squares on what the model went on with."""
    generator = torch.Generator().manual_seed(depth)
    count = tokens.shape[1] - 1 - depth
    x = states[:, :count].reshape(-1, HIDDEN)
    blocks, outputs = [], []
    for head in range(depth):
        if sequential:
            assert model is not None
            before = tokens[:, 1 + head : 1 + head + count].reshape(-1)
            block = _block(generator, 2 * HIDDEN)
            x = _apply(block, x, torch.cat([x, model.get_input_embeddings()(before)], dim=1))
            h = x
        else:
            block = _block(generator, HIDDEN)
            h = _apply(block, x, x)
        wanted = tokens[:, 2 + head : 2 + head + count].reshape(-1)
        blocks.append(block)
        outputs.append(_least_squares(h, wanted))
    heads = tuple((head,) for head in range(depth))
    return TurboHeads(tuple(blocks), heads, sequential=sequential, outputs=tuple(outputs))


def _least_squares(h: Tensor, wanted: Tensor) -> Tensor:
    """[V, H]: the LM head whose logits of h [N, H] come closest to one for the wanted token."""
    one_hot = torch.nn.functional.one_hot(wanted, VOCABULARY).double()
    h = h.double()
    square = h.T @ h + _RIDGE * torch.eye(HIDDEN, dtype=torch.float64)
    return (10 * torch.linalg.solve(square, h.T @ one_hot)).T.float().contiguous()


def _random_heads(depth: int) -> TurboHeads:
    """Two blocks a head, the shared LM head, every second token alone: seldom right."""
    generator = torch.Generator().manual_seed(depth)
    blocks = tuple(_block(generator, HIDDEN) for _ in range(2 * depth))
    heads = tuple((2 * head, 2 * head + 1) for head in range(depth))
    vocabulary = torch.arange(0, VOCABULARY, 2, dtype=torch.int32)
    return TurboHeads(blocks, heads, vocabulary=vocabulary)
