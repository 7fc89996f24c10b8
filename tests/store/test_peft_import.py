"""PEFT LoRA directories give, in the canonical form, the logits that PEFT itself computes."""

from __future__ import annotations

import copy
import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quickchange_store.formats.peft.lora import read_peft
from quickchange_store.formats.peft.peft_config import HARMLESS, HONOURED, REFUSED

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
LINEARS = [*ATTENTION, *MLP]

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "two modules": ("llama", {"r": 4, "target_modules": ["q_proj", "v_proj"]}),
    "all seven": ("llama", {"r": 8, "lora_alpha": 32, "target_modules": LINEARS}),
    "rank-stabilised": ("llama", {"r": 3, "use_rslora": True, "target_modules": ATTENTION}),
    "rank pattern": (
        "llama",
        {
            "r": 4,
            "target_modules": LINEARS,
            "rank_pattern": {
                "q_proj": 2,
                r"layers\.1\.mlp\..*": 7,
                "model.layers.0.mlp.up_proj": 1,
            },
            "alpha_pattern": {"^model.layers.0.self_attn.v_proj": 24, "k_proj|o_proj": 5},
        },
    ),
    "patterns and rank-stabilised": (
        "llama",
        {
            "r": 4,
            "use_rslora": True,
            "target_modules": ATTENTION,
            "rank_pattern": {"q_proj": 16},
            "alpha_pattern": {"q_proj": 3},
        },
    ),
    "regular expression": ("llama", {"target_modules": r"model\.layers\.\d+\.mlp\.(up|down)_proj"}),
    "all-linear": ("llama", {"target_modules": "all-linear"}),
    "excluded": (
        "llama",
        {"target_modules": LINEARS, "exclude_modules": ["k_proj", "mlp.up_proj"]},
    ),
    "excluded by expression": (
        "llama",
        {"target_modules": "all-linear", "exclude_modules": r".*\.layers\.0\..*"},
    ),
    "one layer": ("llama", {"target_modules": LINEARS, "layers_to_transform": 1}),
    "layers by pattern": (
        "llama",
        {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
    ),
    "full paths": ("llama", {"target_modules": ["model.layers.1.self_attn.q_proj"]}),
    "default targets": ("llama", {"target_modules": None}),
    "LM head": ("llama", {"target_modules": ["lm_head", "q_proj"]}),
    "embedding": ("llama", {"target_modules": ["embed_tokens"], "r": 5}),
    "embedding and LM head": ("llama", {"target_modules": ["embed_tokens", "lm_head"]}),
    "tied embedding": ("llama-tied", {"target_modules": ["embed_tokens", "v_proj"]}),
    "tied LM head": ("llama-tied", {"target_modules": ["lm_head"]}),
    "scaled embedding": ("gemma3", {"target_modules": ["embed_tokens", "q_proj"]}),
    "bias of targets": ("llama", {"target_modules": ["q_proj", "up_proj"], "bias": "lora_only"}),
    "all biases": ("llama", {"target_modules": ["q_proj"], "bias": "all"}),
    "LoRA bias": ("llama", {"target_modules": LINEARS, "lora_bias": True, "lora_alpha": 24}),
    "both biases": (
        "llama",
        {"target_modules": ATTENTION, "lora_bias": True, "bias": "all", "use_rslora": True},
    ),
    "GPT-NeoX": ("gpt_neox", {"target_modules": ["query_key_value", "dense_4h_to_h"]}),
    "GPT-NeoX all-linear": ("gpt_neox", {"target_modules": "all-linear", "r": 3}),
    "GPT-NeoX biases": ("gpt_neox", {"target_modules": ["dense"], "bias": "lora_only"}),
    # Layer norms have biases too; untouched ones are copies of the base's and are accepted.
    "GPT-NeoX all biases": ("gpt_neox", {"target_modules": "all-linear", "bias": "all"}),
    "GPT-NeoX embeddings": ("gpt_neox", {"target_modules": ["embed_in", "embed_out", "lm_head"]}),
    "DoRA": ("llama", {"target_modules": LINEARS, "use_dora": True, "r": 4, "lora_alpha": 12}),
    "DoRA with trained biases": (
        "llama",
        {"target_modules": ["q_proj", "o_proj"], "use_dora": True, "bias": "all"},
    ),
    "DoRA on a tied, scaled embedding": (
        "gemma3",
        {"target_modules": ["embed_tokens", "down_proj"], "use_dora": True, "use_rslora": True},
    ),
    "DoRA on GPT-NeoX, with biases": (
        "gpt_neox",
        {"target_modules": "all-linear", "use_dora": True, "rank_pattern": {"dense": 2}},
    ),
    "DoRA on a tied LM head": ("llama-tied", {"target_modules": ["lm_head"], "use_dora": True}),
    "initialised by MiCA": ("llama", {"target_modules": ["q_proj"], "init_lora_weights": "mica"}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_canonical_updates_give_pefts_logits(
    variant: str, bases: Any, train: Any, canonical_logits: Any, tmp_path: Path
) -> None:
    family, options = VARIANTS[variant]
    base = bases(family)
    trained = train(family, tmp_path, **options)
    imported = read_peft(tmp_path, base.spec)
    plain = base.model(input_ids=_tokens(trained)).logits
    assert not torch.allclose(plain, trained.logits, atol=1e-3)  # the adapter does something
    torch.testing.assert_close(
        canonical_logits(base.model, imported.adapter), trained.logits, rtol=1e-4, atol=2e-5
    )
    assert imported.adapter.architecture == base.spec.architecture


def _tokens(trained: Any) -> torch.Tensor:
    batch, length, vocabulary = trained.logits.shape
    return torch.arange(batch * length).reshape(batch, length) * 4 % vocabulary


# No two of them match one module: PEFT saves patterns sorted, so their order does not survive.
PATTERN_KEYS = ["q_proj", "k_proj|v_proj", r"layers\.1\.mlp\..*", r".*\.0\.mlp\.up_proj", "lm_head"]


@settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    targets=st.sets(st.sampled_from([*LINEARS, "lm_head"]), min_size=1),
    rank=st.integers(1, 9),
    alpha=st.integers(1, 40),
    rslora=st.booleans(),
    ranks=st.dictionaries(st.sampled_from(PATTERN_KEYS), st.integers(1, 12), max_size=3),
    alphas=st.dictionaries(st.sampled_from(PATTERN_KEYS), st.integers(1, 40), max_size=3),
)
def test_any_combination_of_targets_and_patterns_gives_pefts_logits(
    targets: set[str],
    rank: int,
    alpha: int,
    rslora: bool,
    ranks: dict[str, int],
    alphas: dict[str, int],
    bases: Any,
    train: Any,
    canonical_logits: Any,
) -> None:
    base = bases("llama")
    with tempfile.TemporaryDirectory() as folder:
        trained = train(
            "llama",
            Path(folder),
            r=rank,
            lora_alpha=alpha,
            use_rslora=rslora,
            target_modules=sorted(targets),
            rank_pattern=ranks,
            alpha_pattern=alphas,
        )
        adapter = read_peft(trained.folder, base.spec).adapter
    torch.testing.assert_close(
        canonical_logits(base.model, adapter), trained.logits, rtol=1e-4, atol=1e-4
    )


def test_overlapping_alpha_patterns_mean_what_peft_reads_and_warn(
    bases: Any, train: Any, canonical_logits: Any, tmp_path: Path
) -> None:
    from peft import PeftModel

    patterns = {"q_proj": 2, r".*\.0\..*": 30}  # saved, and read by PEFT, in the other order
    trained = train("llama", tmp_path, target_modules=["q_proj"], alpha_pattern=patterns)
    base = bases("llama")
    imported = read_peft(tmp_path, base.spec)
    reloaded = PeftModel.from_pretrained(copy.deepcopy(base.model), tmp_path).eval()
    torch.testing.assert_close(
        canonical_logits(base.model, imported.adapter),
        reloaded(input_ids=_tokens(trained)).logits,
        rtol=1e-5,
        atol=1e-5,
    )
    (warning,) = imported.warnings
    assert "alpha_pattern" in warning
    assert "model.layers.0.self_attn.q_proj" in warning


def test_all_linear_in_the_file_means_every_linear_but_the_lm_head(
    bases: Any, train: Any, tmp_path: Path
) -> None:
    train("llama", tmp_path, target_modules="all-linear")
    _edit_config(tmp_path, target_modules="all-linear")  # PEFT itself writes the names out
    adapter = read_peft(tmp_path, bases("llama").spec).adapter
    assert {path.rpartition(".")[2] for path in adapter.updates} == set(LINEARS)


def test_tensors_keep_the_dtype_in_which_they_were_saved(
    bases: Any, train: Any, tmp_path: Path
) -> None:
    train("llama", tmp_path, target_modules=["q_proj"])
    _rewrite_tensors(tmp_path, lambda tensors: {k: t.bfloat16() for k, t in tensors.items()})
    adapter = read_peft(tmp_path, bases("llama").spec).adapter
    assert {u.a.dtype for u in adapter.updates.values()} == {torch.bfloat16}


def test_embedding_copies_saved_in_a_narrower_dtype_are_accepted(
    bases: Any, train: Any, tmp_path: Path
) -> None:
    train("llama", tmp_path, target_modules=["embed_tokens"])
    _rewrite_tensors(tmp_path, lambda tensors: {k: t.bfloat16() for k, t in tensors.items()})
    adapter = read_peft(tmp_path, bases("llama").spec).adapter
    assert set(adapter.updates) == {"model.embed_tokens"}


def test_another_base_name_warns_and_nothing_more(bases: Any, train: Any, tmp_path: Path) -> None:
    train("llama", tmp_path, target_modules=["q_proj"])
    _edit_config(tmp_path, base_model_name_or_path="someone/other-model")
    (warning,) = read_peft(tmp_path, bases("llama").spec).warnings
    assert "base_model_name_or_path" in warning
    assert "someone/other-model" in warning


def test_the_same_base_name_under_another_folder_does_not_warn(
    bases: Any, train: Any, tmp_path: Path
) -> None:
    train("llama", tmp_path, target_modules=["q_proj"])
    _edit_config(tmp_path, base_model_name_or_path="/elsewhere/Tiny/")
    assert read_peft(tmp_path, bases("llama").spec).warnings == ()


def test_every_field_of_pefts_lora_config_is_classified_once() -> None:
    from peft import LoraConfig

    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    groups = [HONOURED, HARMLESS, REFUSED]
    assert fields - frozenset().union(*groups) == set()
    assert sum(len(group) for group in groups) == len(frozenset().union(*groups))


def _edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _rewrite_tensors(folder: Path, change: Any) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)
