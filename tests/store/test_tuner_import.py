"""PEFT's tuners beside LoRA give, in the canonical form, the logits that PEFT itself computes."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quickchange_store.errors import (
    BaseMismatchError,
    BaseModelError,
    InvalidAdapterError,
    StoreError,
    UnsupportedFeatureError,
)
from quickchange_store.formats.rank_limits import RankLimits
from quickchange_store.importing import add_adapter, read_adapter
from quickchange_store.store import Store

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
TARGETS = ["q_proj", "down_proj"]
BANK = {"num_vectors": 16, "vector_length": 8, "topk": 2, "r": 3}
KEPT = {  # AdaLoRA's rank_pattern: which ranks the allocation left
    f"model.layers.{layer}.{module}.lora_E": kept
    for layer in (0, 1)
    for module, kept in (
        ("self_attn.q_proj", [True, False, True]),
        ("mlp.down_proj", [False, False, bool(layer)]),
    )
}
BLOCKS = {"target_modules_bd_a": ["down_proj"], "target_modules_bd_b": ["q_proj"], "nblocks": 2}

EXACT: dict[str, tuple[str, dict[str, Any]]] = {
    "AdaLoRA": ("ADALORA", {"total_step": 10, "init_r": 6, "lora_alpha": 16}),
    "AdaLoRA, ranks allocated": ("ADALORA", {"total_step": 9, "init_r": 3, "rank_pattern": KEPT}),
    "AdaLoRA with biases": ("ADALORA", {"total_step": 9, "init_r": 3, "bias": "lora_only"}),
    "VeRA": ("VERA", {"r": 8}),
    "VeRA, projection made again": ("VERA", {"r": 8, "save_projection": False}),
    "VeRA, another projection": (
        "VERA",
        {"r": 8, "save_projection": False, "projection_prng_key": 5},
    ),
    "VeRA with biases": ("VERA", {"r": 4, "bias": "vera_only"}),
    "VeRA with all biases": ("VERA", {"r": 4, "bias": "all"}),
    "PVeRA": ("PVERA", {"r": 8}),
    "VBLoRA": ("VBLORA", BANK),
    "VBLoRA, best logits alone": ("VBLORA", {**BANK, "save_only_topk_weights": True}),
    "MiSS": ("MISS", {"r": 4}),
    "MiSS, bat": ("MISS", {"r": 4, "init_weights": "bat"}),
    "MiSS, mini": ("MISS", {"r": 4, "init_weights": "mini", "mini_r": 2}),
    "DeLoRA": ("DELORA", {"r": 4, "rank_pattern": {"q_proj": 2}, "lambda_pattern": {"q_proj": 7}}),
    "HRA": ("HRA", {"r": 4}),
    "HRA, orthogonal": ("HRA", {"r": 4, "apply_GS": True, "bias": "hra_only"}),
    "UniLoRA": ("UNILORA", {}),
    "UniLoRA, indices made again": ("UNILORA", {"save_indices": False, "proj_seed": 4}),
    "TinyLoRA": ("TINYLORA", {}),
    "TinyLoRA, made again": ("TINYLORA", {"save_projection": False, "weight_tying": 0.5}),
    "PSOFT": ("PSOFT", {"r": 4}),
    "PSOFT without magnitudes": ("PSOFT", {"r": 4, "psoft_mag_a": False, "psoft_mag_b": False}),
    "DEFT": ("DEFT", {"r": 4}),
    "DEFT, qr": ("DEFT", {"r": 4, "decomposition_method": "qr", "para": True}),
    "LoHa": ("LOHA", {"r": 3, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 5}}),
    "LoKr": ("LOKR", {"r": 2}),
    "LoKr, both factored": ("LOKR", {"r": 2, "decompose_both": True, "decompose_factor": 4}),
    "GraLoRA": ("GRALORA", {"r": 4, "gralora_k": 2}),
    "GraLoRA, hybrid": ("GRALORA", {"r": 8, "gralora_k": 2, "hybrid_r": 2}),
    "BEFT": ("BEFT", {}),
    "PiSSA": ("LORA", {"r": 4, "init_lora_weights": "pissa", "use_rslora": True}),
    "OLoRA": ("LORA", {"r": 4, "init_lora_weights": "olora", "bias": "lora_only"}),
    "BD-LoRA": ("LORA", {"r": 4, "use_bdlora": BLOCKS}),
    "KaSA": ("LORA", {"r": 4, "kasa_config": {}}),
}
ON_REQUEST: dict[str, dict[str, Any]] = {
    "BOFT": {"boft_block_size": 8},
    "C3A": {"block_size": 8},
    "FOURIERFT": {"n_frequency": 40},
    "FROD": {},
    "GLORA": {},
    "HIRA": {"r": 4},
    "OFT": {"oft_block_size": 8, "r": 0},
    "OSF": {},
    "PEANUT": {},
    "RANDLORA": {"r": 4},
    "ROAD": {"group_size": 8},
    "SHIRA": {"r": 2},
    "SUPERTUNING": {},
    "WAVEFT": {"n_frequency": 40},
}
FULL = RankLimits(approximate=32)  # no module of the bases has more


def tuned(
    base: Any, kind: str, folder: Path, targets: list[str] | None = None, **options: Any
) -> torch.Tensor:
    """Save a random adapter of PEFT's type `kind`, and return what PEFT says once it loads it."""
    from peft import PeftModel, get_peft_model
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    made = PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what PEFT says to those who train
        torch.manual_seed(1)
        config = made(task_type="CAUSAL_LM", target_modules=targets or TARGETS, **options)
        model = get_peft_model(copy.deepcopy(base.model), config)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.3 * torch.randn_like(parameter)
        model.save_pretrained(folder)
        torch.manual_seed(2)
        loaded = PeftModel.from_pretrained(copy.deepcopy(base.model), folder).eval()
        with torch.inference_mode():
            return loaded(input_ids=_tokens()).logits


