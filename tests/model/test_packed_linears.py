"""A base's linears in panels: what is packed, what keeps its rows, and what both take."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engine_driver import Driver, make_engine, request
from tiny_models import VOCABULARY, greedy, make_model, save_model
from torch import nn
from transformers import MambaConfig, MambaForCausalLM

from quickchange_kernels.linear.linear_panels import unpack_panels
from quickchange_server.model.adapter_layers import (
    BaseLinear,
    PackedLinear,
    base_linear,
    sharing_weights,
    tied_embedding,
)
from quickchange_server.model.fusion import FusedDecoderLayer
from quickchange_server.model.loading.model_loader import LoadedModel, load_model
from quickchange_store.canonical.canonical_adapter import CanonicalAdapter, LowRankUpdate

CPU = torch.device("cpu")


EVEN = 112  # tokens whose LM head fills its panels; tiny_models' 97 do not


def loaded(
    family: str,
    folder: Path,
    dtype: torch.dtype = torch.float32,
    *,
    vocabulary: int = VOCABULARY,
    spare: int = 0,
) -> LoadedModel:
    path = str(save_model(family, folder, vocabulary=vocabulary))
    return load_model(path, dtype=dtype, device=CPU, adapters=True, extra_vocabulary=spare)


def packed(model: nn.Module) -> list[PackedLinear]:
    return [module for module in model.modules() if isinstance(module, PackedLinear)]


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt_neox"])
def test_every_linear_but_an_odd_head_is_packed(family: str, tmp_path: Path) -> None:
    model = loaded(family, tmp_path)
    rows = [module for module in model.module.modules() if isinstance(module, BaseLinear)]
    assert rows == [model.head.base]
    assert len(packed(model.module)) > 4


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt_neox"])
def test_a_head_that_fills_its_panels_is_packed_too(family: str, tmp_path: Path) -> None:
    model = loaded(family, tmp_path, vocabulary=EVEN)
    assert isinstance(model.head.base, PackedLinear)
    assert not [one for one in model.module.modules() if isinstance(one, BaseLinear)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapters", [True, False])
def test_a_tied_embedding_reads_a_packed_heads_rows(
    dtype: torch.dtype, adapters: bool, tmp_path: Path
) -> None:
    path = str(save_model("llama-tied", tmp_path, vocabulary=EVEN))
    model = load_model(path, dtype=dtype, device=CPU, adapters=adapters)
    original = make_model("llama-tied", vocabulary=EVEN).get_input_embeddings().weight
    assert torch.equal(model.embedding(torch.arange(EVEN)), original.to(dtype))
    assert model.embedding.weight.shape == original.shape


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_a_head_with_spare_tokens_keeps_its_rows(family: str, tmp_path: Path) -> None:
    model = loaded(family, tmp_path, vocabulary=EVEN, spare=16)
    assert isinstance(model.head.base, BaseLinear)
    assert (model.embedding.weight is model.head.weight) == (family == "llama-tied")


def test_a_tied_embedding_that_scales_what_it_reads_keeps_its_rows(tmp_path: Path) -> None:
    model = loaded("gemma3n", tmp_path, vocabulary=EVEN)
    assert isinstance(model.head.base, BaseLinear)
    assert model.embedding.weight is model.head.weight


def test_a_tied_matrix_that_others_read_keeps_its_rows() -> None:
    model = make_model("llama-tied", vocabulary=EVEN)
    assert tied_embedding(model) is model.get_input_embeddings()
    model.model.layers[0].mlp.reader = nn.Linear(48, EVEN, bias=False)
    model.model.layers[0].mlp.reader.weight = model.lm_head.weight
    assert tied_embedding(model) is None
    assert tied_embedding(make_model("llama", vocabulary=EVEN)) is None


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_prompts_in_chunks_and_adapted_embeddings_on_a_packed_head_give_transformers_tokens(
    family: str, tmp_path: Path
) -> None:
    """Chunks of 16 rows, decode steps and an adapter of the embedding share the engine's steps."""
    low = LowRankUpdate(torch.randn(2, EVEN), torch.randn(48, 2), 0.2)
    adapter = CanonicalAdapter("Tiny", "tiny", {"model.embed_tokens": low})
    original = make_model(family, vocabulary=EVEN)
    drive = Driver(make_engine(save_model(family, tmp_path, vocabulary=EVEN), lambda _: adapter))
    prompts = {"short": [3, 111, 40], "long": [*range(20, 70)]}
    for name, prompt in prompts.items():
        drive.engine.submit(request(name, prompt))
        drive.engine.submit(request(f"{name} adapted", prompt, [("adapter", 1.0)]))
    drive.finish(*prompts, *(f"{name} adapted" for name in prompts))
    drive.engine.close()
    for name, prompt in prompts.items():
        assert drive.tokens[name] == greedy(original, prompt, 10), name
    original.get_input_embeddings().register_forward_hook(
        lambda _, ids, out: out + low.scale * (low.a[:, ids[0]].permute(1, 2, 0) @ low.b.T)
    )
    for name, prompt in prompts.items():
        assert drive.tokens[f"{name} adapted"] == greedy(original, prompt, 10), name


