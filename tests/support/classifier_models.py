"""A tiny base, adapters that classify or generate on it, and what transformers and PEFT say."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from llm_models import ids_of, piece_tokenizer
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import save_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from quickchange_store.canonical.canonical_adapter import CanonicalAdapter
from quickchange_store.canonical.classifier_part import ClassActivation, ClassifierHead

KINDS = {"kinds": 3, "fit": 1, "tags": 2}  # classes of each classification adapter
LABELS = {"0": "order", "1": "complaint", "2": "other"}
TARGETS = ["q_proj", "v_proj", "down_proj"]


@dataclass(frozen=True)
class ClassifierModels:
    """Folders of the base and its adapters, and the same in memory."""

    path: Path
    adapters: dict[str, Path]
    models: dict[str, PeftModel]
    plain: torch.nn.Module

    @torch.inference_mode()
    def scores(self, name: str, ids: list[int]) -> list[float]:
        """Logits of a prompt's classes."""
        logits = self.models[name](input_ids=torch.tensor([ids])).logits
        scores: list[float] = logits[0].tolist()
        return scores

    @torch.inference_mode()
    def state(self, name: str | None, text: str) -> np.ndarray:
        """The last hidden state of a text's last token."""
        model = self.plain if name is None else self.models[name].base_model.model
        ids = torch.tensor([ids_of(text)])
        return np.asarray(model.model(input_ids=ids).last_hidden_state[0, -1])


def make_classifier_models(folder: Path) -> ClassifierModels:
    path = save_model("llama", folder / "base")
    piece_tokenizer().save_pretrained(path)
    models: dict[str, PeftModel] = {}
    configs = {name: LoraConfig(task_type="SEQ_CLS", target_modules=TARGETS) for name in KINDS}
    configs["sql"] = LoraConfig(task_type="CAUSAL_LM", target_modules=TARGETS, r=4)
    for seed, (name, config) in enumerate(configs.items()):
        torch.manual_seed(seed)
        classes = KINDS.get(name)
        base = (
            AutoModelForCausalLM.from_pretrained(path)
            if classes is None
            else AutoModelForSequenceClassification.from_pretrained(path, num_labels=classes)
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = get_peft_model(base.float(), config).eval()
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.25)
        model.save_pretrained(folder / name)
        models[name] = model
    (folder / "kinds" / "config.json").write_text(json.dumps({"id2label": LABELS}))
    tags = {"problem_type": "multi_label_classification"}
    (folder / "tags" / "config.json").write_text(json.dumps(tags))
    plain = AutoModelForCausalLM.from_pretrained(path).float().eval()
    return ClassifierModels(path, {name: folder / name for name in configs}, models, plain)


def classifier(
    base: CanonicalAdapter,
    classes: int,
    activation: ClassActivation = "softmax",
    hidden: int = 4,
) -> CanonicalAdapter:
    """The adapter with a head over so many features, whose numbers follow from their places."""
    numbers = np.arange(classes * hidden, dtype=np.float32) % 5
    weight = (numbers.reshape(classes, hidden) - 2) / 8
    labels = tuple(f"class {number}" for number in range(classes))
    head = ClassifierHead(weight, None, labels, activation)
    return CanonicalAdapter(base.architecture, base.base_name, base.updates, classifier=head)
