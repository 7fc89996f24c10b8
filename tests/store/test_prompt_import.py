"""PEFT's prompts read as virtual tokens: values, bytes, what is refused and what exported."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from prompt_adapters import KINDS
from safetensors.torch import load_file, save_file
from tiny_models import make_model
from typer.testing import CliRunner

from quickchange_store.base_model.base_spec import base_spec
from quickchange_store.canonical.adapter_bytes import digest, load, write
from quickchange_store.canonical.canonical_adapter import BaseSpec, CanonicalAdapter, LowRankUpdate
from quickchange_store.canonical.prompt_part import MAX_VIRTUAL_TOKENS, VirtualPrompt
from quickchange_store.cli import app
from quickchange_store.combining.composing import GivenTerm, compose
from quickchange_store.combining.merging import Recipe, derive
from quickchange_store.errors import (
    BaseMismatchError,
    InvalidAdapterError,
    StoreError,
    UnsupportedFeatureError,
)
from quickchange_store.exporting import ExportLayout, export_adapter
from quickchange_store.importing import add_adapter, read_adapter
from quickchange_store.index import Index, decode, encode
from quickchange_store.store import Store

Saved = Callable[[str], tuple[Path, PeftModel]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseSpec:
    path = tmp_path_factory.mktemp("base")
    make_model("llama").save_pretrained(path)
    return base_spec(str(path))


@pytest.fixture
def saved(tmp_path: Path) -> Saved:
    """Saves a random prompt of a kind; gives its folder and PEFT's model."""

    def save(kind: str) -> tuple[Path, PeftModel]:
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of options that PEFT does not use
            model = get_peft_model(make_model("llama"), KINDS[kind]()).eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        torch.nn.init.normal_(parameter, std=0.4)
            model.save_pretrained(tmp_path / kind)
        return tmp_path / kind, model

    return save


def edited(folder: Path, **fields: Any) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_the_values_are_what_peft_hands_to_the_model(
    kind: str, saved: Saved, base: BaseSpec
) -> None:
    folder, model = saved(kind)
    tasks = torch.tensor([0]) if "multitask" in kind else None
    with torch.no_grad():
        given = model.get_prompt(1, task_ids=tasks)
    prompt = read_adapter(folder, base).adapter.prompt
    assert prompt is not None
    if prompt.form == "embeddings":
        torch.testing.assert_close(prompt.values, given[0])  # an LSTM's last bits vary
        assert prompt.kind == "prompt tuning"
    else:
        layers = [torch.stack([layer.keys[0], layer.values[0]]) for layer in given.layers]
        torch.testing.assert_close(prompt.values, torch.stack(layers), rtol=0, atol=0)
        assert prompt.kind == "prefix tuning"
    assert prompt.tokens == model.active_peft_config.num_virtual_tokens


@pytest.mark.parametrize("kind", ["prompt tuning", "prefix tuning"])
def test_it_is_stored_shown_and_exported_as_it_was(
    kind: str, saved: Saved, base: BaseSpec, tmp_path: Path
) -> None:
    folder, model = saved(kind)
    store = Store(tmp_path / "store")
    added = add_adapter(store, "mine", folder, base)
    tokens = model.active_peft_config.num_virtual_tokens
    assert added.version.virtual_tokens == tokens
    (again,) = Store(tmp_path / "store").versions("mine")
    assert again.virtual_tokens == tokens
    info = store.info(added.version.digest)
    assert info.prompt is not None
    assert (info.kind, info.prompt.tokens) == (kind, tokens)
    assert info.parameters == info.prompt.tokens * (48 if kind == "prompt tuning" else 3 * 2 * 24)
    read = store.load(added.version.digest)
    assert digest(read) == added.version.digest
    export_adapter(read, tmp_path / "out", ExportLayout.PEFT, base)
    assert digest(read_adapter(tmp_path / "out", base).adapter) == added.version.digest
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        written = PeftModel.from_pretrained(make_model("llama"), tmp_path / "out").eval()
    ids = torch.tensor([[5, 6, 7]])
    with torch.inference_mode():
        torch.testing.assert_close(written(input_ids=ids).logits, model(input_ids=ids).logits)
    for layout in (ExportLayout.LORAX, ExportLayout.TURBO, ExportLayout.VLLM):
        with pytest.raises(UnsupportedFeatureError, match="virtual tokens"):
            export_adapter(read, tmp_path / "other", layout, base)
    shown = CliRunner().invoke(app, ["show", "mine", "--store", str(tmp_path / "store"), "--json"])
    detail = json.loads(shown.stdout)
    assert (detail["kind"], detail["virtual_tokens"]) == (kind, tokens)
    checked = CliRunner().invoke(app, ["check", str(folder), "--base", base.name, "--json"])
    assert json.loads(checked.stdout)["served"]["kind"] == kind


def test_a_lora_with_virtual_tokens_keeps_both(tmp_path: Path) -> None:
    update = LowRankUpdate(torch.ones(1, 4), torch.ones(4, 1), 1.0)
    prompt = VirtualPrompt("embeddings", torch.ones(2, 4))
    adapter = CanonicalAdapter("LlamaForCausalLM", "", {"q": update}, prompt=prompt)
    store = Store(tmp_path)
    version = store.add("both", adapter)
    assert store.info(version.digest).kind == "LoRA with prompt tuning"
    read = store.load(version.digest)
    assert read.prompt is not None
    assert torch.equal(read.prompt.values, prompt.values)
    assert version.digest != store.add("one", replace(adapter, prompt=None)).digest


