"""PEFT adapters of several kinds on one small model: made, saved, imported, and their answers."""

from __future__ import annotations

import random
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from engine_driver import Driver, make_engine, request
from peft import PeftConfig, PeftModel, get_peft_model
from tiny_models import VOCABULARY, greedy, make_model, save_model
from transformers import PreTrainedModel

from quickchange_store.base_model.base_spec import base_spec
from quickchange_store.canonical.canonical_adapter import CanonicalAdapter
from quickchange_store.importing import read_adapter

TOKENS = 10
WHOLE = ("modules_to_save", "ln_tuning_layers")  # in the names of modules that are trained whole


@dataclass(frozen=True)
class Trained:
    """Random adapters by name: in canonical form, and what PEFT says with each."""

    path: Path  # of the base model
    adapters: dict[str, CanonicalAdapter]
    prompts: dict[str, list[int]]
    answers: dict[str, list[int]]
    plain: dict[str, list[int]]  # the base's own answers


def train(
    family: str, folder: Path, configs: Mapping[str, PeftConfig], *, drawn_norms: bool = False
) -> Trained:
    """Each adapter on a model of its own, as PEFT does not mix its kinds."""
    path = save_model(family, folder / "base", drawn_norms=drawn_norms)

    def base() -> PreTrainedModel:
        return make_model(family, drawn_norms=drawn_norms)

    spec = base_spec(str(path))
    generator = random.Random(1)
    result = Trained(path, {}, {}, {}, {})
    for seed, (name, config) in enumerate(configs.items()):
        torch.manual_seed(seed)
        prompt = [generator.randrange(VOCABULARY) for _ in range(generator.randint(1, 30))]
        result.prompts[name] = prompt
        result.plain[name] = greedy(base(), prompt, TOKENS)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT warns of tied embeddings, and saves them too
            model = get_peft_model(base(), config).eval()
            _randomise(model)
            model.save_pretrained(folder / name)
        result.answers[name] = greedy(model, prompt, TOKENS)
        result.adapters[name] = read_adapter(folder / name, spec).adapter
    return result


def _randomise(model: PeftModel) -> None:
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_magnitude" in key or "ia3_l" in key:
                parameter.mul_(torch.rand_like(parameter) + 0.5)
            elif parameter.requires_grad and any(part in key for part in WHOLE):
                parameter.add_(torch.randn_like(parameter) * 0.2)
            elif parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.25)


def served(trained: Trained) -> dict[str, list[int]]:
    """The engine's answers, all adapters and as many plain rows ("plain/NAME") in one batch."""
    engine = make_engine(
        trained.path,
        trained.adapters.__getitem__,
        max_sequences=2 * len(trained.adapters),
        max_batch_tokens=max(16, 4 * len(trained.adapters)),
    )
    drive = Driver(engine)
    for name, prompt in trained.prompts.items():
        engine.submit(request(name, prompt, [(name, 1.0)], max_tokens=TOKENS))
        engine.submit(request(f"plain/{name}", prompt, max_tokens=TOKENS))
    drive.finish(*trained.prompts, *(f"plain/{name}" for name in trained.prompts))
    engine.close()
    return drive.tokens
