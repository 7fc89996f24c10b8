"""The engine on Triton's kernels gives PEFT's tokens: what runs on a GPU is what runs here.

Prefill in chunks, decode, prefix hits, preemption; adapters of different ranks, a composition and
plain rows in one batch; with decode steps as they come and from graphs.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from engine_driver import Driver, make_engine, request
from peft import LoraConfig, PeftModel, get_peft_model
from repeating_capture import RepeatingCapture
from tiny_models import greedy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from quickchange_server.engine import model_runner
from quickchange_server.engine.engine import Engine
from quickchange_store.base_model.base_spec import base_spec
from quickchange_store.canonical.canonical_adapter import CanonicalAdapter
from quickchange_store.formats.peft.lora import read_peft

VOCABULARY = 61
ADAPTERS: dict[str, dict[str, object]] = {
    "rank-3": {"r": 3, "target_modules": ["q_proj", "v_proj", "lm_head"]},
    "rank-20": {"r": 20, "target_modules": "all-linear"},
    "biased": {"r": 8, "target_modules": ["o_proj", "k_proj"], "lora_bias": True},
}
COMPOSITION = {"rank-3": 0.6, "rank-20": -0.4}
TOKENS = 4
BLOCK_BYTES = 2 * 2 * 2 * 8 * 4 * 4  # layers, keys and values, heads, sizes, tokens, float32


def make_base() -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        attention_bias=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).float().eval()
    for name, parameter in model.named_parameters():
        if "norm" not in name:  # logits far apart: a last bit can't change the best token
            torch.nn.init.normal_(parameter, std=0.3 if parameter.dim() > 1 else 0.1)
    return model


@dataclass
class Reference:
    """transformers and PEFT: the base, its adapters, and their weighted sum merged into it."""

    path: Path
    peft: PeftModel
    adapters: dict[str, CanonicalAdapter]

    def tokens(self, name: str, prompt: list[int]) -> list[int]:
        if name == "plain":
            with self.peft.disable_adapter():
                return greedy(self.peft, prompt, TOKENS)
        if name == "sum":
            return greedy(self._sum(), prompt, TOKENS)
        self.peft.set_adapter(name)
        return greedy(self.peft, prompt, TOKENS)

    def _sum(self) -> PreTrainedModel:
        merged = make_base()
        modules = dict(merged.named_modules())
        for name, weight in COMPOSITION.items():
            for path, update in self.adapters[name].updates.items():
                with torch.no_grad():
                    modules[path].weight += weight * update.scale * (update.b @ update.a)
        return merged


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    folder = tmp_path_factory.mktemp("reference")
    make_base().save_pretrained(folder / "base")
    model: PeftModel | None = None
    for index, (name, options) in enumerate(ADAPTERS.items()):
        torch.manual_seed(index)
        config = LoraConfig(lora_alpha=12, task_type="CAUSAL_LM", **options)
        if model is None:
            model = get_peft_model(make_base(), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        for key, parameter in model.named_parameters():
            if f".{name}" in key:
                torch.nn.init.normal_(parameter, std=0.25)
    assert model is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT speaks of the base's configuration
        model.eval().save_pretrained(folder)
    spec = base_spec(str(folder / "base"))
    adapters = {name: read_peft(folder / name, spec).adapter for name in ADAPTERS}
    return Reference(folder / "base", model, adapters)


@pytest.fixture(params=["as it comes", "from graphs"])
def capture(
    request: pytest.FixtureRequest, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> RepeatingCapture | None:
    """The way in which engines made from now on run decode steps."""
    if request.param == "as it comes":
        monkeypatch.setattr(model_runner, "capture_for", lambda _device: None)
        return None
    if device.type == "cuda":
        return None  # real graphs
    repeating = RepeatingCapture()
    monkeypatch.setattr(model_runner, "capture_for", lambda _device: repeating)
    return repeating


def start(reference: Reference, device: torch.device, **options: object) -> Engine:
    return make_engine(
        reference.path,
        reference.adapters.__getitem__,
        device=device.type,
        max_sequences=4,
        max_model_len=32,
        **options,
    )


def composition(name: str) -> list[tuple[str, float]]:
    if name == "plain":
        return []
    return list(COMPOSITION.items()) if name == "sum" else [(name, 1.0)]


# A graph's rows that no sequence has hold whatever was there, NaN too, which their sums tell of.
@pytest.mark.filterwarnings("ignore:All-NaN slice encountered")
def test_mixed_requests_get_their_own_models_tokens(
    reference: Reference, device: torch.device, capture: RepeatingCapture | None
) -> None:
    engine = start(reference, device, kv_cache_bytes=24 * BLOCK_BYTES)
    drive = Driver(engine)
    stem = [7, 3, 9, 1, 4, 4, 2, 8]
    asked = {
        "first": ("rank-3", stem),
        "other": ("plain", [5, 6]),
        "chunks": ("rank-20", [*stem, *stem, 11, 12, 13]),  # more than a step's rows
        "sum": ("sum", [9, 8, 7]),
        "biased": ("biased", [2, 1]),
        "again": ("rank-3", [*stem, 10]),  # finds the first one's block
        "last": ("plain", [*stem, 12]),  # does not: another composition
    }
    for key, (name, prompt) in asked.items():
        if key == "again":
            drive.finish("first")
        engine.submit(request(key, prompt, composition(name), max_tokens=TOKENS))
    drive.finish(*asked)
    engine.close()
    assert {key: drive.tokens[key] for key in asked} == {
        key: reference.tokens(name, prompt) for key, (name, prompt) in asked.items()
    }
    assert drive.first["again"].cached_tokens == 8
    assert drive.first["last"].cached_tokens == 0
    assert capture is None or capture.replayed > len(capture.rows)


# Steps as they come run in the test above; here the tables of graphs change under them.
@pytest.mark.parametrize(
    "capture",
    ["from graphs", pytest.param("as it comes", marks=pytest.mark.slow)],
    indirect=True,
)
def test_preempted_requests_lose_nothing(
    reference: Reference, device: torch.device, capture: RepeatingCapture | None
) -> None:
    del capture
    engine = start(reference, device, kv_cache_bytes=8 * BLOCK_BYTES, prefix_cache=False)
    drive = Driver(engine)
    asked = {
        "one": ("rank-20", list(range(14))),
        "two": ("rank-3", list(range(20, 35))),
    }
    arrived: set[str] = set()  # first, so that both are admitted in one step
    for name in ("rank-20", "rank-3"):
        engine.prefetch(name, "device")
    while len(arrived) < 2:
        arrived |= {e.digest for e in engine.poll_adapters() if getattr(e, "tier", "") == "device"}
    for key, (name, prompt) in asked.items():
        engine.submit(request(key, prompt, composition(name), max_tokens=TOKENS))
    drive.finish(*asked)
    engine.close()
    assert engine.scheduler.preemptions > 0
    assert {key: drive.tokens[key] for key in asked} == {
        key: reference.tokens(name, prompt) for key, (name, prompt) in asked.items()
    }
