"""A base that is stored quantised: its own linears compute, adapters are added to them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from engine_driver import Driver, engine_of, make_engine, request
from peft import LoraConfig, PeftModel, get_peft_model
from quantized_models import KINDS, ROUNDING, PackedLinear, float_model, packed_model
from tiny_models import greedy, make_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from quickchange_server.engine.engine import Engine
from quickchange_server.errors import UnsupportedModelError
from quickchange_server.model import paged_attention
from quickchange_server.model.adapter_layers import AdaptedLinear, SharedProjection
from quickchange_server.model.loading.model_loader import load_model, prepare
from quickchange_store.base_model.base_spec import base_spec
from quickchange_store.base_model.base_weights import load_base
from quickchange_store.canonical.canonical_adapter import LowRankUpdate
from quickchange_store.errors import BaseModelError
from quickchange_store.formats.peft.lora import read_peft

PROMPTS = {"a": [7, 9, 20, 4, 11, 5, 31], "b": [17, 3], "c": [50, 60, 70]}
TARGETS = ["q_proj", "v_proj", "o_proj", "down_proj"]
CPU = torch.device("cpu")


def lora(folder: Path) -> Path:
    """A LoRA trained on the float model, as such adapters usually are."""
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False)
    get_peft_model(float_model(), config).save_pretrained(folder)
    return folder


def add_low_rank(module: torch.nn.Module, update: LowRankUpdate) -> None:
    def hook(_: torch.nn.Module, args: tuple[torch.Tensor], y: torch.Tensor) -> torch.Tensor:
        return y + update.scale * (args[0] @ update.a.T @ update.b.T)

    module.register_forward_hook(hook)


def run(engine: Engine) -> dict[str, list[int]]:
    """Tokens of the prompts in one batch, b's with the adapter."""
    driver = Driver(engine)
    for name, prompt in PROMPTS.items():
        engine.submit(request(name, prompt, [("lora", 1.0)] if name == "b" else ()))
    driver.finish(*PROMPTS)
    return driver.tokens


@torch.inference_mode()
def worst_choice(model: torch.nn.Module, prompt: list[int], tokens: list[int]) -> float:
    """Distance of a chosen token's logit from the best, relative to the logits' deviation."""
    logits = model(input_ids=torch.tensor([prompt + tokens]), use_cache=False).logits[0]
    rows = logits[len(prompt) - 1 : -1]
    chosen = rows.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    return float(((rows.amax(1) - chosen) / rows.std(1)).max())


@pytest.mark.parametrize("kind", KINDS)
def test_base_and_adapter_give_pefts_tokens_on_the_same_weights(kind: str, tmp_path: Path) -> None:
    KINDS[kind](tmp_path / "model", "llama")
    folder = lora(tmp_path / "lora")
    adapter = read_peft(folder, base_spec(tmp_path / "model")).adapter
    found = run(make_engine(tmp_path / "model", load=lambda _: adapter))

    def loaded() -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(
            tmp_path / "model", dtype=torch.float32, attn_implementation="eager"
        )

    base = loaded()
    for name in ("a", "c", "b"):  # PEFT changes the model: last
        if name == "b" and kind.startswith("bitsandbytes"):
            base = loaded()  # PEFT misreads weights that a first pass has packed for the CPU
        model = PeftModel.from_pretrained(base, folder) if name == "b" else base
        if kind in ROUNDING:
            assert worst_choice(model, PROMPTS[name], found[name]) < 0.1, name
        else:
            assert found[name] == greedy(model, PROMPTS[name], 10), name


def test_packed_linears_without_a_weight_are_called_as_they_are(tmp_path: Path) -> None:
    """The shape of GPTQ's and AWQ's linears, whose libraries need a GPU."""
    model = prepare(packed_model("qwen2", paged_attention.NAME), adapters=True)
    packed = [m for m in model.module.modules() if isinstance(m, AdaptedLinear)]
    assert sum(isinstance(module.base, PackedLinear) for module in packed) == 3 * 7
    assert not any(isinstance(module, SharedProjection) for module in model.module.modules())
    source = make_model("qwen2")
    source.save_pretrained(tmp_path / "model")
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False)
    get_peft_model(source, config).save_pretrained(tmp_path / "lora")
    adapter = read_peft(tmp_path / "lora", base_spec(tmp_path / "model")).adapter
    engine = engine_of(model, tmp_path, lambda _: adapter)
    found = run(engine)
    reference = packed_model("qwen2", "eager")
    assert found["a"] == greedy(reference, PROMPTS["a"], 10)
    for path, update in adapter.updates.items():
        add_low_rank(reference.get_submodule(path), update)
    assert found["b"] == greedy(reference, PROMPTS["b"], 10)


def test_int8_on_top_of_a_quantised_checkpoint_is_refused(tmp_path: Path) -> None:
    KINDS["torchao-int8"](tmp_path, "llama")
    with pytest.raises(UnsupportedModelError, match=r"quantised already, by torchao") as error:
        load_model(
            str(tmp_path), dtype=torch.float32, device=CPU, adapters=True, quantization="int8"
        )
    assert error.value.param == "quantization"


@pytest.mark.parametrize("method", ["gptq", "awq", "aqlm", "hqq", "quanto", "eetq", "vptq"])
def test_a_missing_library_is_refused_by_name_while_shapes_can_be_read(
    method: str, tmp_path: Path
) -> None:
    float_model("qwen2").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4, "group_size": 32}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert base_spec(tmp_path).modules["model.layers.1.mlp.down_proj"].in_features == 256
    with pytest.raises(BaseModelError, match=rf"quantised by '{method}'.*install its library"):
        load_base(str(tmp_path))


@pytest.mark.parametrize(
    "kind", ["fp8-blocks", "torchao-float8", "compressed-tensors-w4a16", "bitsandbytes-8bit"]
)
def test_weights_that_an_import_needs_are_refused_where_they_are_codes(
    kind: str, tmp_path: Path
) -> None:
    KINDS[kind](tmp_path, "llama")
    weights = base_spec(tmp_path).weights
    assert weights is not None
    assert weights.tensor("model.embed_tokens.weight").shape == (200, 128)
    with pytest.raises(BaseModelError, match="before quantisation"):
        weights.tensor("model.layers.0.self_attn.q_proj.weight")
