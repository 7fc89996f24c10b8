"""Adapters with more tokens than their base equal PEFT token for token, beside plain rows."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from engine_driver import Driver, make_engine, request
from grown_vocabulary import ADDED, save_base, train_grown
from peft import LoraConfig
from tiny_models import VOCABULARY, greedy, make_model

from quickchange_store.base_model.base_spec import base_spec
from quickchange_store.canonical.canonical_adapter import CanonicalAdapter
from quickchange_store.importing import read_adapter

NEW = list(range(VOCABULARY, VOCABULARY + len(ADDED)))
PADDED = "padded to 128 rows"
KINDS: Mapping[str, Callable[[], LoraConfig]] = {
    "trained tokens": lambda: _lora(["q_proj", "v_proj"], trainable_token_indices=[5, *NEW]),
    "resized alone": lambda: _lora(["q_proj", "v_proj"]),
    "saved whole": lambda: _lora(["q_proj"], modules_to_save=["embed_tokens", "lm_head"]),
    PADDED: lambda: _lora(["q_proj"]),
    "LoRA of the ends": lambda: _lora(["q_proj", "embed_tokens", "lm_head"]),
}
TOKENS = 12


def _lora(targets: list[str], **options: object) -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM", **options)


@dataclass(frozen=True)
class Grown:
    """A base, its adapters, and what PEFT says under each of the same prompt with added tokens."""

    family: str
    base: Path
    adapters: dict[str, CanonicalAdapter]
    prompts: dict[str, list[int]]
    answers: dict[str, list[int]]


@pytest.fixture(scope="module", params=["llama", "llama-tied"])
def grown(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Grown:
    folder = tmp_path_factory.mktemp("grown")
    base = save_base(request.param, folder / "base")
    spec = base_spec(str(base))
    made = Grown(request.param, base, {}, {}, {})
    generator = random.Random(1)
    for seed, (name, config) in enumerate(KINDS.items()):
        trained = train_grown(
            base, folder / name, config(), seed=seed, padded=64 if name == PADDED else None
        )
        prompt = [generator.randrange(VOCABULARY + len(ADDED)) for _ in range(20)]
        made.prompts[name] = [*prompt, NEW[seed % len(NEW)]]
        made.answers[name] = greedy(trained, made.prompts[name], TOKENS)
        made.adapters[name] = read_adapter(folder / name, spec).adapter
    assert any(set(NEW) & set(answer) for answer in made.answers.values())
    return made


def test_added_tokens_are_read_and_written_as_by_peft(grown: Grown) -> None:
    engine = make_engine(
        grown.base,
        grown.adapters.__getitem__,
        extra_vocabulary=64,
        max_sequences=2 * len(KINDS),
        max_batch_tokens=32,
    )
    drive = Driver(engine)
    plain = {name: [t % VOCABULARY for t in prompt] for name, prompt in grown.prompts.items()}
    for name, prompt in grown.prompts.items():
        engine.submit(request(name, prompt, [(name, 1.0)], max_tokens=TOKENS))
        engine.submit(request(f"plain {name}", plain[name], max_tokens=TOKENS))
    drive.finish(*grown.prompts, *(f"plain {name}" for name in grown.prompts))
    engine.close()
    base = make_model(grown.family)
    for name in grown.prompts:
        assert drive.tokens[name] == grown.answers[name], name
        assert drive.tokens[f"plain {name}"] == greedy(base, plain[name], TOKENS), name


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_spare_rows_of_the_base_need_no_setting(family: str, tmp_path: Path) -> None:
    """transformers cuts the matrices to as many rows as there are tokens; the base keeps all."""
    base = save_base(family, tmp_path / "base", fewer=7)
    config = KINDS["saved whole"]()
    trained = train_grown(base, tmp_path / "grown", config, fewer=7)
    adapter = read_adapter(tmp_path / "grown", base_spec(str(base))).adapter
    assert adapter.tokenizer is not None
    rows = adapter.tokenizer.rows
    assert rows == VOCABULARY - 7 + len(ADDED)
    assert [token.id for token in adapter.tokenizer.tokens] == list(range(rows - 3, rows))
    engine = make_engine(base, {"grown": adapter}.__getitem__)
    drive = Driver(engine)
    prompt = [5, rows - 3, 7, rows - 1]
    wished = {VOCABULARY - 1: 50.0}  # a row that the adapter's model lacks
    engine.submit(request("grown", prompt, [("grown", 1.0)], max_tokens=TOKENS, logit_bias=wished))
    engine.submit(request("plain", prompt, max_tokens=TOKENS))
    drive.finish("grown", "plain")
    engine.close()
    assert drive.tokens["grown"] == greedy(trained, prompt, TOKENS)
    assert drive.tokens["plain"] == greedy(make_model(family), prompt, TOKENS)
