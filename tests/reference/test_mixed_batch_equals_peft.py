"""Greedy float32 output equals transformers + PEFT token for token, whatever shares the batch.

Twelve adapters of different ranks and targets and plain rows, prompts of different lengths, chunked
prefill, preemption, prefix hits and cancellations forced in between.
"""

from __future__ import annotations

import random
import re
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_driver import Driver, make_engine, request
from peft import LoraConfig, PeftModel, get_peft_model
from text_of_pieces import text_of_pieces
from tiny_models import VOCABULARY, greedy, make_model, save_model

from quickchange_server.protocol import Constraint
from quickchange_server.structured_output.grammar import TokenGrammars
from quickchange_store.base_model.base_spec import base_spec
from quickchange_store.canonical.canonical_adapter import CanonicalAdapter
from quickchange_store.formats.peft.lora import read_peft

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
CONFIGS: list[dict[str, object]] = [
    {"r": 4, "target_modules": ["q_proj", "v_proj"]},
    {"r": 8, "target_modules": ATTENTION},
    {"r": 16, "target_modules": [*ATTENTION, *MLP]},
    {"r": 3, "target_modules": "all-linear"},
    {"r": 8, "target_modules": ["down_proj"], "use_rslora": True},
    {"r": 8, "target_modules": ATTENTION, "rank_pattern": {"q_proj": 5, "layers.1.*v_proj": 12}},
    {"r": 8, "target_modules": MLP, "alpha_pattern": {"up_proj": 3}},
    {"r": 6, "target_modules": r".*layers\.[02]\..*(k|o)_proj"},
    {"r": 8, "target_modules": ["q_proj", "lm_head"]},
    {"r": 8, "target_modules": ["embed_tokens", "v_proj"]},
    {"r": 20, "target_modules": ATTENTION, "layers_to_transform": [1]},
    {"r": 8, "target_modules": ["q_proj", "v_proj"], "lora_bias": True},
]