def test_values_of_another_form_are_damage(tmp_path: Path) -> None:
    prompt = VirtualPrompt("cache", torch.ones(1, 2, 1, 3, 4))
    path = tmp_path / "adapter"
    with path.open("wb") as file:
        write(CanonicalAdapter("LlamaForCausalLM", "", {}, prompt=prompt), file)
    assert load(path).virtual_tokens == 3
    content = path.read_bytes()
    path.write_bytes(content.replace(b'\\"form\\":\\"cache\\"', b'\\"form\\":\\"cacha\\"'))
    assert path.read_bytes() != content
    with pytest.raises(StoreError, match="cacha"):
        load(path)


@pytest.mark.parametrize(
    ("form", "shape"),
    [
        ("embeddings", (2, 3, 4)),
        ("embeddings", (0, 4)),
        ("embeddings", (MAX_VIRTUAL_TOKENS + 1, 1)),
        ("cache", (2, 4)),
        ("cache", (1, 3, 1, 2, 4)),
        ("words", (2, 4)),
    ],
)
def test_shapes_that_are_no_prompt_are_refused(form: Any, shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidAdapterError) as caught:
        VirtualPrompt(form, torch.zeros(shape))
    assert caught.value.remedy


def test_several_tasks_are_refused_with_what_to_save(saved: Saved, base: BaseSpec) -> None:
    folder, _ = saved("multitask with its one task")
    path = folder / "adapter_model.safetensors"
    tensors = {
        key: tensor if key == "prompt_embeddings" else torch.cat([tensor, tensor])
        for key, tensor in load_file(path).items()
    }
    save_file(tensors, path)
    with pytest.raises(UnsupportedFeatureError, match="task id") as caught:
        read_adapter(edited(folder, num_tasks=2), base)
    assert caught.value.key == "num_tasks"
    assert "PROMPT_TUNING" in str(caught.value.remedy)


@pytest.mark.parametrize(
    ("kind", "fields", "key"),
    [
        ("prompt tuning", {"num_virtual_tokens": 6}, "prompt_embeddings"),
        ("prompt tuning", {"num_virtual_tokens": None}, "num_virtual_tokens"),
        ("prompt tuning", {"num_virtual_tokens": True}, "num_virtual_tokens"),
        ("prompt tuning", {"num_transformer_submodules": 2}, "num_transformer_submodules"),
        ("prompt tuning", {"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ("prompt tuning", {"later_field": 1}, "later_field"),
        ("prefix tuning", {"num_layers": 2}, "token_dim"),
        ("prefix tuning", {"token_dim": 25}, "token_dim"),
        ("prefix tuning", {"num_attention_heads": 0}, "num_attention_heads"),
        ("prefix tuning", {"token_dim": 1 << 40}, "token_dim"),
    ],
)
def test_what_can_t_be_served_is_refused_by_its_field(
    kind: str, fields: dict[str, Any], key: str, saved: Saved, base: BaseSpec
) -> None:
    folder, _ = saved(kind)
    with pytest.raises(StoreError) as caught:
        read_adapter(edited(folder, **fields), base)
    assert caught.value.key == key
    assert caught.value.remedy


def test_a_prompt_of_another_base_is_refused(saved: Saved, tmp_path: Path) -> None:
    make_model("qwen3").save_pretrained(tmp_path / "qwen3")
    other = base_spec(str(tmp_path / "qwen3"))  # whose keys are wider
    folder, _ = saved("prefix tuning")
    with pytest.raises(BaseMismatchError, match="keys of 24 numbers in 3 layers"):
        read_adapter(edited(folder, auto_mapping=None), other)


def test_a_tensor_that_no_prompt_has_is_refused(saved: Saved, base: BaseSpec) -> None:
    folder, _ = saved("prompt tuning")
    path = folder / "adapter_model.safetensors"
    save_file({**load_file(path), "mlp_head.0.weight": torch.zeros(2)}, path)
    with pytest.raises(InvalidAdapterError) as caught:
        read_adapter(folder, base)
    assert caught.value.key == "mlp_head.0.weight"


def test_an_index_with_virtual_tokens_is_read_again_and_has_a_format_of_its_own(
    tmp_path: Path,
) -> None:
    store = Store(tmp_path)
    prompt = VirtualPrompt("embeddings", torch.ones(2, 4))
    store.add("mine", CanonicalAdapter("LlamaForCausalLM", "", {}, prompt=prompt))
    index: Index = store.snapshot()
    assert json.loads(encode(index))["format"] == 4
    assert decode(encode(index), "index") == index


def test_one_prompt_may_be_a_term_of_a_composition_and_none_be_merged(tmp_path: Path) -> None:
    store = Store(tmp_path)
    update = LowRankUpdate(torch.ones(1, 4), torch.ones(4, 1), 1.0)
    store.add("lora", CanonicalAdapter("LlamaForCausalLM", "", {"q": update}))
    for number, name in enumerate(("front", "other")):
        prompt = VirtualPrompt("embeddings", torch.full((2, 4), float(number)))
        store.add(name, CanonicalAdapter("LlamaForCausalLM", "", {}, prompt=prompt))
    assert len(compose(store, "sum", [GivenTerm("lora", 0.5), GivenTerm("front")]).needs) == 2
    for terms in (
        [GivenTerm("front"), GivenTerm("other")],
        [GivenTerm("front", 0.5)],
        [GivenTerm("front", end=9)],
    ):
        with pytest.raises(UnsupportedFeatureError, match="in front of the text once"):
            compose(store, "bad", terms)
    merged = [(store.resolve(name).digest, 1.0) for name in ("lora", "front")]
    with pytest.raises(UnsupportedFeatureError, match="2 virtual tokens"):
        derive(store, Recipe("ties", tuple(merged), 0.5))
