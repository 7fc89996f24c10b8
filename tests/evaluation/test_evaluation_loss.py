"""The loss of references equals transformers' and PEFT's, whatever examples share a pass."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from quickchange_server.config import Settings
from quickchange_server.entrypoints.in_process_engine import InProcessEngine
from quickchange_server.errors import AdapterFailedError
from quickchange_server.protocol import Component
from quickchange_store.base_model.base_spec import base_spec
from quickchange_store.canonical.canonical_adapter import CanonicalAdapter
from quickchange_store.importing import read_adapter
from quickchange_training.evaluation.evaluation_run import reference_loss
from quickchange_training.evaluation.variants import EvaluatedVariant
from quickchange_training.examples import Encoded


def encoded(lengths: list[tuple[int, int]]) -> list[Encoded]:
    """Random tokens, so many in the prompt and so many in all."""
    generator = random.Random(3)
    return [
        Encoded(tuple(generator.randrange(32) for _ in range(total)), prompt)
        for prompt, total in lengths
    ]


EXAMPLES = encoded([(1, 2), (5, 40), (16, 17), (30, 47), (200, 290), (3, 260)])


def of(*names: str) -> EvaluatedVariant:
    return EvaluatedVariant("", tuple(Component(name) for name in names), None, {})


@torch.inference_mode()
def by_transformers(model: torch.nn.Module, examples: list[Encoded] = EXAMPLES) -> float:
    """Mean over answer tokens, each example alone, in float64."""
    nats, count = 0.0, 0
    for example in examples:
        ids = torch.tensor([example.tokens])
        logprobs = model(input_ids=ids).logits[0].double().log_softmax(-1)
        for place in range(example.prompt_length, len(example.tokens)):
            nats -= float(logprobs[place - 1, example.tokens[place]])
            count += 1
    return nats / count


def started(bench: Any, adapter_device_bytes: int) -> InProcessEngine:
    """An engine that knows the LoRAs by name in place of digests."""

    def load(name: str) -> CanonicalAdapter:
        return read_adapter(bench.loras[name], base_spec(str(bench.model))).adapter

    settings = Settings(
        model=str(bench.model),
        store=Path(bench.model),
        prefix_cache=False,
        adapter_device_bytes=adapter_device_bytes,
    )
    return InProcessEngine(settings, load)


@pytest.fixture(scope="module")
def engine(bench: Any) -> Iterator[InProcessEngine]:
    with started(bench, 8 << 20) as engine:
        yield engine


def test_the_bases_loss_is_transformers(bench: Any, engine: InProcessEngine) -> None:
    model = AutoModelForCausalLM.from_pretrained(bench.model).eval()
    found = reference_loss(engine, of(), EXAMPLES)
    assert found == pytest.approx(by_transformers(model), rel=1e-5)


@pytest.mark.parametrize("name", ["first", "second"])
def test_an_adapters_loss_is_pefts(bench: Any, engine: InProcessEngine, name: str) -> None:
    base = AutoModelForCausalLM.from_pretrained(bench.model)
    expected = by_transformers(PeftModel.from_pretrained(base, bench.loras[name]).eval())
    found = reference_loss(engine, of(name), EXAMPLES)
    assert found == pytest.approx(expected, rel=1e-5)
    assert abs(expected - reference_loss(engine, of(), EXAMPLES)) > 0.01  # nothing of it stays


def test_an_activated_adapters_loss_is_pefts(
    bench: Any, engine: InProcessEngine, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(bench.loras["first"], tmp_path / "activated"))
    config = json.loads((folder / "adapter_config.json").read_text())
    config |= {"alora_invocation_tokens": [31, 30], "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    examples = [Encoded((*(t % 30 for t in e.tokens[:3]), 31, 30, 5, 7, 8, 9), 6) for e in EXAMPLES]
    base = AutoModelForCausalLM.from_pretrained(bench.model)
    expected = by_transformers(PeftModel.from_pretrained(base, folder).eval(), examples)
    activated = replace(of("first"), invocations={"first": (31, 30)})
    found = reference_loss(engine, activated, examples)
    assert found == pytest.approx(expected, rel=1e-5)
    assert abs(expected - reference_loss(engine, of("first"), examples)) > 1e-3


def test_an_adapter_larger_than_the_budget_is_refused(bench: Any) -> None:
    with (
        started(bench, 9000) as small,
        pytest.raises(AdapterFailedError, match="adapter_device_bytes"),
    ):
        reference_loss(small, of("second"), EXAMPLES)