def test_layers_are_fused_as_with_rows(tmp_path: Path) -> None:
    model = loaded("llama", tmp_path).module
    assert sum(isinstance(module, FusedDecoderLayer) for module in model.modules()) == 3


def test_an_odd_tied_head_and_its_embedding_stay_one_matrix(tmp_path: Path) -> None:
    model = loaded("llama-tied", tmp_path)
    original = make_model("llama-tied").get_input_embeddings().weight
    assert model.embedding.weight is model.head.weight
    assert torch.equal(model.embedding.weight, original)


@pytest.mark.parametrize("vocabulary", [VOCABULARY, EVEN])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_stand_once_in_memory(dtype: torch.dtype, vocabulary: int, tmp_path: Path) -> None:
    model = loaded("llama-tied", tmp_path, dtype, vocabulary=vocabulary).module
    held = {
        t.data_ptr(): t.untyped_storage().nbytes() for t in (*model.parameters(), *model.buffers())
    }
    for module in packed(model):
        held[module.weight.data_ptr()] = module.weight.untyped_storage().nbytes()
    weights = (
        sum(p.numel() for p in make_model("llama-tied", vocabulary=vocabulary).parameters())
        * dtype.itemsize
    )
    assert sum(held.values()) < 1.01 * weights  # with the tables of rotary positions


def test_a_packed_weight_tells_its_shape_and_dtype(tmp_path: Path) -> None:
    model = loaded("llama", tmp_path, torch.bfloat16).module
    original = make_model("llama").model.layers[0].self_attn.o_proj.weight
    o_proj = model.model.layers[0].self_attn.o_proj
    assert (o_proj.weight.shape, o_proj.weight.dtype) == (original.shape, torch.bfloat16)
    held = unpack_panels(o_proj.base.panels, *original.shape)
    assert torch.equal(held, original.to(torch.bfloat16))


def test_a_linear_whose_weight_the_model_reads_itself_keeps_its_rows(tmp_path: Path) -> None:
    """Mamba multiplies by dt_proj's weight. The proof at load would tell if that were nothing."""
    sizes = {"hidden_size": 32, "state_size": 8, "time_step_rank": 16, "num_hidden_layers": 2}
    config = MambaConfig(vocab_size=97, **sizes)
    MambaForCausalLM(config).save_pretrained(tmp_path)
    model = load_model(str(tmp_path), dtype=torch.float32, device=CPU, adapters=False)
    kept = {name for name, one in model.module.named_modules() if isinstance(one, BaseLinear)}
    assert kept == {"lm_head", *(f"backbone.layers.{n}.mixer.dt_proj" for n in range(2))}


def test_linears_that_share_a_weight_are_found() -> None:
    shared = make_model("llama")
    first, second = (shared.model.layers[index].mlp for index in (0, 1))
    second.down_proj.weight = first.down_proj.weight
    assert sharing_weights(shared) == {first.down_proj, second.down_proj}


def test_a_dtype_without_panels_keeps_its_rows() -> None:
    half = nn.Linear(20, 32).to(torch.float16).requires_grad_(False)
    assert isinstance(base_linear(half, rows_read=False), BaseLinear)
    assert isinstance(base_linear(half.to(torch.bfloat16), rows_read=False), PackedLinear)


@pytest.mark.parametrize(
    ("features", "width", "kind"),
    [(20, 32, PackedLinear), (20, 30, BaseLinear), (21, 32, BaseLinear)],
)
def test_a_weight_that_panels_would_enlarge_keeps_its_rows(
    features: int, width: int, kind: type[nn.Module]
) -> None:
    linear = nn.Linear(features, width).to(torch.bfloat16).requires_grad_(False)
    assert isinstance(base_linear(linear, rows_read=False), kind)


def test_packed_and_by_rows_are_the_same_linear() -> None:
    linear = nn.Linear(70, 112).requires_grad_(False)
    x = torch.randn(5, 70)
    with torch.inference_mode():
        torch.testing.assert_close(base_linear(linear, rows_read=False)(x), base_linear(linear)(x))
