"""Heads of PEFT's SEQ_CLS adapters: imported with their labels, part of the digest, exported."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification
from typer.testing import CliRunner

from quickchange_store.canonical import adapter_bytes
from quickchange_store.canonical.canonical_adapter import CanonicalAdapter
from quickchange_store.canonical.classifier_part import ClassifierHead
from quickchange_store.cli import app
from quickchange_store.errors import (
    BaseMismatchError,
    InvalidAdapterError,
    StoreError,
    UnsupportedFeatureError,
)
from quickchange_store.exporting import ExportLayout, export_adapter
from quickchange_store.formats.imported import Imported
from quickchange_store.importing import read_adapter
from quickchange_store.names import parse_reference
from quickchange_store.store import Store

CONFIG, WEIGHTS, MODEL_CONFIG = "adapter_config.json", "adapter_model.safetensors", "config.json"
SCORE = "base_model.model.score.weight"


@dataclass(frozen=True)
class Saved:
    """A random SEQ_CLS adapter as PEFT saved it, and the model that it was saved from."""

    folder: Path
    model: PeftModel
    head: torch.Tensor

    def edit(self, **fields: Any) -> None:
        path = self.folder / CONFIG
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    def describe(self, **fields: Any) -> None:
        (self.folder / MODEL_CONFIG).write_text(json.dumps(fields))

    def rename(self, name: Callable[[str], str]) -> None:
        tensors = load_file(self.folder / WEIGHTS)
        save_file({name(key): t for key, t in tensors.items()}, self.folder / WEIGHTS)


Save = Callable[..., Saved]


@pytest.fixture
def save(bases: Any, tmp_path: Path) -> Save:
    def make(family: str = "llama", classes: int = 3, config: PeftConfig | None = None) -> Saved:
        config = config or LoraConfig(task_type="SEQ_CLS", target_modules="all-linear", r=2)
        torch.manual_seed(5)
        base = AutoModelForSequenceClassification.from_pretrained(
            bases(family).folder, num_labels=classes
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = get_peft_model(base, config)
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and "norm" not in name:
                    torch.nn.init.normal_(parameter, std=0.3)
            model.save_pretrained(tmp_path / "saved")
        head = model.base_model.model.score.modules_to_save["default"].weight
        return Saved(tmp_path / "saved", model, head.detach())

    return make


def head_of(imported: Imported) -> ClassifierHead:
    assert imported.adapter.classifier is not None
    return imported.adapter.classifier


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2", "gpt_neox", "mixtral"])
def test_the_head_is_read_with_the_updates(family: str, bases: Any, save: Save) -> None:
    saved = save(family)
    imported = read_adapter(saved.folder, bases(family).spec)
    head = head_of(imported)
    np.testing.assert_array_equal(head.weight, saved.head.numpy())
    assert head.bias is None
    assert head.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert head.activation == "softmax"
    assert imported.adapter.updates
    assert not any("causal" in warning for warning in imported.warnings)


def test_the_head_of_an_ia3_is_read(bases: Any, save: Save) -> None:
    saved = save(config=IA3Config(task_type="SEQ_CLS"))
    imported = read_adapter(saved.folder, bases("llama").spec)
    np.testing.assert_array_equal(head_of(imported).weight, saved.head.numpy())


def test_a_head_without_a_task_type_is_read_where_the_configuration_names_it(
    bases: Any, save: Save
) -> None:
    saved = save(config=LoraConfig(target_modules=["q_proj"], modules_to_save=["score"]))
    assert json.loads((saved.folder / CONFIG).read_text())["auto_mapping"]["base_model_class"] == (
        "LlamaForSequenceClassification"
    )
    assert head_of(read_adapter(saved.folder, bases("llama").spec)).classes == 3
    saved.edit(auto_mapping={"base_model_class": "MistralForSequenceClassification"})
    with pytest.raises(BaseMismatchError):
        read_adapter(saved.folder, bases("llama").spec)


def test_names_of_a_state_dict_are_read_as_the_same_version(bases: Any, save: Save) -> None:
    saved, spec = save(), bases("llama").spec
    digest = adapter_bytes.digest(read_adapter(saved.folder, spec).adapter)

    def state_dict(key: str) -> str:
        key = key.replace(".score.", ".score.modules_to_save.default.")
        return f"module.{key}".replace(".lora_A.", ".lora_A.default.")

    saved.rename(state_dict)
    tensors = load_file(saved.folder / WEIGHTS)
    original = "module.base_model.model.score.original_module.weight"
    save_file({**tensors, original: torch.zeros(3, 32)}, saved.folder / WEIGHTS)
    assert adapter_bytes.digest(read_adapter(saved.folder, spec).adapter) == digest


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrow_head_is_kept_whole(dtype: torch.dtype, bases: Any, save: Save) -> None:
    saved = save()
    tensors = load_file(saved.folder / WEIGHTS)
    save_file({k: t.to(dtype) for k, t in tensors.items()}, saved.folder / WEIGHTS)
    head = head_of(read_adapter(saved.folder, bases("llama").spec))
    np.testing.assert_array_equal(head.weight, saved.head.to(dtype).float().numpy())


@pytest.mark.parametrize("in_adapter_config", [True, False])
def test_labels_and_the_kind_of_problem_are_read_from_either_file(
    in_adapter_config: bool, bases: Any, save: Save
) -> None:
    saved = save()
    fields = {
        "id2label": {"1": "bad", "0": "good", "2": "né"},
        "label2id": {"bad": 1, "good": 0, "né": 2},
        "problem_type": "multi_label_classification",
    }
    (saved.edit if in_adapter_config else saved.describe)(**fields)
    head = head_of(read_adapter(saved.folder, bases("llama").spec))
    assert head.labels == ("good", "bad", "né")
    assert head.activation == "sigmoid"


@pytest.mark.parametrize(
    ("classes", "problem", "activation"),
    [
        (1, None, "sigmoid"),
        (2, None, "softmax"),
        (1, "regression", "identity"),
        (3, "regression", "identity"),
        (1, "single_label_classification", "sigmoid"),
        (2, "single_label_classification", "softmax"),
        (1, "multi_label_classification", "sigmoid"),
    ],
)
def test_the_activation_follows_from_problem_and_classes(
    classes: int, problem: str | None, activation: str, bases: Any, save: Save
) -> None:
    saved = save(classes=classes)
    saved.describe(problem_type=problem, model_type="llama")
    assert head_of(read_adapter(saved.folder, bases("llama").spec)).activation == activation


def refused(kind: type[StoreError], saved: Saved, spec: Any) -> StoreError:
    with pytest.raises(StoreError) as caught:
        read_adapter(saved.folder, spec)
    assert type(caught.value) is kind
    assert caught.value.remedy
    return caught.value


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({"id2label": {"0": "a", "1": "b"}}, "id2label"),
        ({"id2label": {"0": "a", "1": "b", "3": "c"}}, "id2label"),
        ({"id2label": ["a", "b", "c"]}, "id2label"),
        ({"id2label": {"0": "a", "1": "b", "2": 7}}, "id2label"),
        ({"id2label": {"0": "a", "1": "b", "2": "x" * 1001}}, "id2label"),
        ({"num_labels": 4}, "num_labels"),
        ({"num_labels": True}, "num_labels"),
        ({"problem_type": "other"}, "problem_type"),
        ({"problem_type": 3}, "problem_type"),
    ],
)
def test_what_does_not_describe_the_head_is_refused_by_its_field(
    fields: dict[str, Any], key: str, bases: Any, save: Save
) -> None:
    saved = save()
    saved.describe(**fields)
    assert refused(InvalidAdapterError, saved, bases("llama").spec).key == key


def test_a_missing_head_is_named(bases: Any, save: Save) -> None:
    saved = save()
    tensors = load_file(saved.folder / WEIGHTS)
    save_file({k: t for k, t in tensors.items() if k != SCORE}, saved.folder / WEIGHTS)
    error = refused(InvalidAdapterError, saved, bases("llama").spec)
    assert (error.file, error.key) == (WEIGHTS, SCORE)


def test_a_head_of_another_width_is_refused(bases: Any, save: Save) -> None:
    saved = save()
    tensors = load_file(saved.folder / WEIGHTS)
    save_file({**tensors, SCORE: torch.zeros(3, 31)}, saved.folder / WEIGHTS)
    assert refused(BaseMismatchError, saved, bases("llama").spec).key == SCORE


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("base_model.model.classifier.weight", InvalidAdapterError),
        ("base_model.model.score.modules_to_save.other.weight", InvalidAdapterError),
        ("base_model.model.classifier.dense.weight", UnsupportedFeatureError),
        ("base_model.model.score.dense.weight", UnsupportedFeatureError),
    ],
)
def test_two_heads_and_deep_heads_are_refused(
    name: str, kind: type[StoreError], bases: Any, save: Save
) -> None:
    saved = save()
    tensors = load_file(saved.folder / WEIGHTS)
    if kind is UnsupportedFeatureError:
        del tensors[SCORE]
    save_file({**tensors, name: torch.zeros(3, 32)}, saved.folder / WEIGHTS)
    refused(kind, saved, bases("llama").spec)


def test_a_head_of_another_task_is_refused(bases: Any, save: Save) -> None:
    saved, spec = save(), bases("llama").spec
    saved.edit(modules_to_save=["score"], task_type="CAUSAL_LM")
    assert refused(UnsupportedFeatureError, saved, spec).key == SCORE
    saved.edit(task_type="TOKEN_CLS")
    assert refused(UnsupportedFeatureError, saved, spec).key == "task_type"


@pytest.mark.parametrize("model_type", ["minicpm3", "modernbert-decoder"])
def test_a_base_whose_classifier_reads_other_states_is_refused(
    model_type: str, bases: Any, save: Save
) -> None:
    spec = replace(bases("llama").spec, model_type=model_type)
    saved = save(config=LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"]))
    assert "read" in str(refused(UnsupportedFeatureError, saved, spec)) or "PEFT" in str(
        refused(UnsupportedFeatureError, saved, spec)
    )


def with_head(**changes: Any) -> CanonicalAdapter:
    fields = {
        "weight": np.arange(8, dtype=np.float32).reshape(2, 4),
        "bias": None,
        "labels": ("a", "b"),
        "activation": "softmax",
    }
    head = ClassifierHead(**{**fields, **changes})
    return CanonicalAdapter("LlamaForCausalLM", "base", {}, classifier=head)


@pytest.mark.parametrize(
    "change",
    [
        {"weight": np.ones((2, 4), np.float32)},
        {"bias": np.zeros(2, np.float32)},
        {"labels": ("a", "c")},
        {"activation": "sigmoid"},
    ],
)
def test_every_part_of_the_head_is_in_the_digest(change: dict[str, Any]) -> None:
    plain = adapter_bytes.digest(with_head())
    assert adapter_bytes.digest(with_head()) == plain
    assert adapter_bytes.digest(with_head(**change)) != plain
    assert adapter_bytes.digest(replace(with_head(), classifier=None)) != plain


@pytest.mark.parametrize("bias", [None, np.array([1.5, -2.0], np.float32)])
def test_a_stored_head_is_read_back_with_torch_and_without(bias: Any, tmp_path: Path) -> None:
    store, adapter = Store(tmp_path), with_head(bias=bias)
    version = store.add("kind", adapter)
    assert version.classifier
    assert Store(tmp_path).resolve("kind").digest == version.digest
    assert store.snapshot().find(parse_reference("kind")).classifier
    for head in (store.load(version.digest).classifier, store.classifier(version.digest)):
        assert head is not None
        np.testing.assert_array_equal(head.weight, with_head().classifier.weight)  # type: ignore[union-attr]
        assert (head.bias is None) == (bias is None)
        assert bias is None or (head.bias == bias).all()
        assert (head.labels, head.activation) == (("a", "b"), "softmax")
    info = store.info(version.digest)
    assert info.kind == "empty classifier"
    assert info.classifier is not None
    assert info.classifier.labels == ("a", "b")
    assert info.parameters == 8 + (0 if bias is None else 2)
    assert store.verify() == []


def test_an_adapter_without_a_head_has_none(tmp_path: Path, bases: Any, train: Any) -> None:
    trained = train("llama", tmp_path / "lora", target_modules=["q_proj"])
    store = Store(tmp_path / "store")
    version = store.add("lora", read_adapter(trained.folder, bases("llama").spec).adapter)
    assert not version.classifier
    assert store.classifier(version.digest) is None
    assert store.info(version.digest).classifier is None


def test_numbers_that_are_not_finite_are_refused() -> None:
    with pytest.raises(InvalidAdapterError):
        adapter_bytes.digest(with_head(weight=np.full((2, 4), np.nan, np.float32)))


def test_an_exported_head_is_read_back_as_the_same_version_and_by_peft(
    tmp_path: Path, bases: Any, save: Save
) -> None:
    saved, spec = save(), bases("llama").spec
    saved.describe(
        id2label={"0": "x", "1": "y", "2": "z"}, problem_type="multi_label_classification"
    )
    adapter = read_adapter(saved.folder, spec).adapter
    export_adapter(adapter, tmp_path / "out", ExportLayout.PEFT, spec)
    again = read_adapter(tmp_path / "out", spec).adapter
    assert adapter_bytes.digest(again) == adapter_bytes.digest(adapter)
    base = AutoModelForSequenceClassification.from_pretrained(bases("llama").folder, num_labels=3)
    ids = torch.arange(7)[None]
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        loaded = PeftModel.from_pretrained(base, tmp_path / "out").eval()
        torch.testing.assert_close(
            loaded(input_ids=ids).logits, saved.model.eval()(input_ids=ids).logits
        )


@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "identity"])
def test_probabilities_are_torchs(activation: Any) -> None:
    head = with_head(activation=activation, bias=np.array([900.0, -900.0], np.float32)).classifier
    assert head is not None
    states = np.random.default_rng(1).normal(size=(5, 4)).astype(np.float32)
    linear = torch.from_numpy(states).double() @ torch.from_numpy(head.weight).double().T
    linear += torch.tensor([900.0, -900.0], dtype=torch.float64)
    np.testing.assert_allclose(head.scores(states), linear.numpy(), rtol=1e-12)
    applied = {
        "softmax": linear.softmax(1),
        "sigmoid": linear.sigmoid(),
        "identity": linear,
    }[activation]
    np.testing.assert_allclose(head.probabilities(head.scores(states)), applied.numpy(), rtol=1e-9)


def test_the_command_line_tells_the_classes_of_a_head(tmp_path: Path) -> None:
    Store(tmp_path).add("kind", with_head())
    many = np.ones((25, 4), np.float32)
    Store(tmp_path).add("many", with_head(weight=many, labels=tuple(f"c{i}" for i in range(25))))

    def shown(name: str, *options: str) -> str:
        result = CliRunner().invoke(app, ["show", name, "--store", str(tmp_path), *options])
        assert result.exit_code == 0, result.output
        return result.output

    assert "classes by softmax: a, b (2 in all)" in shown("kind")
    assert "c19, … 5 more (25 in all)" in shown("many")
    told = json.loads(shown("kind", "--json"))["classifier"]
    assert told == {"labels": ["a", "b"], "activation": "softmax", "parameters": 8}
    listed = CliRunner().invoke(app, ["list", "--store", str(tmp_path)]).output
    assert "empty classifier" in listed
