"""Modules that an adapter's folder holds whole give, as updates, the logits that PEFT computes."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from peft import (
    HRAConfig,
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file

from quickchange_store.base_model.base_spec import base_spec
from quickchange_store.canonical.canonical_adapter import CanonicalAdapter
from quickchange_store.errors import (
    BaseMismatchError,
    InvalidAdapterError,
    StoreError,
    UnsupportedFeatureError,
)
from quickchange_store.formats.rank_limits import RankLimits
from quickchange_store.importing import read_adapter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TOKENS = torch.arange(12).reshape(2, 6) * 4 % 53
NORM, HEAD = "base_model.model.model.norm.weight", "base_model.model.lm_head.weight"
EMBEDDING = "base_model.model.model.embed_tokens.weight"


def lora(*saved: str, targets: str | list[str] = "all-linear", **options: Any) -> LoraConfig:
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        target_modules=targets,
        modules_to_save=list(saved) or None,
        **options,
    )


def trained(base: Any, config: PeftConfig, folder: Path) -> torch.Tensor:
    """Save a random adapter to `folder`; returns PEFT's logits of TOKENS."""
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of tied weights
        model = get_peft_model(copy.deepcopy(base.model), config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
        model.save_pretrained(folder)
    return logits_of(model)


def logits_of(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=TOKENS).logits
    return logits


def loaded(base: Any, folder: Path) -> torch.Tensor:
    """PEFT's logits with the adapter in `folder`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return logits_of(PeftModel.from_pretrained(copy.deepcopy(base.model), str(folder)))


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)


def refused(
    kind: type[StoreError], base: Any, folder: Path, limits: RankLimits | None = None
) -> StoreError:
    with pytest.raises(StoreError) as caught:
        read_adapter(folder, base.spec, limits or RankLimits())
    assert type(caught.value) is kind, caught.value
    assert caught.value.remedy
    return caught.value


VARIANTS: dict[str, tuple[str, PeftConfig]] = {
    "norms of llama": ("llama", LNTuningConfig(task_type="CAUSAL_LM")),
    "norms of gemma": (
        "gemma3",
        LNTuningConfig(target_modules=["input_layernorm", "q_norm", "pre_feedforward_layernorm"]),
    ),
    "norms with biases": (
        "gpt_neox",
        LNTuningConfig(target_modules=["input_layernorm", "final_layer_norm"]),
    ),
    "norms of gpt2": ("gpt2", LNTuningConfig(target_modules=["ln_1", "ln_2", "ln_f"])),
    "norms of heads": ("qwen3_moe", LNTuningConfig(target_modules=["q_norm", "k_norm", "norm"])),
    "norms and a head": ("llama", LNTuningConfig(modules_to_save=["lm_head"])),
    "linears by LN_TUNING": ("llama", LNTuningConfig(target_modules=["q_proj", "norm"])),
    "a norm": ("llama", lora("norm")),
    "norms of a layer": ("gpt_neox", lora("input_layernorm", targets=["dense"])),
    "a norm's bias, and all biases": (
        "gpt_neox",
        lora("input_layernorm", targets=["dense"], bias="all"),
    ),
    "all biases of norms": ("gpt_neox", lora(targets=["dense"], bias="all")),
    "a head": ("llama", lora("lm_head")),
    "an embedding": ("llama", lora("embed_tokens")),
    "a scaled embedding": ("gemma3", lora("embed_tokens")),
    "both ends": ("llama", lora("embed_tokens", "lm_head")),
    "a tied embedding": ("llama-tied", lora("embed_tokens")),
    "a tied head": ("llama-tied", lora("lm_head")),
    "tied ends apart": ("llama-tied", lora("embed_tokens", "lm_head")),
    "tied ends together": ("llama-tied", lora("embed_tokens", ensure_weight_tying=True)),
    "tied ends by the head": ("llama-tied", lora("lm_head", ensure_weight_tying=True)),
    "tied targets": (
        "llama-tied",
        lora(targets=["embed_tokens", "q_proj"], ensure_weight_tying=True),
    ),
    "tied targets by the head": (
        "llama-tied",
        lora(targets=["lm_head", "q_proj"], ensure_weight_tying=True),
    ),
    "tied targets with DoRA": (
        "llama-tied",
        lora(targets=["embed_tokens", "q_proj"], ensure_weight_tying=True, use_dora=True),
    ),
    "linears among targets": ("llama", lora("down_proj", "layers.0.self_attn.o_proj")),
    "a part whole": ("llama", lora("layers.1.mlp")),
    "a layer whole": ("llama", lora("layers.1", targets=["q_proj"])),
    "biased linears": ("llama", lora("k_proj")),
    "transposed linears": ("gpt2", lora("c_fc", targets=["c_attn"])),
    "with DoRA": ("llama", lora("norm", "lm_head", use_dora=True)),
    "with trained tokens": ("llama", lora("lm_head", trainable_token_indices=[3, 4])),
    "with IA3": (
        "llama",
        IA3Config(
            target_modules=["k_proj", "down_proj"],
            feedforward_modules=["down_proj"],
            modules_to_save=["lm_head", "norm", "layers.0.mlp.up_proj"],
        ),
    ),
    "with VeRA": ("llama", VeraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])),
    "with HRA": ("llama", HRAConfig(r=4, target_modules=["q_proj"], modules_to_save=["norm"])),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_saved_modules_give_pefts_logits(
    variant: str, bases: Any, canonical_logits: Any, tmp_path: Path
) -> None:
    family, config = VARIANTS[variant]
    base = bases(family)
    expected = trained(base, copy.deepcopy(config), tmp_path)
    torch.testing.assert_close(loaded(base, tmp_path), expected)  # PEFT loads what it saved
    adapter = read_adapter(tmp_path, base.spec).adapter
    assert not torch.allclose(logits_of(base.model), expected, atol=1e-3)
    got = canonical_logits(base.model, adapter)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-5)


@settings(
    max_examples=12,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    saved=st.sets(
        st.sampled_from(
            ["norm", "input_layernorm", "layers.0.mlp", "v_proj", "lm_head", "embed_tokens"]
        ),
        min_size=1,
    ),
    targets=st.sets(st.sampled_from(["q_proj", "v_proj", "down_proj", "lm_head"]), min_size=1),
    family=st.sampled_from(["llama", "llama-tied"]),
    tied=st.booleans(),
)
def test_any_modules_saved_beside_any_targets_give_pefts_logits(
    saved: set[str],
    targets: set[str],
    family: str,
    tied: bool,
    bases: Any,
    canonical_logits: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    left = targets - saved - ({"down_proj"} if "layers.0.mlp" in saved else set())
    config = lora(*sorted(saved), targets=sorted(left | {"q_proj"}), ensure_weight_tying=tied)
    folder = tmp_path_factory.mktemp("saved")
    try:
        expected = trained(bases(family), config, folder)
    except TypeError as error:  # PEFT's, of a module that would be both: a tied head that is saved
        assume("modules_to_save cannot be applied" not in str(error))
        raise
    adapter = read_adapter(folder, bases(family).spec).adapter
    got = canonical_logits(bases(family).model, adapter)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("kind", [lora("norm", "lm_head"), LNTuningConfig(target_modules=["norm"])])
def test_a_state_dicts_own_names_are_read_too(kind: PeftConfig, bases: Any, tmp_path: Path) -> None:
    base = bases("llama")
    trained(base, copy.deepcopy(kind), tmp_path)
    plain = read_adapter(tmp_path, base.spec).adapter

    def spelled(tensors: dict[str, torch.Tensor]) -> None:
        for key in (NORM, HEAD):
            if key in tensors:
                tensors[key.replace(".weight", ".modules_to_save.mine.weight")] = tensors.pop(key)
                tensors[key.replace(".weight", ".original_module.weight")] = torch.ones(3)
        tuned = NORM.replace(".weight", ".ln_tuning_layers.weight")
        if tuned in tensors:
            tensors[tuned.replace(".weight", ".default.weight")] = tensors.pop(tuned)

    edit(tmp_path, spelled)
    assert_same(read_adapter(tmp_path, base.spec).adapter, plain)


def assert_same(found: CanonicalAdapter, expected: CanonicalAdapter) -> None:
    assert found.updates.keys() == expected.updates.keys()
    for path, update in found.updates.items():
        for name, tensor in update.tensors.items():
            assert torch.equal(tensor, expected.updates[path].tensors[name]), (path, name)


@pytest.mark.parametrize(
    ("family", "key"),
    [
        ("llama", NORM),
        ("llama", EMBEDDING),
        ("llama", HEAD),
        ("llama-tied", EMBEDDING),
        ("llama-tied", HEAD),
    ],
)
def test_a_copy_that_no_field_asks_for_replaces_the_bases_as_peft_loads_it(
    family: str, key: str, bases: Any, canonical_logits: Any, tmp_path: Path
) -> None:
    base = bases(family)
    trained(base, lora(targets=["q_proj"]), tmp_path)
    own = base.model.state_dict()[key.removeprefix("base_model.model.")]
    edit(tmp_path, lambda tensors: tensors.update({key: own + torch.randn_like(own) * 0.2}))
    adapter = read_adapter(tmp_path, base.spec).adapter
    got = canonical_logits(base.model, adapter)
    torch.testing.assert_close(got, loaded(base, tmp_path), rtol=1e-4, atol=2e-5)


def test_an_embedding_beside_its_lora_may_have_changed(
    bases: Any, canonical_logits: Any, tmp_path: Path
) -> None:
    base = bases("llama-tied")
    trained(base, lora(targets=["embed_tokens"]), tmp_path)
    key = EMBEDDING.replace(".weight", ".base_layer.weight")
    edit(tmp_path, lambda tensors: tensors[key][5:9].add_(0.3))
    adapter = read_adapter(tmp_path, base.spec).adapter
    assert adapter.updates["lm_head"].rank == 4  # rows that changed
    got = canonical_logits(base.model, adapter)
    torch.testing.assert_close(got, loaded(base, tmp_path), rtol=1e-4, atol=2e-5)


def test_the_rank_of_an_end_is_the_number_of_its_rows_that_changed(
    bases: Any, tmp_path: Path
) -> None:
    base = bases("llama")
    trained(base, lora("embed_tokens", "lm_head", targets=["q_proj"]), tmp_path)

    def few(tensors: dict[str, torch.Tensor]) -> None:
        for key, rows in ((EMBEDDING, [7]), (HEAD, [0, 3, 52])):
            own = base.model.state_dict()[key.removeprefix("base_model.model.")].clone()
            own[rows] += 1
            tensors[key] = own

    edit(tmp_path, few)
    updates = read_adapter(tmp_path, base.spec, RankLimits(exact=4)).adapter.updates
    assert (updates["model.embed_tokens"].rank, updates["lm_head"].rank) == (1, 3)


def test_a_copy_that_changes_nothing_is_no_update(bases: Any, tmp_path: Path) -> None:
    base = bases("llama")
    trained(base, lora("model.norm", "lm_head", targets=["q_proj"]), tmp_path)
    state = base.model.state_dict()

    def same(tensors: dict[str, torch.Tensor]) -> None:
        for key in (NORM, HEAD):
            tensors[key] = state[key.removeprefix("base_model.model.")].bfloat16()

    edit(tmp_path, same)
    assert {
        path.rpartition(".")[2] for path in read_adapter(tmp_path, base.spec).adapter.updates
    } == {"q_proj"}


def test_a_rank_above_the_limit_is_refused_and_approximated_on_request(
    bases: Any, tmp_path: Path
) -> None:
    base = bases("llama")
    trained(base, lora("lm_head", targets=["q_proj"]), tmp_path)
    error = refused(UnsupportedFeatureError, base, tmp_path, RankLimits(exact=8))
    assert (error.file, error.key) == (CONFIG, "modules_to_save")
    assert "--approximate-rank" in str(error)
    adapter = read_adapter(tmp_path, base.spec, RankLimits(exact=8, approximate=16)).adapter
    stated = adapter.source["approximation"]
    assert adapter.updates["lm_head"].rank == stated["rank"] == 16
    assert (stated["modules"], stated["worst_module"]) == (1, "lm_head")
    assert 0 < stated["relative_error"] < 1


def zeroed(bases: Any, folder: Path) -> tuple[Any, torch.Tensor]:
    """A base of which one output of the last norm is 0, and that norm's weight."""
    base = bases("llama")
    model = copy.deepcopy(base.model)
    model.model.norm.weight.data[4] = 0
    model.save_pretrained(folder)
    return type(base)(folder, model, base_spec(folder, name="tiny")), model.model.norm.weight.data


def test_an_output_that_the_base_multiplies_by_zero_is_refused_if_it_is_trained(
    bases: Any, tmp_path: Path
) -> None:
    base, own = zeroed(bases, tmp_path / "base")
    trained(base, LNTuningConfig(target_modules=["norm"]), tmp_path / "adapter")
    error = refused(UnsupportedFeatureError, base, tmp_path / "adapter")
    assert "model.norm multiplies 1 of its outputs by 0" in str(error)
    key = NORM.replace(".weight", ".ln_tuning_layers.weight")
    edit(tmp_path / "adapter", lambda tensors: tensors.update({key: own * 2}))
    update = read_adapter(tmp_path / "adapter", base.spec).adapter.updates["model.norm"]
    assert update.gain is not None
    assert update.gain[4] == 1


@pytest.mark.parametrize(
    ("change", "kind", "key"),
    [
        ({NORM: None}, InvalidAdapterError, NORM),
        ({NORM: torch.zeros(31)}, BaseMismatchError, NORM),
        ({HEAD: torch.zeros(53, 31)}, BaseMismatchError, HEAD),
        ({NORM: torch.full((32,), torch.nan)}, InvalidAdapterError, NORM),
        ({HEAD: torch.zeros(53, 32, dtype=torch.int8)}, UnsupportedFeatureError, HEAD),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(
    change: dict[str, torch.Tensor | None],
    kind: type[StoreError],
    key: str,
    bases: Any,
    tmp_path: Path,
) -> None:
    base = bases("llama")
    trained(base, lora("norm", "lm_head", targets=["q_proj"]), tmp_path)

    def changed(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in change.items():
            del tensors[name]
            if tensor is not None:
                tensors[name] = tensor

    edit(tmp_path, changed)
    error = refused(kind, base, tmp_path)
    assert (error.file, error.key) == (WEIGHTS, key)


def test_copies_of_one_weight_that_differ_are_refused(bases: Any, tmp_path: Path) -> None:
    base = bases("llama-tied")
    trained(base, lora(targets=["q_proj"]), tmp_path)
    edit(
        tmp_path,
        lambda tensors: tensors.update({EMBEDDING: torch.ones(53, 32), HEAD: torch.zeros(53, 32)}),
    )
    assert "one weight for both" in str(refused(InvalidAdapterError, base, tmp_path))


def test_a_module_that_has_no_place_is_named(bases: Any, tmp_path: Path) -> None:
    base = bases("qwen3_moe")
    trained(base, lora("mlp.experts", targets=["q_proj"]), tmp_path)
    error = refused(UnsupportedFeatureError, base, tmp_path)
    assert "mlp.experts" in str(error.key)
    assert "modules_to_save asks for it" in str(error)


@pytest.mark.parametrize("target", ["norm", "input_layernorm"])
def test_a_lora_of_a_norm_is_refused_by_name(target: str, bases: Any, tmp_path: Path) -> None:
    base = bases("llama")
    trained(base, lora(targets=["q_proj"]), tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    config["target_modules"] = [target, "q_proj"]
    (tmp_path / CONFIG).write_text(json.dumps(config))
    error = refused(UnsupportedFeatureError, base, tmp_path)
    assert (error.file, error.key) == (CONFIG, "target_modules")
    assert f"{target} is a norm" in str(error)
