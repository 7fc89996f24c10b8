"""LoRA of experts: both layouts are read as what PEFT computes, written back, refused by name."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quickchange_store.canonical.adapter_bytes import digest, load, write
from quickchange_store.errors import BaseMismatchError, InvalidAdapterError, UnsupportedFeatureError
from quickchange_store.exporting import ExportLayout, export_adapter
from quickchange_store.importing import read_adapter
from quickchange_store.info import describe

BOTH = ["experts.gate_up_proj", "experts.down_proj"]
FAMILIES = ["mixtral", "qwen3_moe", "gpt_oss"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "options",
    [
        {"target_parameters": BOTH, "target_modules": []},
        {"target_parameters": BOTH[:1], "target_modules": ["q_proj"]},
        {"target_parameters": BOTH[1:], "target_modules": []},
        {
            "target_parameters": BOTH,
            "target_modules": ["v_proj"],
            "use_rslora": True,
            "rank_pattern": {"down_proj": 11},
            "alpha_pattern": {r"layers\.1\.mlp\.experts\.gate_up_proj": 3},
        },
    ],
    ids=["both", "gate and up", "down", "patterns"],
)
def test_parameters_of_experts_are_read_as_peft_computes_them(
    family: str,
    options: dict[str, Any],
    bases: Any,
    train: Any,
    canonical_logits: Any,
    tmp_path: Path,
) -> None:
    trained = train(family, tmp_path, r=4, lora_alpha=6, **options)
    adapter = read_adapter(tmp_path, bases(family).spec).adapter
    logits = canonical_logits(bases(family).model, adapter)
    torch.testing.assert_close(logits, trained.logits, rtol=1e-3, atol=1e-3)
    with torch.inference_mode():
        plain = bases(family).model(input_ids=torch.arange(12).reshape(2, 6) * 4 % 53).logits
    assert (plain - trained.logits).abs().max() > 0.1, "the adapter changes nothing"


# What a checkpoint of transformers 4 calls the modules of one expert.
MODULES = {
    "mixtral": ("block_sparse_moe.experts", "w1", "w3", "w2"),
    "qwen3_moe": ("mlp.experts", "gate_proj", "up_proj", "down_proj"),
}


def of_modules(
    family: str, spec: Any, folder: Path, ranks: tuple[int, int, int], **options: Any
) -> dict[str, torch.Tensor]:
    """An adapter with modules of single experts, as transformers 4 has them: its deltas by path."""
    owner, *names = MODULES[family]
    hidden, inner = 32, 24 if family == "qwen3_moe" else 48
    sizes = [(hidden, inner), (hidden, inner), (inner, hidden)]
    generator = torch.Generator().manual_seed(3)
    tensors, deltas = {}, {}
    experts = next(iter(spec.experts.values())).experts
    for layer in range(2):
        for expert in range(experts):
            for name, rank, (features, width) in zip(names, ranks, sizes, strict=True):
                path = f"model.layers.{layer}.{owner}.{expert}.{name}"
                a = torch.randn(rank, features, generator=generator)
                b = torch.randn(width, rank, generator=generator)
                tensors[f"base_model.model.{path}.lora_A.weight"] = a
                tensors[f"base_model.model.{path}.lora_B.weight"] = b
                deltas[f"{layer}.{expert}.{name}"] = b @ a
    config = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": names,
        **options,
    }
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return deltas


@pytest.mark.parametrize("family", sorted(MODULES))
@pytest.mark.parametrize("targets", ["names", "all-linear", "expression"])
def test_modules_of_single_experts_become_parts_of_their_matrices(
    family: str, targets: str, bases: Any, tmp_path: Path
) -> None:
    spec = bases(family).spec
    _, gate, up, down = MODULES[family]
    options: dict[str, Any] = {"rank_pattern": {up: 3}, "alpha_pattern": {down: 2}}
    if targets != "names":
        expression = rf".*experts\.\d+\.({gate}|{up}|{down})"
        options["target_modules"] = targets if targets == "all-linear" else expression
    if targets == "all-linear":  # which covers attention too
        options["exclude_modules"] = ["q_proj", "k_proj", "v_proj", "o_proj"]
    deltas = of_modules(family, spec, tmp_path, (4, 3, 4), **options)
    adapter = read_adapter(tmp_path, spec).adapter
    scales = {gate: 8 / 4, up: 8 / 3, down: 2 / 4}
    experts = next(iter(spec.experts.values())).experts
    assert len(adapter.updates) == 2 * 2 * experts
    for path, update in adapter.updates.items():
        _, _, layer, _, _, matrix, expert = path.split(".")
        names = [gate, up] if matrix == "gate_up_proj" else [down]
        wanted = [scales[name] * deltas[f"{layer}.{expert}.{name}"] for name in names]
        torch.testing.assert_close(update.scale * update.b @ update.a, torch.cat(wanted))


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_survive_the_store_and_an_export(
    family: str, bases: Any, train: Any, tmp_path: Path
) -> None:
    spec = bases(family).spec
    router = "router.weight" if family == "gpt_oss" else "gate.weight"
    options: dict[str, Any] = {"target_modules": ["q_proj"], "target_parameters": [*BOTH, router]}
    options["rank_pattern"] = {"gate_up_proj": 5, router: 2}
    trained = train(family, tmp_path / "peft", r=3, lora_alpha=7, **options)
    adapter = read_adapter(tmp_path / "peft", spec).adapter
    with (tmp_path / "stored").open("wb") as file:
        assert write(adapter, file) == digest(adapter)
    stored = load(tmp_path / "stored")
    assert digest(stored) == digest(adapter)
    export_adapter(stored, tmp_path / "exported", ExportLayout.PEFT, spec)
    again = read_adapter(tmp_path / "exported", spec).adapter
    assert digest(again) == digest(adapter)
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT looks for its patterns among modules alone
        model = PeftModel.from_pretrained(copy.deepcopy(bases(family).model), tmp_path / "exported")
    with torch.inference_mode():
        theirs = model.eval()(input_ids=torch.arange(12).reshape(2, 6) * 4 % 53).logits
    torch.testing.assert_close(theirs, trained.logits, rtol=1e-3, atol=1e-3)


def test_a_router_of_an_earlier_version_is_found_by_its_name_there(
    bases: Any, train: Any, tmp_path: Path
) -> None:
    """It was a linear, which target_modules names."""
    weight = ["gate.weight"]
    train("mixtral", tmp_path, r=4, target_modules=["q_proj"], target_parameters=weight)
    expected = read_adapter(tmp_path, bases("mixtral").spec).adapter
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config.update(target_modules=["q_proj", "gate"], target_parameters=None)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    named = {key.replace("mlp.gate", "block_sparse_moe.gate"): tensors[key] for key in tensors}
    assert named.keys() != tensors.keys()
    save_file(named, tmp_path / "adapter_model.safetensors")
    adapter = read_adapter(tmp_path, bases("mixtral").spec).adapter
    assert "model.layers.0.mlp.gate" in adapter.updates
    assert digest(adapter) == digest(expected)


Change = Callable[[dict[str, Any], dict[str, torch.Tensor]], None]
WRAPPER = "base_model.model.model.layers.0.mlp.experts"


def drop(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    del config, tensors[f"{WRAPPER}.lora_B.weight"]


def fewer(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    del config
    tensors[f"{WRAPPER}.lora_A.weight"] = tensors[f"{WRAPPER}.lora_A.weight"][:-4].clone()


def narrow(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    del tensors
    config["target_parameters"] = BOTH[1:]


def norm(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    del tensors
    config["target_parameters"] = ["input_layernorm.weight"]


def no_list(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    del tensors
    config["target_parameters"] = "experts.down_proj"


def dora(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    del tensors
    config["use_dora"] = True


@pytest.mark.parametrize(
    ("change", "error", "key"),
    [
        (drop, InvalidAdapterError, f"{WRAPPER}.lora_B.weight"),
        (fewer, BaseMismatchError, f"{WRAPPER}.lora_A.weight"),
        (narrow, InvalidAdapterError, "base_layer.lora_A"),
        (norm, UnsupportedFeatureError, "target_parameters"),
        (no_list, InvalidAdapterError, "target_parameters"),
        (dora, UnsupportedFeatureError, "use_dora"),
    ],
)
def test_what_can_not_be_served_is_refused_by_name(
    change: Change, error: type[Exception], key: str, bases: Any, train: Any, tmp_path: Path
) -> None:
    train("mixtral", tmp_path / "peft", r=4, target_modules=[], target_parameters=BOTH)
    folder = tmp_path / "changed"
    shutil.copytree(tmp_path / "peft", folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    change(config, tensors)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(error) as caught:
        read_adapter(folder, bases("mixtral").spec)
    assert key in str(caught.value)
    assert "adapter_" in str(caught.value)


def test_single_experts_of_another_number_are_refused(bases: Any, tmp_path: Path) -> None:
    spec = bases("mixtral").spec
    of_modules("mixtral", spec, tmp_path, (4, 4, 4))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    renamed = {key.replace("experts.2.", "experts.9."): value for key, value in tensors.items()}
    save_file(renamed, tmp_path / "adapter_model.safetensors")
    with pytest.raises(BaseMismatchError, match=r"experts\.9"):
        read_adapter(tmp_path, spec)


def test_the_layout_of_earlier_peft_is_told_by_its_shapes(
    bases: Any, train: Any, canonical_logits: Any, tmp_path: Path
) -> None:
    """It took every parameter as [E, in, out]: A reads what are outputs, B makes inputs."""
    trained = train("mixtral", tmp_path, r=4, target_modules=[], target_parameters=BOTH)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    turned = {}
    for key, value in tensors.items():
        other = key.replace("lora_A", "X").replace("lora_B", "lora_A").replace("X", "lora_B")
        experts, rank = 3, 4
        if "lora_A" in key:  # [E · r, in], to B's [in, r · E]
            turned[other] = value.reshape(experts, rank, -1).permute(2, 1, 0).flatten(1)
        else:
            turned[other] = value.reshape(-1, rank, experts).permute(2, 1, 0).flatten(0, 1)
    save_file(
        {k: v.contiguous() for k, v in turned.items()}, tmp_path / "adapter_model.safetensors"
    )
    adapter = read_adapter(tmp_path, bases("mixtral").spec).adapter
    logits = canonical_logits(bases("mixtral").model, adapter)
    torch.testing.assert_close(logits, trained.logits, rtol=1e-3, atol=1e-3)


def test_an_adapters_description_names_the_matrices(bases: Any, train: Any, tmp_path: Path) -> None:
    train("mixtral", tmp_path, r=4, target_modules=["q_proj"], target_parameters=BOTH)
    adapter = read_adapter(tmp_path, bases("mixtral").spec).adapter
    info = describe(adapter, "0" * 64, size=1, created=0.0, base=bases("mixtral").spec)
    assert info.targets == ("down_proj", "gate_up_proj", "q_proj")


def test_a_linears_weight_may_be_targeted_as_a_parameter(
    bases: Any, train: Any, canonical_logits: Any, tmp_path: Path
) -> None:
    parameters = ["q_proj.weight", "down_proj.weight"]
    trained = train("llama", tmp_path, r=4, target_modules=[], target_parameters=parameters)
    adapter = read_adapter(tmp_path, bases("llama").spec).adapter
    assert len(adapter.updates) == 2 * bases("llama").model.config.num_hidden_layers
    logits = canonical_logits(bases("llama").model, adapter)
    torch.testing.assert_close(logits, trained.logits, rtol=1e-3, atol=1e-3)