def _tokens() -> torch.Tensor:
    return torch.arange(12).reshape(2, 6) * 4 % 53


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refusal(folder: Path, base: Any, limits: RankLimits | None = None) -> StoreError:
    with pytest.raises(StoreError) as caught:
        read_adapter(folder, base.spec, limits or RankLimits())
    assert caught.value.remedy
    return caught.value


@pytest.mark.parametrize("variant", EXACT)
def test_low_rank_types_give_pefts_logits(
    variant: str, bases: Any, canonical_logits: Any, tmp_path: Path
) -> None:
    kind, options = EXACT[variant]
    base = bases("llama")
    logits = tuned(base, kind, tmp_path, **options)
    imported = read_adapter(tmp_path, base.spec)
    plain = base.model(input_ids=_tokens()).logits
    assert not torch.allclose(plain, logits, atol=1e-3)  # the adapter does something
    torch.testing.assert_close(
        canonical_logits(base.model, imported.adapter), logits, rtol=1e-4, atol=3e-5
    )
    assert "approximation" not in imported.adapter.source


@pytest.mark.parametrize("kind", ["ADALORA", "UNILORA", "VBLORA", "VERA"])
def test_weights_that_a_base_stores_transposed_give_pefts_logits(
    kind: str, bases: Any, canonical_logits: Any, tmp_path: Path
) -> None:
    base = bases("gpt2")
    options = {**BANK} if kind == "VBLORA" else {"total_step": 9} if kind == "ADALORA" else {}
    logits = tuned(base, kind, tmp_path, ["c_attn"], **options)
    adapter = read_adapter(tmp_path, base.spec).adapter
    torch.testing.assert_close(canonical_logits(base.model, adapter), logits, rtol=1e-4, atol=3e-5)


@pytest.mark.parametrize("kind", ON_REQUEST)
def test_full_rank_types_are_served_when_an_approximation_is_asked_for(
    kind: str, bases: Any, canonical_logits: Any, tmp_path: Path
) -> None:
    base = bases("llama")
    logits = tuned(base, kind, tmp_path, **ON_REQUEST[kind])
    assert "--approximate-rank" in str(refusal(tmp_path, base))
    whole = read_adapter(tmp_path, base.spec, FULL).adapter
    torch.testing.assert_close(canonical_logits(base.model, whole), logits, rtol=1e-4, atol=3e-5)
    assert whole.source["approximation"]["relative_error"] < 1e-6


