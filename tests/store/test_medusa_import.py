"""Medusa heads in LoRAX's and vLLM's layouts: folders written by hand from the layouts' tables."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from quickchange_store.canonical import adapter_bytes
from quickchange_store.canonical.canonical_adapter import BaseSpec, CanonicalAdapter
from quickchange_store.canonical.turbo_part import TurboHeads
from quickchange_store.errors import (
    BaseMismatchError,
    BaseModelError,
    InvalidAdapterError,
    StoreError,
    UnsupportedFeatureError,
)
from quickchange_store.importing import add_adapter, read_adapter
from quickchange_store.store import Store

H, V, N = 32, 53, 3  # of the base models in conftest; heads
CONFIG, WEIGHTS = "config.json", "medusa_lm_head.safetensors"
Tensors = dict[str, torch.Tensor]


def lorax_tensors(layers: int = 1, own: bool = False) -> Tensors:
    generator = torch.Generator().manual_seed(7)
    made: Tensors = {}
    for i in range(N):
        for j in range(layers):
            made[f"{i}.{j}.linear.weight"] = torch.randn(H, H, generator=generator)
            made[f"{i}.{j}.linear.bias"] = torch.randn(H, generator=generator)
        if own:
            made[f"{i}.{layers}.weight"] = torch.randn(V, H, generator=generator)
    return made


def vllm_tensors(layers: int = 1, bias: bool = True) -> Tensors:
    made: Tensors = {}
    for key, tensor in lorax_tensors(layers, own=True).items():
        head, layer, *rest = key.split(".")
        if rest == ["weight"]:
            made[f"lm_heads.{head}.weight"] = tensor
        elif bias or rest[-1] == "weight":
            made[f"blocks.{head}.layers.{layer}.{rest[-1]}"] = tensor
    return made


def write(folder: Path, tensors: Tensors, file: str = WEIGHTS, **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / file)
    content = {"base_model_name_or_path": "tiny", **config}
    (folder / CONFIG).write_text(json.dumps(content))
    return folder


def lorax(folder: Path, tensors: Tensors, layers: int = 1, **config: Any) -> Path:
    return write(folder, tensors, medusa_num_heads=N, medusa_num_layers=layers, **config)


def vllm(folder: Path, tensors: Tensors, layers: int = 1, **config: Any) -> Path:
    defaults = {"num_heads": N, "num_hidden_layers": layers, "medusa_fc_bias": True}
    return write(folder, tensors, "model.safetensors", **{**defaults, **config})


def read(folder: Path, base: BaseSpec) -> TurboHeads:
    turbo = read_adapter(folder, base).adapter.turbo
    assert turbo is not None
    return turbo


def drafted(turbo: TurboHeads, x: torch.Tensor, lm_head: torch.Tensor) -> torch.Tensor:
    """Logits [heads, rows, V] of parallel heads, by their definition."""
    logits = []
    for number, head in enumerate(turbo.heads):
        h = x
        for block in (turbo.blocks[index] for index in head):
            h = h + torch.nn.functional.silu(h @ block.weight.T + block.bias)
        logits.append(h @ (turbo.outputs[number] if turbo.outputs else lm_head).T)
    return torch.stack(logits)


@pytest.fixture(scope="module")
def spec(bases: Any) -> BaseSpec:
    made: BaseSpec = bases("llama").spec
    return made


@pytest.fixture(scope="module")
def lm_head(bases: Any) -> torch.Tensor:
    weight: torch.Tensor = bases("llama").model.lm_head.weight.detach()
    return weight


# --- LoRAX's layouts ----------------------------------------------------------------------------


def test_v2_heads_draft_what_the_formula_says(
    tmp_path: Path, spec: BaseSpec, lm_head: torch.Tensor
) -> None:
    tensors = lorax_tensors()
    turbo = read(lorax(tmp_path, tensors, version=2), spec)
    x = torch.randn(5, H)
    linear = [torch.nn.Linear(H, H) for _ in range(N)]
    for i, layer in enumerate(linear):
        prefix = f"{i}.0.linear."
        layer.load_state_dict({name: tensors[prefix + name] for name in ("weight", "bias")})
    with torch.inference_mode():
        expected = torch.stack([(x + torch.nn.SiLU()(f(x))) @ lm_head.T for f in linear])
        torch.testing.assert_close(drafted(turbo, x, lm_head), expected)
    assert (turbo.depth, turbo.outputs, turbo.sequential) == (N, (), False)


@pytest.mark.parametrize("version", [1, 2, 2.0, "1", "2", "2.0", None])
def test_the_layout_follows_from_the_tensors_whatever_the_version(
    version: Any, tmp_path: Path, spec: BaseSpec
) -> None:
    if version is None:
        lorax(tmp_path, lorax_tensors())
    else:
        lorax(tmp_path, lorax_tensors(), version=version)
    assert read(tmp_path, spec).outputs == ()


@pytest.mark.parametrize("version", ["two", [2], True])
def test_a_version_that_is_no_number_is_refused(
    version: Any, tmp_path: Path, spec: BaseSpec
) -> None:
    lorax(tmp_path, lorax_tensors(), version=version)
    refused(InvalidAdapterError, tmp_path, spec, CONFIG, "version")


@pytest.mark.parametrize("layers", [1, 2])
def test_v1_heads_bring_their_own_lm_heads(layers: int, tmp_path: Path, spec: BaseSpec) -> None:
    tensors = lorax_tensors(layers, own=True)
    turbo = read(lorax(tmp_path, tensors, layers, version=1), spec)
    assert turbo.heads == tuple(tuple(range(i * layers, (i + 1) * layers)) for i in range(N))
    for i in range(N):
        assert torch.equal(turbo.outputs[i], tensors[f"{i}.{layers}.weight"])
        last = turbo.blocks[turbo.heads[i][-1]]
        assert torch.equal(last.bias, tensors[f"{i}.{layers - 1}.linear.bias"])


def test_the_number_of_blocks_is_one_where_nothing_says_it(tmp_path: Path, spec: BaseSpec) -> None:
    write(tmp_path, lorax_tensors(), medusa_num_heads=N)
    assert read(tmp_path, spec).heads == ((0,), (1,), (2,))


def test_heads_may_lie_in_several_files(tmp_path: Path, spec: BaseSpec) -> None:
    whole = adapter_bytes.digest(read_adapter(lorax(tmp_path / "a", lorax_tensors()), spec).adapter)
    parts = tmp_path / "b"
    tensors = lorax_tensors()
    for i in range(N):
        part = {key: tensors[key] for key in tensors if key.startswith(f"{i}.")}
        write(parts, part, f"part-{i}.safetensors", medusa_num_heads=N)
    assert adapter_bytes.digest(read_adapter(parts, spec).adapter) == whole


def sharded(folder: Path) -> Path:
    tensors = lorax_tensors()
    names = {key: f"medusa-{int(key[0]) % 2}.safetensors" for key in tensors}
    for file in set(names.values()):
        part = {key: tensors[key] for key in tensors if names[key] == file}
        write(folder, part, file, medusa_num_heads=N)
    index = folder / "medusa_lm_head.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    return folder


def test_an_index_of_shards_says_which_files_to_read(tmp_path: Path, spec: BaseSpec) -> None:
    sharded(tmp_path)
    (tmp_path / "another.safetensors").write_bytes(b"not read")
    assert read(tmp_path, spec).depth == N


def test_a_missing_shard_is_named(tmp_path: Path, spec: BaseSpec) -> None:
    (sharded(tmp_path) / "medusa-1.safetensors").unlink()
    index = "medusa_lm_head.safetensors.index.json"
    error = refused(InvalidAdapterError, tmp_path, spec, index, "weight_map")
    assert "medusa-1.safetensors" in str(error)


def test_an_index_can_not_leave_the_folder(tmp_path: Path, spec: BaseSpec) -> None:
    folder = sharded(tmp_path / "heads")
    save_file(lorax_tensors(), tmp_path / "outside.safetensors")
    index = folder / "medusa_lm_head.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../outside.safetensors"}}))
    refused(InvalidAdapterError, folder, spec, index.name, "weight_map")


def test_a_tensor_in_two_files_is_refused(tmp_path: Path, spec: BaseSpec) -> None:
    lorax(tmp_path, lorax_tensors())
    save_file({"1.0.linear.bias": torch.zeros(H)}, tmp_path / "more.safetensors")
    refused(InvalidAdapterError, tmp_path, spec, "more.safetensors", "1.0.linear.bias")


def test_another_base_name_warns_and_nothing_more(tmp_path: Path, spec: BaseSpec) -> None:
    lorax(tmp_path, lorax_tensors(), base_model_name_or_path="other/model")
    (warning,) = read_adapter(tmp_path, spec).warnings
    assert warning.startswith("config.json: base_model_name_or_path")


# --- vLLM's layout ------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "medusa_heads."])
@pytest.mark.parametrize("layers", [1, 2])
def test_vllms_layout_holds_the_same_heads(
    layers: int, prefix: str, tmp_path: Path, spec: BaseSpec
) -> None:
    v1 = lorax(tmp_path / "lorax", lorax_tensors(layers, own=True), layers)
    tensors = {prefix + key: tensor for key, tensor in vllm_tensors(layers).items()}
    other = vllm(tmp_path / "vllm", tensors, layers)
    digests = {adapter_bytes.digest(read_adapter(folder, spec).adapter) for folder in (v1, other)}
    assert len(digests) == 1


def test_blocks_without_bias_have_a_bias_of_zero(tmp_path: Path, spec: BaseSpec) -> None:
    vllm(tmp_path, vllm_tensors(bias=False), medusa_fc_bias=False)
    assert not any(bool(block.bias.any()) for block in read(tmp_path, spec).blocks)


def test_a_copy_of_the_bases_lm_head_is_not_stored(
    tmp_path: Path, spec: BaseSpec, lm_head: torch.Tensor
) -> None:
    tensors = {k: t for k, t in vllm_tensors().items() if not k.startswith("lm_heads")}
    vllm(tmp_path, {**tensors, "lm_heads.0.weight": lm_head}, original_lm_head=True)
    assert read(tmp_path, spec).outputs == ()


def test_a_shared_lm_head_of_other_values_is_stored_once(
    tmp_path: Path, spec: BaseSpec, lm_head: torch.Tensor
) -> None:
    tensors = {k: t for k, t in vllm_tensors().items() if not k.startswith("lm_heads")}
    vllm(tmp_path, {**tensors, "lm_heads.0.weight": lm_head + 1}, original_lm_head=True)
    adapter = read_adapter(tmp_path, spec).adapter
    assert adapter.turbo is not None
    assert len(adapter.turbo.outputs) == N
    assert adapter.parameters == N * (H * H + H) + V * H


def test_the_original_lm_head_needs_the_bases_weights(tmp_path: Path, spec: BaseSpec) -> None:
    vllm(tmp_path, vllm_tensors(), original_lm_head=True)
    bare = dataclasses.replace(spec, weights=None)
    refused(BaseModelError, tmp_path, bare, "model.safetensors", "lm_heads.0.weight")


@pytest.mark.parametrize("whole", [True, False])
def test_a_token_map_is_a_draft_vocabulary(whole: bool, tmp_path: Path, spec: BaseSpec) -> None:
    tokens = torch.tensor([40, 3, 17])
    tensors = vllm_tensors()
    rows = {
        key: tensor if whole else tensor[tokens].contiguous()
        for key, tensor in tensors.items()
        if key.startswith("lm_heads")
    }
    vllm(tmp_path, {**tensors, **rows, "token_map": tokens}, truncated_vocab_size=3)
    turbo = read(tmp_path, spec)
    assert turbo.vocabulary is not None
    assert turbo.vocabulary.tolist() == [3, 17, 40]
    for i in range(N):
        assert torch.equal(turbo.outputs[i], tensors[f"lm_heads.{i}.weight"][[3, 17, 40]])


@pytest.mark.parametrize(
    ("tokens", "config", "file", "key"),
    [
        ([1, 2], {}, CONFIG, None),  # no truncated_vocab_size
        (None, {"truncated_vocab_size": 2}, CONFIG, "truncated_vocab_size"),
        ([1, 2], {"truncated_vocab_size": 3}, "model.safetensors", "token_map"),
        ([1, 1], {"truncated_vocab_size": 2}, "model.safetensors", "token_map"),
        ([1, V], {"truncated_vocab_size": 2}, "model.safetensors", "token_map"),
        ([1.0, 2.0], {"truncated_vocab_size": 2}, "model.safetensors", "token_map"),
    ],
)
def test_a_token_map_that_does_not_fit_is_refused(
    tokens: Any, config: Any, file: str, key: str | None, tmp_path: Path, spec: BaseSpec
) -> None:
    tensors = vllm_tensors()
    if tokens is not None:
        tensors["token_map"] = torch.tensor(tokens)
    vllm(tmp_path, tensors, **config)
    if key is None:
        file, key = "model.safetensors", "token_map"
    refused(InvalidAdapterError, tmp_path, spec, file, key)


@pytest.mark.parametrize(
    ("kind", "config", "key"),
    [
        (BaseMismatchError, {"hidden_size": H + 1}, "hidden_size"),
        (BaseMismatchError, {"vocab_size": V + 1}, "vocab_size"),
        (UnsupportedFeatureError, {"logit_scale": 0.5}, "logit_scale"),
        (InvalidAdapterError, {"medusa_fc_bias": "yes"}, "medusa_fc_bias"),
    ],
)
def test_what_vllms_config_says_must_fit(
    kind: type[StoreError], config: Any, key: str, tmp_path: Path, spec: BaseSpec
) -> None:
    refused(kind, vllm(tmp_path, vllm_tensors(), **config), spec, CONFIG, key)


def test_a_bias_that_the_config_denies_is_refused(tmp_path: Path, spec: BaseSpec) -> None:
    vllm(tmp_path, vllm_tensors(), medusa_fc_bias=False)
    key = "blocks.0.layers.0.bias"
    refused(InvalidAdapterError, tmp_path, spec, "model.safetensors", key)


# --- refusals of any layout ---------------------------------------------------------------------


def refused(
    kind: type[StoreError], folder: Path, base: BaseSpec, file: str, key: str | None
) -> StoreError:
    with pytest.raises(kind) as raised:
        read_adapter(folder, base)
    error = raised.value
    assert (type(error), error.file, error.key) == (kind, file, key)
    assert error.remedy
    return error


@pytest.mark.parametrize(
    ("key", "change", "kind"),
    [
        ("1.0.linear.weight", None, InvalidAdapterError),
        ("2.0.linear.bias", None, InvalidAdapterError),
        ("0.0.linear.weight", torch.zeros(H, H + 1), BaseMismatchError),
        ("0.0.linear.bias", torch.zeros(H - 1), BaseMismatchError),
        ("0.0.linear.weight", torch.full((H, H), float("nan")), InvalidAdapterError),
        ("2.0.linear.bias", torch.full((H,), float("inf")), InvalidAdapterError),
        ("0.0.linear.weight", torch.zeros(H, H).double(), UnsupportedFeatureError),
        ("3.0.linear.weight", torch.zeros(H, H), InvalidAdapterError),  # a head too many
        ("0.0.linear.extra", torch.zeros(1), InvalidAdapterError),
        ("0.1.linear.weight", torch.zeros(H, H), InvalidAdapterError),  # a block too many
        ("1.1.weight", torch.zeros(V - 1, H), InvalidAdapterError),  # head 0 has none
    ],
)
def test_a_tensor_that_does_not_fit_is_named(
    key: str,
    change: torch.Tensor | None,
    kind: type[StoreError],
    tmp_path: Path,
    spec: BaseSpec,
) -> None:
    tensors = lorax_tensors()
    if change is None:
        del tensors[key]
    else:
        tensors[key] = change
    lorax(tmp_path, tensors)
    named = "0.1.weight" if key == "1.1.weight" else key
    refused(kind, tmp_path, spec, WEIGHTS, named)


def test_own_lm_heads_of_another_vocabulary_are_another_base(
    tmp_path: Path, spec: BaseSpec
) -> None:
    tensors = lorax_tensors(own=True)
    tensors["0.1.weight"] = torch.zeros(V + 1, H)
    lorax(tmp_path, tensors)
    refused(BaseMismatchError, tmp_path, spec, WEIGHTS, "0.1.weight")


@pytest.mark.parametrize("value", [0, -1, "3", 2.5, True, None])
def test_a_number_of_heads_that_is_none_is_refused(
    value: Any, tmp_path: Path, spec: BaseSpec
) -> None:
    write(tmp_path, lorax_tensors(), medusa_num_heads=value)
    refused(InvalidAdapterError, tmp_path, spec, CONFIG, "medusa_num_heads")


def test_more_heads_than_there_are_tensors_name_the_missing_one(
    tmp_path: Path, spec: BaseSpec
) -> None:
    write(tmp_path, lorax_tensors(), medusa_num_heads=N + 1)
    refused(InvalidAdapterError, tmp_path, spec, WEIGHTS, "3.0.linear.weight")


def test_heads_need_a_base_with_a_linear_lm_head(tmp_path: Path, spec: BaseSpec) -> None:
    lorax(tmp_path, lorax_tensors())
    refused(BaseMismatchError, tmp_path, dataclasses.replace(spec, output_head=None), CONFIG, None)


def test_heads_without_their_config_are_refused(tmp_path: Path, spec: BaseSpec) -> None:
    (lorax(tmp_path, lorax_tensors()) / CONFIG).unlink()
    refused(InvalidAdapterError, tmp_path, spec, CONFIG, None)


def test_a_config_without_heads_is_refused(tmp_path: Path, spec: BaseSpec) -> None:
    (lorax(tmp_path, lorax_tensors()) / WEIGHTS).unlink()
    refused(InvalidAdapterError, tmp_path, spec, WEIGHTS, None)


@pytest.mark.parametrize("file", ["medusa_lm_head.pt", "medusa_lm_head.bin"])
def test_a_pickle_is_refused_with_the_command_that_converts_it(
    file: str, tmp_path: Path, spec: BaseSpec
) -> None:
    (lorax(tmp_path, lorax_tensors()) / WEIGHTS).rename(tmp_path / file)
    error = refused(UnsupportedFeatureError, tmp_path, spec, file, None)
    assert "weights_only=True" in str(error)
    assert WEIGHTS in str(error)


def test_a_damaged_file_is_named(tmp_path: Path, spec: BaseSpec) -> None:
    (lorax(tmp_path, lorax_tensors()) / WEIGHTS).write_bytes(b"damaged")
    refused(InvalidAdapterError, tmp_path, spec, WEIGHTS, None)


# --- Turbo LoRA ---------------------------------------------------------------------------------


@pytest.fixture
def turbo_lora(train: Callable[..., Any], tmp_path: Path) -> Path:
    folder = tmp_path / "turbo-lora"
    train("llama", folder, r=4, target_modules=["q_proj"])
    return lorax(folder, lorax_tensors())


def test_a_lora_and_heads_are_one_adapter_of_two_parts(
    turbo_lora: Path, spec: BaseSpec, tmp_path: Path
) -> None:
    both = read_adapter(turbo_lora, spec).adapter
    heads = read_adapter(lorax(tmp_path / "heads", lorax_tensors()), spec).adapter
    for name in (CONFIG, WEIGHTS):
        (turbo_lora / name).unlink()
    lora = read_adapter(turbo_lora, spec).adapter
    assert (len(lora.updates), lora.turbo, heads.updates) == (2, None, {})
    assert adapter_bytes.digest(dataclasses.replace(both, turbo=None)) == adapter_bytes.digest(lora)
    assert adapter_bytes.digest(dataclasses.replace(both, updates={})) == adapter_bytes.digest(
        heads
    )
    assert both.parameters == lora.parameters + heads.parameters


def test_a_lora_that_lost_its_config_is_not_left_out(turbo_lora: Path, spec: BaseSpec) -> None:
    (turbo_lora / "adapter_config.json").unlink()
    refused(InvalidAdapterError, turbo_lora, spec, "adapter_config.json", None)


def test_a_pickled_head_beside_a_lora_is_refused(turbo_lora: Path, spec: BaseSpec) -> None:
    (turbo_lora / WEIGHTS).rename(turbo_lora / "medusa_lm_head.pt")
    refused(UnsupportedFeatureError, turbo_lora, spec, "medusa_lm_head.pt", None)


def test_a_config_of_the_base_beside_a_lora_is_no_sign_of_heads(
    train: Callable[..., Any], tmp_path: Path, spec: BaseSpec
) -> None:
    train("llama", tmp_path, r=4, target_modules=["q_proj"])
    (tmp_path / CONFIG).write_text(json.dumps({"model_type": "llama", "num_heads": 4}))
    assert read_adapter(tmp_path, spec).adapter.turbo is None


def test_the_info_compares_with_medusa(turbo_lora: Path, spec: BaseSpec, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    info = store.info(add_adapter(store, "mine", turbo_lora, spec).version.digest)
    assert info.turbo is not None
    assert (info.kind, info.turbo.depth, info.turbo.hidden) == ("Turbo LoRA", N, H)
    assert (info.base_hidden, info.base_vocabulary) == (H, V)
    assert info.turbo.parameters == N * (H * H + H)
    assert info.turbo.medusa_parameters(V) == N * (H * H + V * H)


def test_what_is_stored_is_what_was_read(turbo_lora: Path, spec: BaseSpec, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    version = add_adapter(store, "mine", turbo_lora, spec).version
    loaded: CanonicalAdapter = store.load(version.digest)
    assert loaded.turbo is not None
    assert torch.equal(loaded.turbo.blocks[1].weight, lorax_tensors()["1.0.linear.weight"])
    assert loaded.source["turbo"]["format"] == "medusa (lorax)"
