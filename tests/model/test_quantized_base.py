"""A base kept narrow: what is replaced, what it computes, what it takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from engine_driver import Driver, make_engine, request
from tiny_models import make_model, save_model
from torch import Tensor, nn
from transformers import MambaConfig, MambaForCausalLM
from turbo_adapters import make_turbo, turbo_adapter

from quickchange_kernels.linear.linear_int8 import dequantize_int8, quantize_int8
from quickchange_kernels.linear.linear_quantized import (
    PackedWeight,
    pack_int4,
    pack_int8,
    plain_linear_quantized,
)
from quickchange_server.model.adapter_layers import BaseLinear
from quickchange_server.model.fusion import FusedDecoderLayer
from quickchange_server.model.loading.model_loader import LoadedModel, load_model
from quickchange_server.model.quantized_linear import Int8Linear, Quantization, QuantizedLinear
from quickchange_store.canonical.canonical_adapter import CanonicalAdapter, LowRankUpdate

CPU = torch.device("cpu")
NARROW: tuple[Quantization, ...] = ("int8", "int8-exact", "int4")
MAMBA = {"vocab_size": 97, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 2}


def narrow_model(
    family: str, folder: Path, quantization: Quantization = "int8", *, adapters: bool = True
) -> LoadedModel:
    path = str(save_model(family, folder))
    return load_model(
        path, dtype=torch.float32, device=CPU, adapters=adapters, quantization=quantization
    )


@pytest.mark.parametrize("quantization", NARROW)
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
@pytest.mark.parametrize("adapters", [True, False])
def test_no_linear_keeps_float_weights(
    family: str, adapters: bool, quantization: Quantization, tmp_path: Path
) -> None:
    model = narrow_model(family, tmp_path, quantization, adapters=adapters).module
    assert not any(isinstance(module, nn.Linear | BaseLinear) for module in model.modules())
    matrices = {name for name, parameter in model.named_parameters() if parameter.dim() == 2}
    assert len(matrices) == 1  # the embedding
    kind = Int8Linear if quantization == "int8-exact" else QuantizedLinear
    assert any(isinstance(module, kind) for module in model.modules())


def test_a_linear_whose_weight_the_model_reads_itself_stays_as_it_is(tmp_path: Path) -> None:
    """Mamba multiplies by dt_proj's weight. The proof at load would tell if that were nothing."""
    MambaForCausalLM(MambaConfig(**MAMBA)).save_pretrained(tmp_path)
    model = load_model(
        str(tmp_path), dtype=torch.float32, device=CPU, adapters=False, quantization="int8"
    ).module
    kept = {name for name, module in model.named_modules() if isinstance(module, BaseLinear)}
    assert kept == {f"backbone.layers.{layer}.mixer.dt_proj" for layer in range(2)}


def test_layers_are_fused_as_with_float_weights(tmp_path: Path) -> None:
    model = narrow_model("llama", tmp_path).module
    assert sum(isinstance(module, FusedDecoderLayer) for module in model.modules()) == 3


def test_a_tied_head_gets_rows_of_its_own_and_the_embedding_keeps_its_numbers(
    tmp_path: Path,
) -> None:
    original = make_model("llama-tied").get_input_embeddings().weight
    model = narrow_model("llama-tied", tmp_path).module
    embedding = model.get_input_embeddings().weight  # type: ignore[operator]
    assert torch.equal(embedding, original)
    head = model.get_output_embeddings().base  # type: ignore[operator]
    assert isinstance(head, QuantizedLinear)
    assert head.quantized.dtype == torch.uint8


def exact_int8(linear: nn.Linear) -> None:
    held = dequantize_int8(*quantize_int8(linear.weight.detach()), torch.float32)
    linear.weight = nn.Parameter(held)


def rounded_inputs(linear: nn.Linear, pack: Callable[[Tensor], PackedWeight]) -> None:
    packed = pack(linear.weight.detach())
    parts = (packed.weight, packed.scale, packed.minimum, linear.bias, packed.columns)
    linear.forward = lambda x: plain_linear_quantized(x, *parts)  # type: ignore[method-assign]


