"""The head of PEFT's SEQ_CLS adapters: a linear module that PEFT saves whole, beside the updates.

PEFT names it in `modules_to_save` (`score`, for some models `classifier`) and saves
`base_model.model.score.weight`; a state dict has `score.modules_to_save.NAME.weight`. Labels and
the kind of problem stand in transformers' configuration of the model, `config.json`, where it was
saved beside the adapter, or in `adapter_config.json` itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quickchange_store.canonical.canonical_adapter import BaseSpec
from quickchange_store.canonical.classifier_part import (
    ClassActivation,
    ClassifierHead,
    Floats,
    default_labels,
    usual_activation,
)
from quickchange_store.errors import BaseMismatchError, InvalidAdapterError, UnsupportedFeatureError
from quickchange_store.formats.config_file import CONFIG_FILE, invalid, read_config
from quickchange_store.formats.imported import Imported
from quickchange_store.formats.peft.peft_common import WEIGHTS_FILE
from quickchange_store.formats.peft.tensor_names import PREFIX, WRAPPERS
from quickchange_store.formats.tensors import AdapterTensors

if TYPE_CHECKING:
    import torch

TASK = "SEQ_CLS"
HEADS = ("classifier", "score")  # as PEFT has them in modules_to_save
MODEL_CONFIG_FILE = "config.json"
_PROBLEMS: Mapping[Any, ClassActivation | None] = {
    None: None,
    "": None,
    "regression": "identity",
    "single_label_classification": None,
    "multi_label_classification": "sigmoid",
}
_OF_HEADS = ("id2label", "label2id", "num_labels", "problem_type")  # fields, in either file
# The LM head of these reads something else than the states that transformers classifies by.
_OTHER_STATES = {
    "minicpm3": "its LM head reads scaled states",
    "modernbert-decoder": "it has a projection of its own before the classifier, which PEFT does "
    "not save",
}


@dataclass(frozen=True)
class Classification:
    """What an adapter has of a classifier, and its configuration without it."""

    config: Mapping[str, Any]
    head: ClassifierHead | None

    def joined(self, imported: Imported) -> Imported:
        """What was imported by that configuration, with the head."""
        if self.head is None:
            return imported
        return replace(imported, adapter=replace(imported.adapter, classifier=self.head))


def take_classifier(
    directory: Path, config: Mapping[str, Any], base: BaseSpec, tensors: AdapterTensors
) -> Classification:
    """Take the classification head in `directory`, whose tensors are open, if the adapter has one.

    The configuration of an adapter without a head is given back as it is. Raises StoreError; the
    message names file, key and remedy.
    """
    named, task = config.get("modules_to_save"), config.get("task_type")
    saved = named if isinstance(named, list) else []
    others = [name for name in saved if name not in HEADS]  # read with the updates
    listed = len(others) < len(saved)
    if task == "TOKEN_CLS" and listed:
        raise UnsupportedFeatureError(
            "an adapter that classifies each token is not served",
            file=CONFIG_FILE,
            key="task_type",
            remedy=f"train it to classify whole texts ({TASK})",
        )
    asked = listed if task is None else task == TASK
    if not asked:
        return Classification(config, None)
    found = _head_tensors(tensors)
    if not found and not listed:
        return Classification(config, None)
    head = _head(directory, config, base, tensors, found)
    gone = {"modules_to_save", "task_type", *_OF_HEADS}
    if _made_for(config) == _classifier_class(base):
        gone.add("auto_mapping")
    kept = {k: v for k, v in config.items() if k not in gone}
    return Classification(kept | ({"modules_to_save": others} if others else {}), head)


def head_tensors(head: ClassifierHead) -> dict[str, torch.Tensor]:
    """The head's tensors by PEFT's names."""
    import torch

    parts = {"weight": head.weight, "bias": head.bias}
    return {
        f"{PREFIX}{HEADS[1]}.{name}": torch.from_numpy(part.copy())
        for name, part in parts.items()
        if part is not None
    }


def head_config(head: ClassifierHead) -> dict[str, Any]:
    """The configuration's fields for the head."""
    config: dict[str, Any] = {"task_type": TASK, "modules_to_save": list(HEADS)}
    if head.labels != default_labels(head.classes):
        config["id2label"] = {str(number): label for number, label in enumerate(head.labels)}
    if head.activation != usual_activation(head.classes):
        config["problem_type"] = next(
            name
            for name, activation in _PROBLEMS.items()
            if (activation or usual_activation(head.classes)) == head.activation
        )
    return config


