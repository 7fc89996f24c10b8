"""What trainers write is the adapter that PEFT's own folder is, or is refused with the remedy."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from trainer_layouts import (
    CONFIG,
    REFUSED,
    SERVED,
    TUNE,
    TrainerLayout,
    factors,
    kohya,
    megatron,
    paired,
    replaced,
    write_peft,
    write_torchtune,
)

from quickchange_store.canonical.adapter_bytes import digest
from quickchange_store.errors import (
    BaseMismatchError,
    InvalidAdapterError,
    StoreError,
    UnsupportedFeatureError,
)
from quickchange_store.importing import read_adapter


def name(layout: TrainerLayout) -> str:
    return f"{layout.trainer}: {layout.writes}"


@pytest.fixture(scope="module")
def plain(bases: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("plain")
    write_peft(folder)
    return digest(read_adapter(folder, bases("llama").spec).adapter)


@pytest.mark.parametrize("layout", SERVED, ids=name)
def test_a_trainers_folder_is_the_adapter_that_pefts_is(
    layout: TrainerLayout, plain: str, bases: Any, tmp_path: Path
) -> None:
    layout.write(tmp_path)
    assert digest(read_adapter(tmp_path, bases("llama").spec).adapter) == plain


@pytest.mark.parametrize("layout", REFUSED, ids=name)
def test_what_is_no_adapter_yet_is_refused_with_what_makes_it_one(
    layout: TrainerLayout, bases: Any, tmp_path: Path
) -> None:
    layout.write(tmp_path)
    with pytest.raises(StoreError) as caught:
        read_adapter(tmp_path, bases("llama").spec)
    assert caught.value.file
    assert layout.refused is not None
    assert layout.refused in str(caught.value.remedy)


def refused(folder: Path, base: Any, kind: type[StoreError] = StoreError) -> StoreError:
    with pytest.raises(kind) as caught:
        read_adapter(folder, base)
    assert caught.value.file
    assert caught.value.remedy
    return caught.value


def edit(path: Path, change: Any) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


# --- torchtune ----------------------------------------------------------------------------------


def test_torchtune_keeps_the_rows_of_qwen(bases: Any, tmp_path: Path) -> None:
    """Its Qwen rotates halves, as transformers does."""
    base = dataclasses.replace(bases("llama").spec, model_type="qwen2")
    (tmp_path / "plain").mkdir()
    write_peft(tmp_path / "plain")
    names = {key: replaced(key, TUNE) for key in factors()}
    folder = tmp_path / "tune"
    folder.mkdir()
    write_torchtune(folder)
    torch.save({names[key]: each for key, each in factors().items()}, folder / "adapter_model.pt")
    ours, theirs = (
        digest(read_adapter(tmp_path / each, base).adapter) for each in ("tune", "plain")
    )
    assert ours == theirs


def test_torchtunes_rows_of_a_type_that_is_not_known_are_refused(
    bases: Any, tmp_path: Path
) -> None:
    write_torchtune(tmp_path)
    base = dataclasses.replace(bases("llama").spec, model_type="phi3")
    error = refused(tmp_path, base, UnsupportedFeatureError)
    assert (error.file, error.key) == ("adapter_model.pt", "layers.0.attn.k_proj.lora_b.weight")
    assert "'phi3'" in str(error)


@pytest.mark.parametrize("width", [None, 7, 64])
def test_torchtunes_rows_need_whole_heads(bases: Any, tmp_path: Path, width: int | None) -> None:
    write_torchtune(tmp_path)
    base = dataclasses.replace(bases("llama").spec, head_dim=width)
    assert "heads" in str(refused(tmp_path, base, BaseMismatchError))


def test_torchtunes_magnitudes_are_in_the_order_of_their_rows(bases: Any, tmp_path: Path) -> None:
    base = bases("llama").spec
    path = "model.layers.0.self_attn.q_proj"
    magnitude = torch.arange(1.0, 33.0)
    for folder, tensors in {
        "peft": {f"base_model.model.{path}.lora_magnitude_vector": magnitude},
        "tune": {"layers.0.attn.q_proj.magnitude": paired(magnitude[:, None]).flatten()},
    }.items():
        for part, shape in (("A", (4, 32)), ("B", (32, 4))):
            tensor = torch.linspace(-1, 1, 128).reshape(shape)
            if folder == "tune":
                rows = paired(tensor) if part == "B" else tensor
                tensors[f"layers.0.attn.q_proj.lora_{part.lower()}.weight"] = rows
            else:
                tensors[f"base_model.model.{path}.lora_{part}.weight"] = tensor
        targets = [path] if folder == "peft" else None
        dora = {"use_dora": True} if folder == "peft" else {}
        config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": targets, **dora}
        (tmp_path / folder).mkdir()
        (tmp_path / folder / CONFIG).write_text(json.dumps(config))
        save_file(tensors, tmp_path / folder / "adapter_model.safetensors")
    ours, theirs = (
        digest(read_adapter(tmp_path / each, base).adapter) for each in ("tune", "peft")
    )
    assert ours == theirs


def test_a_module_that_torchtunes_configuration_targets_is_not_dropped(
    bases: Any, tmp_path: Path
) -> None:
    write_torchtune(tmp_path)
    tensors = torch.load(tmp_path / "adapter_model.pt", weights_only=True)
    kept = {key: tensor for key, tensor in tensors.items() if "layers.1.mlp.w2" not in key}
    torch.save(kept, tmp_path / "adapter_model.pt")
    assert "layers.1.mlp.down_proj" in str(refused(tmp_path, bases("llama").spec))


# --- Megatron -----------------------------------------------------------------------------------

NEMO = "decoder.layers.{layer}.{block}.{linear}.adapter.linear_%s.weight"


@pytest.mark.parametrize("linear", ["linear_qkv", "linear_fc1"])
def test_a_part_of_a_joined_linear_is_refused(bases: Any, tmp_path: Path, linear: str) -> None:
    """One of two tensor-parallel ranks."""
    megatron(NEMO % "in", NEMO % "out")(tmp_path)
    block = "self_attention" if linear == "linear_qkv" else "mlp"
    key = f"decoder.layers.1.{block}.{linear}.adapter.linear_out.weight"

    def halve(tensors: dict[str, torch.Tensor]) -> None:
        tensors[key] = tensors[key][: len(tensors[key]) // 2].clone()

    edit(tmp_path / "adapter_model.safetensors", halve)
    error = refused(tmp_path, bases("llama").spec, BaseMismatchError)
    assert error.key == key
    assert "tensor-parallel" in str(error.remedy)


def test_megatrons_names_without_rank_and_alpha_are_refused(bases: Any, tmp_path: Path) -> None:
    megatron(NEMO % "in", NEMO % "out")(tmp_path)
    (tmp_path / CONFIG).unlink()
    assert refused(tmp_path, bases("llama").spec, InvalidAdapterError).key == "r"


def test_a_joined_linear_of_a_base_with_other_modules_is_refused(
    bases: Any, tmp_path: Path
) -> None:
    megatron(NEMO % "in", NEMO % "out")(tmp_path)
    assert "GPTNeoX" in str(refused(tmp_path, bases("gpt_neox").spec, BaseMismatchError))


# --- Kohya --------------------------------------------------------------------------------------

DOWN = "lora_te_model_layers_0_self_attn_q_proj.lora_down.weight"
LAST = "last.safetensors"


def test_kohyas_alphas_and_ranks_may_differ_by_module(bases: Any, tmp_path: Path) -> None:
    kohya("lora_te_")(tmp_path)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        module = DOWN.partition(".")[0]
        tensors[DOWN] = tensors[DOWN][:2].clone()
        tensors[f"{module}.lora_up.weight"] = tensors[f"{module}.lora_up.weight"][:, :2].clone()
        tensors[f"{module}.alpha"] = torch.tensor(5.0, dtype=torch.bfloat16)
        del tensors[f"{module.replace('q_proj', 'k_proj')}.alpha"]
        tensors[f"{module.replace('q_proj', 'o_proj')}.alpha"] = torch.tensor(8)

    edit(tmp_path / LAST, change)
    updates = read_adapter(tmp_path, bases("llama").spec).adapter.updates
    path = "model.layers.0.self_attn.q_proj"
    assert (updates[path].rank, updates[path].scale) == (2, 2.5)
    assert updates[path.replace("q_", "k_")].scale == 1.0
    assert updates[path.replace("q_", "v_")].scale == 1.5
    assert updates[path.replace("q_", "o_")].scale == 2.0


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("lora_te_model", "lora_te_vision_model_model"),
        ("layers_0", "layers_7"),
        ("lora_te_", "lora_te_text_model_encoder_"),
        (".lora_down.weight", ".lora_mid.weight"),
        (".lora_down.weight", ".hada_w1_a"),
    ],
)
def test_what_is_no_module_of_the_base_is_refused_by_its_key(
    bases: Any, tmp_path: Path, old: str, new: str
) -> None:
    kohya("lora_te_")(tmp_path)
    key = DOWN.replace(old, new)
    edit(tmp_path / LAST, lambda tensors: tensors.update({key: tensors.pop(DOWN)}))
    assert refused(tmp_path, bases("llama").spec, BaseMismatchError).key == key


def test_two_scales_that_disagree_are_refused(bases: Any, tmp_path: Path) -> None:
    kohya("lora_te_")(tmp_path)
    (tmp_path / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 16}))
    assert refused(tmp_path, bases("llama").spec, InvalidAdapterError).key == "lora_alpha"


@pytest.mark.parametrize("alpha", [torch.ones(2), torch.tensor(float("nan")), torch.tensor([])])
def test_an_alpha_that_is_no_number_is_refused(
    bases: Any, tmp_path: Path, alpha: torch.Tensor
) -> None:
    kohya("lora_te_")(tmp_path)
    key = f"{DOWN.partition('.')[0]}.alpha"
    edit(tmp_path / LAST, lambda tensors: tensors.update({key: alpha}))
    assert refused(tmp_path, bases("llama").spec).key == key


# --- MLX's experts ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "owner", "names", "inner"),
    [
        ("qwen3_moe", "mlp", ("gate_proj", "up_proj", "down_proj"), 24),
        ("mixtral", "block_sparse_moe", ("w1", "w3", "w2"), 48),
    ],
)
def test_mlx_has_the_experts_of_a_layer_in_one_tensor(
    bases: Any, tmp_path: Path, family: str, owner: str, names: tuple[str, ...], inner: int
) -> None:
    base = bases(family).spec
    experts = next(iter(base.experts.values())).experts
    generator = torch.Generator().manual_seed(1)
    peft, mlx = {}, {}
    for layer in range(2):
        for name, theirs in zip(names, ("gate_proj", "up_proj", "down_proj"), strict=True):
            sizes = (inner, 32) if theirs == "down_proj" else (32, inner)
            a = torch.randn(experts, 4, sizes[0], generator=generator)
            b = torch.randn(experts, sizes[1], 4, generator=generator)
            place = f"model.layers.{layer}.{owner}"
            mlx[f"{place}.switch_mlp.{theirs}.lora_a"] = a
            mlx[f"{place}.switch_mlp.{theirs}.lora_b"] = b
            for expert in range(experts):
                module = f"base_model.model.{place}.experts.{expert}.{name}"
                peft[f"{module}.lora_A.weight"] = a[expert].clone()
                peft[f"{module}.lora_B.weight"] = b[expert].clone()
    (tmp_path / "peft").mkdir()
    save_file(peft, tmp_path / "peft" / "adapter_model.safetensors")
    (tmp_path / "peft" / CONFIG).write_text(
        json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": list(names)})
    )
    (tmp_path / "mlx").mkdir()
    save_file(mlx, tmp_path / "mlx" / "adapters.safetensors")
    parameters = {"rank": 4, "scale": 2.0, "dropout": 0.0}
    config = {"fine_tune_type": "lora", "lora_parameters": parameters}
    (tmp_path / "mlx" / CONFIG).write_text(json.dumps(config))
    ours, theirs_digest = (
        digest(read_adapter(tmp_path / each, base).adapter) for each in ("mlx", "peft")
    )
    assert ours == theirs_digest