def rounded_to_int8(linear: nn.Linear) -> None:
    rounded_inputs(linear, pack_int8)


@pytest.mark.parametrize(
    ("quantization", "change", "head_change"),
    [
        ("int8-exact", exact_int8, exact_int8),
        ("int8", rounded_to_int8, rounded_to_int8),
        ("int4", lambda linear: rounded_inputs(linear, pack_int4), rounded_to_int8),
    ],
)
def test_tokens_are_those_of_transformers_with_the_same_rounding(
    quantization: Quantization,
    change: Callable[[nn.Linear], None],
    head_change: Callable[[nn.Linear], None],
    tmp_path: Path,
) -> None:
    rounded = make_model("llama")
    for name, module in rounded.named_modules():
        if isinstance(module, nn.Linear):
            (head_change if name == "lm_head" else change)(module)
    prompt = [3, 1, 4, 1, 5, 9, 2, 6]
    expected = rounded.generate(torch.tensor([prompt]), max_new_tokens=10, do_sample=False)
    engine = make_engine(save_model("llama", tmp_path), quantization=quantization)
    driver = Driver(engine)
    engine.submit(request("a", prompt))
    driver.finish("a")
    assert driver.tokens["a"] == expected[0, len(prompt) :].tolist()


def adapter_with_heads(seed: int) -> CanonicalAdapter:
    drawn = torch.Generator().manual_seed(seed)
    update = LowRankUpdate(
        torch.randn(4, 48, generator=drawn), torch.randn(97, 4, generator=drawn), scale=0.2
    )
    return turbo_adapter(make_turbo(48, 3, seed=seed), lm_head=update)


def answers(
    path: Path, quantization: Quantization, keys: Sequence[int], **options: object
) -> list[list[int]]:
    """Tokens of requests served together: to the base where the key is 0, else to an adapter."""
    engine = make_engine(
        path, lambda digest: adapter_with_heads(int(digest)), quantization=quantization, **options
    )
    driver = Driver(engine)
    for key in keys:
        adapters = [(str(key), 1.0)] if key else []
        engine.submit(request(str(key), [3, 1, 4, 1, 5, 3, 1, 4], adapters, max_tokens=16))
    driver.finish(*map(str, keys))
    engine.close()
    return [driver.tokens[str(key)] for key in keys]


@pytest.mark.parametrize("quantization", NARROW)
def test_adapters_and_drafts_beside_one_another_change_no_token(
    quantization: Quantization, tmp_path: Path
) -> None:
    path, keys = save_model("llama", tmp_path), range(5)
    alone = [answers(path, quantization, [key], turbo=False)[0] for key in keys]
    assert answers(path, quantization, keys, turbo=True) == alone
    assert len({tuple(tokens) for tokens in alone}) == 5


@pytest.mark.parametrize("quantization", ["none", *NARROW])
def test_adapters_are_held_in_bfloat16_where_the_base_is_narrow(
    quantization: Quantization, tmp_path: Path
) -> None:
    path = save_model("llama", tmp_path)

    def held(**options: object) -> str:
        engine = make_engine(path, quantization=quantization, **options)
        engine.close()
        return engine.ready(0.0).adapter_dtype

    assert held() == ("float32" if quantization == "none" else "bfloat16")
    assert held(adapter_dtype="model") == "float32"
    assert held(adapter_dtype="float32") == "float32"


@pytest.mark.parametrize("quantization", NARROW)
def test_other_devices_are_refused_and_told_what_to_use(
    quantization: Quantization, tmp_path: Path
) -> None:
    refusal = rf"--quantization {quantization} .* use --quantization none"
    with pytest.raises(ValueError, match=refusal):
        load_model(
            str(tmp_path),
            dtype=torch.float32,
            device=torch.device("cuda"),
            adapters=True,
            quantization=quantization,
        )