def _head_tensors(tensors: AdapterTensors) -> dict[str, str]:
    """Keys of the head's tensors by "weight" and "bias". Raises where there is more than one."""
    found: dict[str, str] = {}
    heads = set()
    for key in sorted(tensors.left):
        parts = [part for part in tensors.name(key).split(".") if part not in WRAPPERS]
        while parts and parts[0] in ("base_model", "model"):
            parts = parts[1:]
        if not parts or parts[0] not in HEADS or any(part.startswith("lora_") for part in parts):
            continue
        if "original_module" in parts:  # as the model was before the training
            tensors.left.discard(key)
            continue
        saved, kind = parts[1:-1], parts[-1]
        plain = not saved or (saved[0] == "modules_to_save" and len(saved) <= 2)
        if not plain or kind not in ("weight", "bias"):
            raise UnsupportedFeatureError(
                "this classification head has more than one layer",
                file=tensors.file_of(key),
                key=tensors.name(key),
                remedy=f"train with a model whose head is one linear module, as {HEADS[1]} of "
                "LlamaForSequenceClassification",
            )
        heads.add((parts[0], *saved))
        if kind in found or len(heads) > 1:
            raise InvalidAdapterError(
                "the file has more than one classification head",
                file=tensors.file_of(key),
                key=tensors.name(key),
                remedy="save one adapter with its head alone (save_pretrained's selected_adapters)",
            )
        found[kind] = key
    return found


def _head(
    directory: Path,
    config: Mapping[str, Any],
    base: BaseSpec,
    tensors: AdapterTensors,
    found: Mapping[str, str],
) -> ClassifierHead:
    if "weight" not in found:
        raise InvalidAdapterError(
            "the classification head is missing, while modules_to_save asks for it",
            file=WEIGHTS_FILE,
            key="base_model.model.score.weight",
            remedy="save the adapter again with its head, as PEFT's save_pretrained does",
        )
    reason = _OTHER_STATES.get(base.model_type)
    if reason is not None or base.head is None:
        raise UnsupportedFeatureError(
            f"classification heads are not served on {base.architecture}: "
            + (reason or "it has no LM head, whose input a head could read"),
            file=CONFIG_FILE,
            key="task_type",
            remedy="train on another base model",
        )
    weight = _floats(tensors, found["weight"])
    if weight.ndim != 2 or weight.shape[1] != base.head.in_features:
        raise BaseMismatchError(
            f"shape {list(weight.shape)}, while a classification head on the base model must be "
            f"[classes, {base.head.in_features}]",
            file=tensors.file_of(found["weight"]),
            key=tensors.name(found["weight"]),
            remedy="use an adapter of this base model",
        )
    bias = _floats(tensors, found["bias"]) if "bias" in found else None
    file, described = _described(directory, config)
    labels = _labels(file, described, len(weight))
    problem = described.get("problem_type")
    if not isinstance(problem, str | None) or problem not in _PROBLEMS:
        known = ", ".join(name for name in _PROBLEMS if name)
        raise invalid("problem_type", problem, f"use one of {known}", file)
    activation = _PROBLEMS[problem] or usual_activation(len(weight))
    return ClassifierHead(weight, bias, labels, activation)


def _floats(tensors: AdapterTensors, key: str) -> Floats:
    """A tensor as float32, which says every number of a narrower dtype."""
    numbers: Floats = tensors.take(key).float().contiguous().numpy()
    return numbers


def _described(directory: Path, config: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """The file and the configuration that say what the classes are."""
    if any(config.get(name) for name in _OF_HEADS):
        return CONFIG_FILE, config
    if (directory / MODEL_CONFIG_FILE).is_file():
        return MODEL_CONFIG_FILE, read_config(directory, MODEL_CONFIG_FILE)
    return CONFIG_FILE, {}


def _labels(file: str, config: Mapping[str, Any], classes: int) -> tuple[str, ...]:
    count, names = config.get("num_labels"), config.get("id2label")
    if count is not None and (type(count) is not int or count != classes):
        raise invalid("num_labels", count, f"the head has {classes} classes", file)
    if not names:
        return default_labels(classes)
    numbers = {str(number) for number in range(classes)}
    if not isinstance(names, dict) or set(names) != numbers:
        raise invalid(
            "id2label",
            names if len(str(names)) < 200 else type(names).__name__,
            f"give a label for each of the head's {classes} classes, by number from 0, or leave "
            "the field out",
            file,
        )
    if not all(isinstance(name, str) for name in names.values()):
        raise invalid("id2label", "a label", "labels must be strings", file)
    return tuple(names[str(number)] for number in range(classes))


def _made_for(config: Mapping[str, Any]) -> str | None:
    mapping = config.get("auto_mapping")
    name = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    return name if isinstance(name, str) else None


def _classifier_class(base: BaseSpec) -> str | None:
    """The class that transformers classifies texts with on this kind of model."""
    from transformers.models.auto import modeling_auto

    found = modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.get(base.model_type)
    return None if found is None else str(found)