def test_an_approximation_is_the_truncated_svd_and_states_its_error(
    bases: Any, tmp_path: Path
) -> None:
    base = bases("llama")
    tuned(base, "C3A", tmp_path / "c3a", block_size=8)
    whole = read_adapter(tmp_path / "c3a", base.spec, FULL).adapter
    part = read_adapter(tmp_path / "c3a", base.spec, RankLimits(approximate=5)).adapter
    left, size, worst = 0.0, 0.0, 0.0
    for path, update in part.updates.items():
        exact = whole.updates[path].b.double() @ whole.updates[path].a.double()
        rest = torch.linalg.svdvals(exact)[5:].square().sum()
        missing = (exact - update.b.double() @ update.a.double()).square().sum()
        torch.testing.assert_close(missing, rest, rtol=1e-4, atol=0)
        assert update.rank == 5
        left, size = left + float(rest), size + float(exact.square().sum())
        worst = max(worst, float(rest / exact.square().sum()) ** 0.5)
    stated = part.source["approximation"]
    assert stated["relative_error"] == pytest.approx((left / size) ** 0.5, rel=1e-4)
    assert stated["worst_relative_error"] == pytest.approx(worst, rel=1e-4)
    assert stated["worst_module"] in part.updates
    assert stated["rank"] == 5


def test_a_rank_above_the_limit_is_refused_with_both_ways_out(bases: Any, tmp_path: Path) -> None:
    base = bases("llama")
    tuned(base, "LOHA", tmp_path, r=3)  # rank 9
    assert read_adapter(tmp_path, base.spec, RankLimits(exact=9)).adapter.max_rank == 9
    error = refusal(tmp_path, base, RankLimits(exact=8))
    assert "--exact-rank" in str(error)
    assert "--approximate-rank" in str(error)
    part = read_adapter(tmp_path, base.spec, RankLimits(exact=8, approximate=6)).adapter
    assert part.max_rank == 6
    assert 0 < part.source["approximation"]["relative_error"] < 1


def test_the_store_keeps_what_an_approximation_leaves_out(bases: Any, tmp_path: Path) -> None:
    base = bases("llama")
    tuned(base, "C3A", tmp_path / "c3a", block_size=8)
    store = Store(tmp_path / "store")
    added = add_adapter(store, "mine", tmp_path / "c3a", base.spec, RankLimits(approximate=3))
    stated = store.info(added.version.digest).source["approximation"]
    assert stated["rank"] == 3
    assert 0 < stated["relative_error"] <= stated["worst_relative_error"] < 1


def test_the_command_serves_an_approximation_and_shows_its_error(
    bases: Any, tmp_path: Path
) -> None:
    from typer.testing import CliRunner

    from quickchange_store.cli import app

    base = bases("llama")
    tuned(base, "C3A", tmp_path / "c3a", block_size=8)
    store = ["--store", str(tmp_path / "store")]
    add = ["add", "mine", str(tmp_path / "c3a"), *store, "--model", str(base.folder)]
    refused = CliRunner().invoke(app, add)
    assert refused.exit_code == 1
    assert "--approximate-rank N" in refused.stderr
    added = CliRunner().invoke(app, [*add, "--approximate-rank", "3"])
    assert added.exit_code == 0, added.output
    shown = CliRunner().invoke(app, ["show", "mine", *store]).stdout
    assert "rank 3 at most, relative error" in shown
    detail = json.loads(CliRunner().invoke(app, ["show", "mine", "--json", *store]).stdout)
    assert 0 < detail["approximation"]["relative_error"] < 1


def test_reading_twice_gives_the_same_content(bases: Any, tmp_path: Path) -> None:
    from quickchange_store.canonical.adapter_bytes import digest

    base = bases("llama")
    tuned(base, "VERA", tmp_path, r=8)
    assert len({digest(read_adapter(tmp_path, base.spec).adapter) for _ in range(2)}) == 1


@pytest.mark.parametrize("value", [0, -1, 70_000, True])
def test_a_rank_that_is_none_is_refused_by_its_option(value: Any) -> None:
    with pytest.raises(InvalidAdapterError, match="approximate_rank"):
        RankLimits(approximate=value)


