"""The engine in one process: answers in order, whatever shares the batch, with their timings."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import VOCABULARY, greedy, make_model, save_model

from quickchange_server.config import Settings
from quickchange_server.entrypoints.llm import (
    Completion,
    OfflineEngine,
    OfflineError,
    OfflineRequest,
    OfflineRun,
)
from quickchange_server.protocol import Component, Drafting, SamplingParams

PROMPTS = [[5, 9, 2], [7], [1, 2, 3, 4, 5, 6, 7, 8], [40, 41], [96, 0, 13]]
LENGTHS = [9, 3, 5, 1, 7]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("offline")
    save_model("llama-tied", folder)
    return folder


@pytest.fixture
def engine(model: Path, tmp_path: Path) -> OfflineEngine:
    settings = Settings(model=str(model), store=tmp_path, kv_cache_bytes=1 << 20, max_sequences=3)
    return OfflineEngine(settings)


def asked(prompt: list[int], length: int) -> OfflineRequest:
    return OfflineRequest(tuple(prompt), SamplingParams(0, length, temperature=0.0))


def run(engine: OfflineEngine, concurrency: int | None = None) -> OfflineRun:
    requests = [asked(p, n) for p, n in zip(PROMPTS, LENGTHS, strict=True)]
    return engine.run(requests, concurrency=concurrency)


@pytest.mark.parametrize("concurrency", [None, 1, 2])
def test_completions_are_transformers_own_in_the_requests_order(
    engine: OfflineEngine, concurrency: int | None
) -> None:
    expected = [
        tuple(greedy(make_model("llama-tied"), prompt, length))
        for prompt, length in zip(PROMPTS, LENGTHS, strict=True)
    ]
    with engine:
        found = run(engine, concurrency)
    assert [completion.token_ids for completion in found.completions] == expected
    assert {completion.finish_reason for completion in found.completions} == {"length"}


def test_concurrency_bounds_what_shares_a_step(engine: OfflineEngine) -> None:
    with engine:
        alone, together = run(engine, 1), run(engine, None)
    assert alone.steps == sum(LENGTHS)
    assert together.steps < alone.steps


def test_each_request_is_told_of_once_with_times_in_order(engine: OfflineEngine) -> None:
    told: dict[int, Completion] = {}

    def hear(index: int, completion: Completion) -> None:
        assert index not in told
        told[index] = completion

    with engine:
        found = engine.run([asked(p, 4) for p in PROMPTS], on_finished=hear)
    assert [told[i] for i in range(len(PROMPTS))] == list(found.completions)
    assert found.tokens == 4 * len(PROMPTS)
    for completion in found.completions:
        assert 0 < completion.first_token_seconds < completion.seconds <= found.seconds


def test_states_are_what_enters_the_lm_head_of_transformers_model(engine: OfflineEngine) -> None:
    with engine:
        found = engine.run(
            [asked(p, n) for p, n in zip(PROMPTS, LENGTHS, strict=True)], states=True
        )
    reference = make_model("llama-tied")
    for prompt, completion in zip(PROMPTS, found.completions, strict=True):
        tokens = torch.tensor([[*prompt, *completion.token_ids]])
        with torch.inference_mode():
            hidden = reference.model(input_ids=tokens).last_hidden_state[0]
        torch.testing.assert_close(
            completion.states, hidden[len(prompt) - 1 : -1], rtol=1e-4, atol=1e-4
        )


def test_states_are_refused_with_drafting(engine: OfflineEngine) -> None:
    drafting = OfflineRequest((1,), SamplingParams(0, 3), drafting=Drafting(lookup=True))
    with engine, pytest.raises(ValueError, match="drafting is None"):
        engine.run([drafting], states=True)


def test_one_bad_request_is_named_and_the_engine_goes_on(engine: OfflineEngine) -> None:
    with engine:
        with pytest.raises(OfflineError, match="request 1: prompt: token ids"):
            engine.run([asked([1], 3), asked([VOCABULARY], 3)])
        assert run(engine).tokens == sum(LENGTHS)


def test_an_adapter_that_cannot_be_loaded_is_named(engine: OfflineEngine) -> None:
    request = OfflineRequest((1,), SamplingParams(0, 3), (Component("0" * 64),))
    with engine, pytest.raises(OfflineError, match="0" * 64):
        engine.run([request])