@dataclass
class Reference:
    """The PEFT model with all adapters, and the same adapters in canonical form."""

    path: Path
    model: PeftModel
    adapters: dict[str, CanonicalAdapter]

    def tokens(self, adapter: str | None, prompt: list[int], count: int) -> list[int]:
        if adapter is None:
            with self.model.disable_adapter():
                return greedy(self.model, prompt, count)
        self.model.set_adapter(adapter)
        return greedy(self.model, prompt, count)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    folder = tmp_path_factory.mktemp("reference")
    path = save_model("llama", folder / "base")
    spec = base_spec(str(path))
    model: PeftModel | None = None
    for index, options in enumerate(CONFIGS):
        torch.manual_seed(index)
        config = LoraConfig(lora_alpha=12, task_type="CAUSAL_LM", **options)
        name = f"adapter-{index}"
        if model is None:
            model = get_peft_model(make_model("llama"), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        for key, parameter in model.named_parameters():
            if f".{name}" in key:
                torch.nn.init.normal_(parameter, std=0.25)
    assert model is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT adds the base's own embedding to adapters of it
        model.eval().save_pretrained(folder)
    adapters = {
        f"adapter-{index}": read_peft(folder / f"adapter-{index}", spec).adapter
        for index in range(len(CONFIGS))
    }
    return Reference(path, model, adapters)


def prompts(count: int, seed: int) -> list[list[int]]:
    generator = random.Random(seed)
    return [
        [generator.randrange(VOCABULARY) for _ in range(generator.randint(1, 40))]
        for _ in range(count)
    ]


def test_twelve_adapters_and_plain_rows_in_one_batch(reference: Reference) -> None:
    engine = make_engine(reference.path, reference.adapters.__getitem__, max_sequences=15)
    names: list[str | None] = [*reference.adapters, None, None, None]
    drive = Driver(engine)
    asked = dict(enumerate(zip(names, prompts(len(names), 1), strict=True)))
    for key, (name, prompt) in asked.items():
        engine.submit(request(str(key), prompt, [(name, 1.0)] if name else []))
    drive.finish(*map(str, asked))
    engine.close()
    for key, (name, prompt) in asked.items():
        assert drive.tokens[str(key)] == reference.tokens(name, prompt, 10), (name, prompt)


def test_preemption_prefix_hits_and_cancellations_change_nothing(reference: Reference) -> None:
    engine = make_engine(
        reference.path,
        reference.adapters.__getitem__,
        kv_cache_bytes=3 * 2 * 2 * 12 * 4 * 64 * 3 // 2,  # 96 tokens for up to eight sequences
        max_model_len=96,
    )
    drive = Driver(engine)
    generator = random.Random(2)
    names: list[str | None] = [*reference.adapters, None, None]
    stems = prompts(2, 3)
    asked: dict[str, tuple[str | None, list[int]]] = {}
    cancelled: set[str] = set()
    for index in range(40):
        key = str(index)
        prompt = [*stems[index % 2], *prompts(40, 4)[index][:7]]
        asked[key] = (generator.choice(names), prompt)
        name = asked[key][0]
        engine.submit(request(key, prompt, [(name, 1.0)] if name else []))
        for _ in range(generator.randint(0, 3)):
            drive.step()
        if index % 5 == 4:
            victim = str(generator.randint(0, index))
            if victim not in drive.last:
                engine.cancel(victim)
                cancelled.add(victim)
    drive.finish(*(set(asked) - cancelled))
    engine.close()
    assert cancelled
    assert engine.scheduler.preemptions > 0
    assert engine.scheduler.prefix_hit_tokens > 0
    for key, (name, prompt) in asked.items():
        expected = reference.tokens(name, prompt, 10)
        got = drive.tokens.get(key, [])
        assert got == expected[: len(got)] if key in cancelled else got == expected, (key, name)


def test_other_kinds_of_request_beside_change_nothing(reference: Reference) -> None:
    """The background, salted, constrained, and those that read their prompts; all short of room."""
    letters = [chr(ord("!") + token) for token in range(VOCABULARY - 1)]
    engine = make_engine(
        reference.path,
        reference.adapters.__getitem__,
        TokenGrammars.of(text_of_pieces([*letters, "<end>"], VOCABULARY - 1)),
        kv_cache_bytes=3 * 2 * 2 * 12 * 4 * 64 * 5 // 2,  # 160 tokens for up to eight sequences
        max_model_len=96,
    )
    kinds: list[dict[str, Any]] = [
        {},
        {"background": True},
        {"salt": "one"},
        {"constraint": Constraint("regex", "[A-Z]{3,9}")},
        {"sampling": {"prompt_logprobs": 2}},
        {"pooling": "mean", "background": True},
        {"pooling": "last"},
    ]
    names: list[str | None] = [*reference.adapters, None, None]
    drive = Driver(engine)
    asked: dict[str, tuple[str | None, list[int], dict[str, Any]]] = {}
    for index, prompt in enumerate(prompts(8 * len(kinds), 7)):
        key, name, kind = str(index), names[index % len(names)], kinds[index % len(kinds)]
        asked[key] = (name, prompt, kind)
        asking = request(key, prompt, [(name, 1.0)] if name else [])
        sampling = replace(asking.sampling, **kind.get("sampling", {}))
        engine.submit(replace(asking, **(kind | {"sampling": sampling})))
        if index % 3 == 0:
            drive.step()
    drive.finish(*asked)
    engine.close()
    assert engine.scheduler.preemptions > 0
    for key, (name, prompt, kind) in asked.items():
        if "pooling" in kind:
            assert drive.last[key].embedding is not None, key
        elif "constraint" in kind:
            said = "".join(letters[token] for token in drive.tokens[key])
            assert re.fullmatch("[A-Z]{3,9}", said), key
        else:
            assert drive.tokens[key] == reference.tokens(name, prompt, 10), (key, name, kind)


def test_a_composition_is_the_weighted_sum_of_its_adapters(reference: Reference) -> None:
    weights = {"adapter-1": 0.6, "adapter-2": -0.4, "adapter-6": 1.3}
    merged = make_model("llama")
    modules = dict(merged.named_modules())
    for name, weight in weights.items():
        for path, update in reference.adapters[name].updates.items():
            with torch.no_grad():
                modules[path].weight += weight * update.scale * (update.b @ update.a)
    engine = make_engine(reference.path, reference.adapters.__getitem__)
    drive = Driver(engine)
    for key, prompt in enumerate(prompts(4, 5)):
        engine.submit(request(str(key), prompt, list(weights.items())))
    engine.submit(request("plain", [1, 2, 3]))
    drive.finish("0", "1", "2", "3", "plain")
    engine.close()
    for key, prompt in enumerate(prompts(4, 5)):
        assert drive.tokens[str(key)] == greedy(merged, prompt, 10)
    assert drive.tokens["plain"] == reference.tokens(None, [1, 2, 3], 10)


def test_more_adapters_than_the_device_holds_take_turns(reference: Reference) -> None:
    engine = make_engine(
        reference.path,
        reference.adapters.__getitem__,
        adapter_device_bytes=2 << 20,
        adapter_host_bytes=1 << 20,
    )
    drive = Driver(engine)
    asked = {
        f"{name}/{turn}": (name, prompt)
        for turn in range(3)
        for name, prompt in zip(reference.adapters, prompts(12, turn), strict=True)
    }
    for key, (name, prompt) in asked.items():
        engine.submit(request(key, prompt, [(name, 1.0)]))
    drive.finish(*asked)
    engine.close()
    for key, (name, prompt) in asked.items():
        assert drive.tokens[key] == reference.tokens(name, prompt, 10), key


def test_an_adapter_that_cannot_be_loaded_fails_its_own_request_alone(
    reference: Reference,
) -> None:
    engine = make_engine(reference.path, reference.adapters.__getitem__)
    drive = Driver(engine)
    engine.submit(request("bad", [1, 2], [("no-such-digest", 1.0)]))
    engine.submit(request("good", [1, 2], [("adapter-1", 1.0)]))
    drive.finish("bad", "good")
    engine.close()
    assert drive.last["bad"].error_kind == "adapter"
    assert "no-such-digest" in (drive.last["bad"].error or "")
    assert drive.tokens["good"] == reference.tokens("adapter-1", [1, 2], 10)


def test_adapters_held_narrower_than_the_base_equal_peft_with_rounded_adapters(
    reference: Reference,
) -> None:
    engine = make_engine(
        reference.path, reference.adapters.__getitem__, max_sequences=12, adapter_dtype="bfloat16"
    )
    drive = Driver(engine)
    asked = dict(enumerate(zip(reference.adapters, prompts(12, 6), strict=False)))
    for key, (name, prompt) in asked.items():
        engine.submit(request(str(key), prompt, [(name, 1.0)]))
    drive.finish(*map(str, asked))
    engine.close()
    weights = {
        key: parameter
        for key, parameter in reference.model.named_parameters()
        if "lora_" in key and ".adapter-" in key
    }
    exact = {key: parameter.detach().clone() for key, parameter in weights.items()}
    with torch.no_grad():
        for parameter in weights.values():
            parameter.copy_(parameter.bfloat16())
    try:
        expected = {key: reference.tokens(*asked[key], 10) for key in asked}
    finally:
        with torch.no_grad():
            for key, parameter in weights.items():
                parameter.copy_(exact[key])
    assert {key: drive.tokens[str(key)] for key in asked} == expected
    assert any(expected[key] != reference.tokens(*asked[key], 10) for key in asked)