# --- trained tokens -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gemma3"])
def test_trained_tokens_give_pefts_logits(
    family: str, bases: Any, canonical_logits: Any, tmp_path: Path
) -> None:
    base = bases(family)
    logits = tuned(base, "TRAINABLE_TOKENS", tmp_path, ["embed_tokens"], token_indices=[8, 0, 40])
    adapter = read_adapter(tmp_path, base.spec).adapter
    assert adapter.max_rank == 3
    assert ("lm_head" in adapter.updates) == (family != "llama")  # the others' heads are tied
    torch.testing.assert_close(canonical_logits(base.model, adapter), logits, rtol=1e-4, atol=3e-5)


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
@pytest.mark.parametrize("tokens", [[8, 0, 40], {"embed_tokens": [4, 12]}])
def test_a_lora_with_trained_tokens_gives_pefts_logits(
    family: str, tokens: Any, bases: Any, canonical_logits: Any, tmp_path: Path
) -> None:
    base = bases(family)
    logits = tuned(base, "LORA", tmp_path, r=4, trainable_token_indices=tokens)
    adapter = read_adapter(tmp_path, base.spec).adapter
    torch.testing.assert_close(canonical_logits(base.model, adapter), logits, rtol=1e-4, atol=3e-5)


def test_trained_tokens_of_an_untied_head_give_pefts_logits(
    bases: Any, canonical_logits: Any, tmp_path: Path
) -> None:
    base = bases("llama")
    tokens = {"embed_tokens": [4, 12], "lm_head": [5, 6, 7]}
    logits = tuned(base, "LORA", tmp_path, r=4, trainable_token_indices=tokens)
    adapter = read_adapter(tmp_path, base.spec).adapter
    torch.testing.assert_close(canonical_logits(base.model, adapter), logits, rtol=1e-4, atol=3e-5)


@pytest.mark.parametrize(
    ("indices", "kind"),
    [
        ([8, 0, 53], InvalidAdapterError),  # an added token, and no tokenizer that has it
        ([8, 0, -1], InvalidAdapterError),
        ([8, 8, 0], InvalidAdapterError),
        ([8, 0, "a"], InvalidAdapterError),
        ([8, 0], BaseMismatchError),  # the file has three rows
        (None, InvalidAdapterError),
    ],
)
def test_tokens_that_can_not_be_meant_are_refused(
    indices: Any, kind: type[StoreError], bases: Any, tmp_path: Path
) -> None:
    base = bases("llama")
    tuned(base, "TRAINABLE_TOKENS", tmp_path, ["embed_tokens"], token_indices=[8, 0, 40])
    edit_config(tmp_path, token_indices=indices)
    assert type(refusal(tmp_path, base)) is kind


# --- LoRA of grouped inputs -----------------------------------------------------------------------


def test_qalora_reads_sums_of_groups(bases: Any, train: Any, tmp_path: Path) -> None:
    train("llama", tmp_path, r=4, lora_alpha=8, target_modules=["q_proj"])
    tensors = load_file(tmp_path / WEIGHTS)
    pooled = {k: t[:, :8].contiguous() if "lora_A" in k else t for k, t in tensors.items()}
    save_file(pooled, tmp_path / WEIGHTS)
    edit_config(tmp_path, use_qalora=True, qalora_group_size=4)
    adapter = read_adapter(tmp_path, bases("llama").spec).adapter
    path = "model.layers.0.self_attn.q_proj"
    a = pooled[f"base_model.model.{path}.lora_A.weight"]
    x = torch.randn(5, 32)
    expected = (x.view(5, 8, 4).mean(2) * 8) @ a.T  # as PEFT's QALoraLinearVariant
    torch.testing.assert_close(x @ adapter.updates[path].a.T, expected)


# --- refusals -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hra(bases: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hra")
    tuned(bases("llama"), "HRA", folder, r=4)
    return folder


@pytest.fixture
def spoilt(hra: Path, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(hra, tmp_path / "adapter"))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("a_field_of_the_future", 3),
        ("layer_replication", [[0, 2], [1, 2]]),
    ],
)
def test_a_field_that_is_not_served_is_named(
    field: str, value: Any, spoilt: Path, bases: Any
) -> None:
    edit_config(spoilt, **{field: value})
    error = refusal(spoilt, bases("llama"))
    assert (type(error), error.file, error.key) == (UnsupportedFeatureError, CONFIG, field)


@pytest.mark.parametrize("value", [0, -3, "8", 1 << 40, None])
def test_a_rank_that_can_not_be_is_refused(value: Any, spoilt: Path, bases: Any) -> None:
    edit_config(spoilt, r=value)
    assert refusal(spoilt, bases("llama")).file == CONFIG


