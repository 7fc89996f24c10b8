"""A tiny model on disk as users have one: tokenizer, chat template, and LoRA folders by PEFT."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from text_of_pieces import tokenizer_of_pieces
from tiny_models import VOCABULARY, greedy, make_model, save_model
from transformers import PreTrainedTokenizerFast

PIECES = [*map(chr, range(0x20, 0x7F)), "\n", "<end>"]  # a token a character
END = PIECES.index("<end>")
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
CONFIGS: dict[str, dict[str, object]] = {
    "sql": {"r": 4, "target_modules": ["q_proj", "v_proj"]},
    "orders": {"r": 8, "target_modules": ["q_proj", "o_proj", "up_proj"]},
}
assert len(PIECES) == VOCABULARY


@dataclass(frozen=True)
class LlmModels:
    """The base and its adapters on disk, and the same in PEFT."""

    path: Path
    adapters: dict[str, Path]
    reference: PeftModel

    def greedy(self, adapter: str | None, prompt: list[int], count: int) -> list[int]:
        if adapter is None:
            with self.reference.disable_adapter():
                return greedy(self.reference, prompt, count)
        self.reference.set_adapter(adapter)
        return greedy(self.reference, prompt, count)


def ids_of(text: str) -> list[int]:
    return [PIECES.index(character) for character in text]


def text_of(ids: list[int]) -> str:
    return "".join(PIECES[token] for token in ids if token != END)


def piece_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    tokenizer = tokenizer_of_pieces(PIECES, END)
    tokenizer.chat_template = template
    return tokenizer


def make_llm_models(folder: Path) -> LlmModels:
    """The base in `folder/base`, adapters in `folder/NAME`."""
    path = save_model("llama", folder / "base")
    piece_tokenizer().save_pretrained(path)
    model: PeftModel | None = None
    for seed, (name, options) in enumerate(CONFIGS.items()):
        torch.manual_seed(seed)
        config = LoraConfig(lora_alpha=12, task_type="CAUSAL_LM", **options)
        if model is None:
            model = get_peft_model(make_model("llama"), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        for key, parameter in model.named_parameters():
            if f".{name}" in key:
                torch.nn.init.normal_(parameter, std=0.25)
    assert model is not None
    model.eval().save_pretrained(folder)
    return LlmModels(path, {name: folder / name for name in CONFIGS}, model)
