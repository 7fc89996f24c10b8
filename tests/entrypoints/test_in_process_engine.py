"""The engine in one process: answers in order, whatever shares the batch, with their timings."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import VOCABULARY, greedy, make_model, save_model

from quickchange_server.config import Settings
from quickchange_server.entrypoints.in_process_engine import (
    EngineCompletion,
    EngineRun,
    InProcessEngine,
)
from quickchange_server.errors import AdapterFailedError, RequestFailedError
from quickchange_server.protocol import Component, Delta, Drafting, SamplingParams, Submit

PROMPTS = [[5, 9, 2], [7], [1, 2, 3, 4, 5, 6, 7, 8], [40, 41], [96, 0, 13]]
LENGTHS = [9, 3, 5, 1, 7]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engine")
    save_model("llama-tied", folder)
    return folder


@pytest.fixture
def engine(model: Path, tmp_path: Path) -> InProcessEngine:
    settings = Settings(model=str(model), store=tmp_path, kv_cache_bytes=1 << 20, max_sequences=3)
    return InProcessEngine(settings)


def asked(key: object, prompt: list[int], length: int) -> Submit:
    return Submit(
        str(key), tuple(prompt), SamplingParams(max_tokens=length, temperature=0.0), seed=0
    )


def all_asked() -> list[Submit]:
    pairs = zip(PROMPTS, LENGTHS, strict=True)
    return [asked(i, prompt, length) for i, (prompt, length) in enumerate(pairs)]


def run(engine: InProcessEngine, concurrency: int | None = None) -> EngineRun:
    return engine.run(all_asked(), concurrency=concurrency)


@pytest.mark.parametrize("concurrency", [None, 1, 2])
def test_completions_are_transformers_own_in_the_requests_order(
    engine: InProcessEngine, concurrency: int | None
) -> None:
    expected = [
        tuple(greedy(make_model("llama-tied"), prompt, length))
        for prompt, length in zip(PROMPTS, LENGTHS, strict=True)
    ]
    with engine:
        found = run(engine, concurrency)
    assert [completion.token_ids for completion in found.completions] == expected
    assert {completion.finish_reason for completion in found.completions} == {"length"}


def test_concurrency_bounds_what_shares_a_step(engine: InProcessEngine) -> None:
    with engine:
        alone, together = run(engine, 1), run(engine, None)
    assert alone.steps == sum(LENGTHS)
    assert together.steps < alone.steps


def test_each_request_is_told_of_once_with_times_in_order(engine: InProcessEngine) -> None:
    told: dict[int, EngineCompletion] = {}

    def hear(index: int, completion: EngineCompletion) -> None:
        assert index not in told
        told[index] = completion

    with engine:
        found = engine.run([asked(i, p, 4) for i, p in enumerate(PROMPTS)], on_finished=hear)
    assert [told[i] for i in range(len(PROMPTS))] == list(found.completions)
    assert found.tokens == 4 * len(PROMPTS)
    for completion in found.completions:
        assert 0 < completion.first_token_seconds < completion.seconds <= found.seconds


def test_states_are_what_enters_the_lm_head_of_transformers_model(engine: InProcessEngine) -> None:
    with engine:
        found = engine.run(all_asked(), states=True)
    reference = make_model("llama-tied")
    for prompt, completion in zip(PROMPTS, found.completions, strict=True):
        tokens = torch.tensor([[*prompt, *completion.token_ids]])
        with torch.inference_mode():
            hidden = reference.model(input_ids=tokens).last_hidden_state[0]
        torch.testing.assert_close(
            completion.states, hidden[len(prompt) - 1 : -1], rtol=1e-4, atol=1e-4
        )


def test_states_are_refused_with_drafting(engine: InProcessEngine) -> None:
    drafting = Submit(
        "0", (1,), SamplingParams(max_tokens=3), drafting=Drafting(lookup=True), seed=0
    )
    with engine, pytest.raises(ValueError, match="drafting is None"):
        engine.run([drafting], states=True)


def test_two_requests_of_one_id_are_refused(engine: InProcessEngine) -> None:
    with engine, pytest.raises(ValueError, match="request_id: two requests have one"):
        engine.run([asked(0, [1], 3), asked(0, [2], 3)])


def test_one_bad_request_is_named_and_the_engine_goes_on(engine: InProcessEngine) -> None:
    with engine:
        with pytest.raises(RequestFailedError, match="request 1: prompt: token ids"):
            engine.run([asked(0, [1], 3), asked(1, [VOCABULARY], 3)])
        assert run(engine).tokens == sum(LENGTHS)


def test_an_adapter_that_cannot_be_loaded_is_named(engine: InProcessEngine) -> None:
    request = Submit("0", (1,), SamplingParams(max_tokens=3), (Component("0" * 64),), seed=0)
    with engine, pytest.raises(AdapterFailedError, match="0" * 64):
        engine.run([request])


def test_a_request_ends_where_its_reader_says_so_and_the_others_go_on(
    engine: InProcessEngine,
) -> None:
    seen: dict[str, int] = {}

    def second_of_the_first(delta: Delta) -> bool:
        seen[delta.request_id] = seen.get(delta.request_id, 0) + len(delta.token_ids)
        return delta.request_id == "0" and seen["0"] == 2

    with engine:
        found = engine.run(all_asked(), ends=second_of_the_first)
        whole = run(engine)
    assert found.completions[0].token_ids == whole.completions[0].token_ids[:2]
    assert found.completions[0].finish_reason == "stop"
    assert [c.token_ids for c in found.completions[1:]] == [
        c.token_ids for c in whole.completions[1:]
    ]


def test_a_closed_engine_says_so(engine: InProcessEngine) -> None:
    engine.close()
    engine.close()
    with pytest.raises(RuntimeError, match="closed"):
        run(engine)
