"""Base model of a known shape with random weights, for when the real one is not available.

Its speed is a real model's of that shape; its answers mean nothing. The tokeniser has one token a
word, the workload's words among them, so prompts have exactly the length that was asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quickchange_bench.load.workload import WORDS

END = "<|end|>"
UNKNOWN = "<|unknown|>"


@dataclass(frozen=True, slots=True)
class LlamaShape:
    """A Llama's sizes."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool = True  # LM head and embedding are one


SHAPES = {
    "tiny": LlamaShape(64, 128, 2, 4, 2, 1_024),
    "smollm2-135m": LlamaShape(576, 1_536, 30, 9, 3, 49_152),
    "llama-1b": LlamaShape(2_048, 8_192, 16, 32, 8, 128_256),
    "llama-8b": LlamaShape(4_096, 14_336, 32, 32, 8, 128_256, tied=False),
}


def vocabulary(size: int) -> dict[str, int]:
    """Two special tokens, the workload's words in both spellings, then made-up ones, to `size`.

    Raises:
        ValueError: it is too small for the words.
    """
    known = [UNKNOWN, END, *WORDS, *(word.capitalize() for word in WORDS)]
    if size < len(known):
        raise ValueError(f"a vocabulary of {size}: the workload's words need {len(known)}")
    filler = (f"w{k}" for k in range(size - len(known)))
    return {token: k for k, token in enumerate([*known, *filler])}


def _tokenizer(size: int) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = Tokenizer(models.WordLevel(vocabulary(size), unk_token=UNKNOWN))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokens, eos_token=END, pad_token=END, unk_token=UNKNOWN
    )


def write_base(folder: Path, shape: LlamaShape, *, dtype: str, seed: int) -> None:
    """Save a Llama of this shape, with its tokeniser, in transformers' layout."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=8_192,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=1,
        tie_word_embeddings=shape.tied,
        dtype=dtype,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).to(getattr(torch, dtype))
    model.save_pretrained(folder)
    _tokenizer(shape.vocabulary).save_pretrained(folder)