@pytest.mark.parametrize("pattern", [[1], "q_proj", {"q_proj": "x"}, {"q_proj(": 2}, {"q_proj": 3}])
def test_a_rank_pattern_that_does_not_fit_is_refused(
    pattern: Any, bases: Any, tmp_path: Path
) -> None:
    tuned(bases("llama"), "LOHA", tmp_path, r=2)
    edit_config(tmp_path, rank_pattern=pattern)
    refusal(tmp_path, bases("llama"))


def test_another_rank_than_the_files_is_refused(spoilt: Path, bases: Any) -> None:
    edit_config(spoilt, r=3)
    assert isinstance(refusal(spoilt, bases("llama")), BaseMismatchError)


def test_a_missing_tensor_is_named(spoilt: Path, bases: Any) -> None:
    tensors = load_file(spoilt / WEIGHTS)
    gone = "base_model.model.model.layers.1.self_attn.q_proj.hra_u"
    del tensors[gone]
    save_file(tensors, spoilt / WEIGHTS)
    assert refusal(spoilt, bases("llama")).key == gone


def test_a_tensor_of_another_module_is_named(spoilt: Path, bases: Any) -> None:
    tensors = load_file(spoilt / WEIGHTS)
    more = "base_model.model.model.layers.1.self_attn.k_proj.hra_u"
    tensors[more] = torch.zeros(32, 4)
    save_file(tensors, spoilt / WEIGHTS)
    assert refusal(spoilt, bases("llama")).key == more


def test_infinite_numbers_are_named(spoilt: Path, bases: Any) -> None:
    tensors = load_file(spoilt / WEIGHTS)
    bad = min(tensors)
    tensors[bad][0, 0] = float("inf")
    save_file(tensors, spoilt / WEIGHTS)
    assert refusal(spoilt, bases("llama")).key == bad


def test_a_type_that_reads_the_bases_weights_needs_them(spoilt: Path, bases: Any) -> None:
    from dataclasses import replace

    spec = replace(bases("llama").spec, weights=None)
    with pytest.raises(BaseModelError, match="at hand"):
        read_adapter(spoilt, spec)


def test_a_wrappers_names_are_read(spoilt: Path, bases: Any) -> None:
    base = bases("llama")
    plain = read_adapter(spoilt, base.spec).adapter
    tensors = load_file(spoilt / WEIGHTS)
    wrapped = {
        k.replace("self_attn", "_fsdp_wrapped_module.self_attn._orig_mod"): t
        for k, t in tensors.items()
    }
    save_file(wrapped, spoilt / WEIGHTS)
    found = read_adapter(spoilt, base.spec).adapter
    assert found.updates.keys() == plain.updates.keys()


@pytest.mark.parametrize("kind", ["pissa_niter_16", "corda", "loftq", "lora_ga"])
def test_an_initialisation_that_can_not_be_done_again_is_refused(
    kind: str, bases: Any, train: Any, tmp_path: Path
) -> None:
    train("llama", tmp_path, r=4, target_modules=["q_proj"])
    edit_config(tmp_path, init_lora_weights=kind)
    error = refusal(tmp_path, bases("llama"))
    assert (error.file, error.key) == (CONFIG, "init_lora_weights")
    assert "path_initial_model_for_weight_conversion" in str(error)


def test_a_converted_pissa_is_a_plain_lora_of_twice_the_rank(
    bases: Any, canonical_logits: Any, tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model

    base = bases("llama")
    config = LoraConfig(r=4, init_lora_weights="pissa", target_modules=TARGETS)
    model = get_peft_model(copy.deepcopy(base.model), config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = "pissa"
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
    with torch.inference_mode():
        logits = model.eval()(input_ids=_tokens()).logits
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns that PiSSA changes the base
        model.save_pretrained(
            tmp_path / "adapter", path_initial_model_for_weight_conversion=tmp_path / "start"
        )
    adapter = read_adapter(tmp_path / "adapter", base.spec).adapter
    assert adapter.max_rank == 8
    torch.testing.assert_close(canonical_logits(base.model, adapter), logits, rtol=1e-4, atol=3e-5)


def test_a_sampled_output_is_refused_by_its_field(bases: Any, tmp_path: Path) -> None:
    base = bases("llama")
    tuned(base, "PVERA", tmp_path, r=4, sample_at_inference=True)
    assert refusal(tmp_path, base).key == "sample_at_inference"
