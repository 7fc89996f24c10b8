"""A tiny base with a tokenizer of letters, random LoRAs for it, and a task."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

LORAS = {"first": 4, "second": 12}  # name: rank


@dataclass(frozen=True)
class Bench:
    """Where everything lies."""

    model: Path
    loras: dict[str, Path]
    task: Path


def _base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def _tokenizer() -> PreTrainedTokenizerFast:
    signs = 'abcdefghijklmnopqrstuvwxyz {}":'
    vocabulary = {"<eos>": 0} | {sign: i + 1 for i, sign in enumerate(signs)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="z"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("evaluation")
    _base().save_pretrained(folder / "tiny")
    _tokenizer().save_pretrained(folder / "tiny")
    for seed, (name, rank) in enumerate(LORAS.items()):
        torch.manual_seed(seed)
        config = LoraConfig(r=rank, target_modules=["q_proj", "v_proj", "down_proj"])
        model = get_peft_model(_base(), config)
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(folder / name)
    task = folder / "task.jsonl"
    lines = [
        {"prompt": "abc", "completion": '{"a": "b"}'},
        {"prompt": "hello there", "completion": "general"},
        {"prompt": "x", "completion": "a longer answer than the others"},
    ]
    task.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Bench(folder / "tiny", {name: folder / name for name in LORAS}, task)
