"""Prompts of every kind that PEFT learns, on one small model: made, saved, imported, and answers.

A composition's answers are those of the same prompt on a model that the LoRA was merged into.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from engine_driver import request
from peft import (
    CartridgeConfig,
    CPTConfig,
    LoraConfig,
    MultitaskPromptTuningConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from tiny_models import VOCABULARY, greedy, make_model
from transformers import PreTrainedModel

from quickchange_server.protocol import Submit
from quickchange_store.base_model.base_spec import base_spec
from quickchange_store.canonical.canonical_adapter import CanonicalAdapter
from quickchange_store.importing import read_adapter

TOKENS = 8
LORA = "lora"
_TASK = {"task_type": "CAUSAL_LM"}

KINDS: dict[str, Callable[[], PeftConfig]] = {
    "prompt tuning": lambda: PromptTuningConfig(**_TASK, num_virtual_tokens=7),
    "p-tuning": lambda: PromptEncoderConfig(**_TASK, num_virtual_tokens=5, encoder_hidden_size=16),
    "p-tuning by an LSTM": lambda: PromptEncoderConfig(
        **_TASK,
        num_virtual_tokens=3,
        encoder_hidden_size=16,
        encoder_reparameterization_type="LSTM",
    ),
    "prefix tuning": lambda: PrefixTuningConfig(**_TASK, num_virtual_tokens=6),
    "prefix tuning with a projection": lambda: PrefixTuningConfig(
        **_TASK, num_virtual_tokens=8, prefix_projection=True, encoder_hidden_size=16
    ),
    "cartridge": lambda: CartridgeConfig(**_TASK, num_virtual_tokens=9),
    "context-aware": lambda: CPTConfig(
        **_TASK,
        cpt_token_ids=[3, 4, 5, 6],
        cpt_mask=[1, 1, 1, 1],
        cpt_tokens_type_mask=[1, 2, 3, 4],
    ),
    "multitask with its one task": lambda: MultitaskPromptTuningConfig(
        **_TASK, num_virtual_tokens=4, num_tasks=1, num_ranks=2
    ),
}


@dataclass
class Prompts:
    """Adapters by name, what PEFT answers with each alone, with the LoRA, and with none."""

    path: Path
    texts: dict[str, list[int]] = field(default_factory=dict)
    adapters: dict[str, CanonicalAdapter] = field(default_factory=dict)
    alone: dict[str, list[int]] = field(default_factory=dict)
    with_lora: dict[str, list[int]] = field(default_factory=dict)
    plain: dict[str, list[int]] = field(default_factory=dict)

    def submits(self) -> list[Submit]:
        """A request for each name in `answers`, the prompts under one another's texts mixed."""
        made = [self.submit("lora", [LORA], self.texts[LORA])]
        for name in self.names:
            text = self.texts[name]
            made.append(self.submit(name, [name], text))
            made.append(self.submit(f"{name} + lora", [name, LORA], text))
            made.append(self.submit(f"{name}, plain", [], text))
        return made

    def submit(
        self, request_id: str, adapters: Sequence[str], text: Sequence[int], **options: object
    ) -> Submit:
        components = [(name, 1.0, 0, None, self.virtual_tokens(name)) for name in adapters]
        return request(request_id, text, components, **{"max_tokens": TOKENS, **options})

    def virtual_tokens(self, name: str) -> int:
        prompt = self.adapters[name].prompt
        return 0 if prompt is None else prompt.tokens

    @property
    def names(self) -> list[str]:
        return [name for name in self.adapters if name != LORA]

    @property
    def answers(self) -> dict[str, list[int]]:
        """The answer to each of `submits`."""
        found = {"lora": self.alone[LORA]}
        for name in self.names:
            found[name] = self.alone[name]
            found[f"{name} + lora"] = self.with_lora[name]
            found[f"{name}, plain"] = self.plain[name]
        return found


def learn(
    family: str,
    folder: Path,
    kinds: Sequence[str] = tuple(KINDS),
    make: Callable[[str], PreTrainedModel] = make_model,
) -> Prompts:
    """A LoRA and a prompt of each kind, random, on the model that `make` gives for the family."""
    path = folder / "base"
    make(family).save_pretrained(path)
    spec = base_spec(str(path))
    generator = random.Random(1)
    made = Prompts(path)
    for seed, name in enumerate([LORA, *kinds]):
        text = [generator.randrange(VOCABULARY) for _ in range(generator.randint(1, 25))]
        made.texts[name] = text
        made.plain[name] = greedy(make(family), text, TOKENS)
        model = _random(make(family), name, seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of tied embeddings
            model.save_pretrained(folder / name)
        made.adapters[name] = read_adapter(folder / name, spec).adapter
        made.alone[name] = generated(model, text)
        if name != LORA:
            merged = _random(make(family), LORA, 0).merge_and_unload()
            made.with_lora[name] = generated(_loaded(merged, folder / name), text)
    return made


def generated(model: torch.nn.Module, text: Sequence[int]) -> list[int]:
    """What PEFT's generation says, greedily, with its cache."""
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of position ids that PEFT does not pass on
        ids = torch.tensor([list(text)])
        tasks = {}
        if getattr(model.active_peft_config, "num_tasks", None) is not None:
            tasks["task_ids"] = torch.tensor([0])
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            **tasks,
        )
    return out[0, len(text) :].tolist()


def _random(base: PreTrainedModel, name: str, seed: int) -> PeftModel:
    torch.manual_seed(seed)
    lora = LoraConfig(**_TASK, r=4, target_modules="all-linear", init_lora_weights=False)
    config = lora if name == LORA else KINDS[name]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base, config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1 if name == LORA else 0.4)
    return model


def _loaded(base: torch.nn.Module, folder: Path) -> PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(base, folder).eval()
