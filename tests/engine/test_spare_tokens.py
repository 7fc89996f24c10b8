"""Spare tokens change nothing for requests whose adapters add none: tokens and chances."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_driver import Driver, make_engine, request
from hypothesis import given
from hypothesis import strategies as st
from served_model import random_adapter
from tiny_models import VOCABULARY, save_model

from quickchange_kernels.lowrank.lowrank_contract import Segments
from quickchange_server.model.loading.spare_tokens import fence_
from quickchange_server.protocol import Submit, TokenLogprobs
from quickchange_store.base_model.base_spec import base_spec
from quickchange_store.canonical.canonical_adapter import CanonicalAdapter, LowRankUpdate
from quickchange_store.canonical.tokenizer_part import TokenizerChanges

SPARE = 7
FAMILIES = ("llama", "llama-tied", "gemma2", "gpt2")  # softcapped logits; Conv1D


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(request.param, tmp_path_factory.mktemp("model"))


def adding(model: Path, count: int) -> CanonicalAdapter:
    """An adapter that adds `count` tokens, which are nearly always the best."""
    spec = base_spec(str(model))
    assert spec.output_head is not None
    hidden, rows = spec.modules[spec.output_head].in_features, VOCABULARY + count
    picked = torch.zeros(count, rows)
    picked[:, VOCABULARY:] = torch.eye(count)
    generator = torch.Generator().manual_seed(count)
    own = torch.randn(count, hidden, generator=generator) * 3
    embedding = next(p for p, shape in spec.modules.items() if shape.kind == "embedding")
    updates = {
        embedding: LowRankUpdate(picked, own.T.contiguous(), 1.0),
        spec.output_head: LowRankUpdate(own, picked.T.contiguous(), 1.0),
    }
    changes = TokenizerChanges(rows)
    return CanonicalAdapter(spec.architecture, "", updates, tokenizer=changes)


def submits() -> list[Submit]:
    """Plain requests and some under a LoRA, of all ways to choose tokens."""
    generator = random.Random(2)
    ways: list[dict[str, object]] = [
        {"logprobs": 5},
        {"temperature": 1.5, "top_k": VOCABULARY, "logprobs": 3},
        {"temperature": 2.0, "top_p": 0.9, "logit_bias": {3: 4.0}, "min_p": 0.01},
        {"prompt_logprobs": 4, "temperature": 1.0},
    ]
    return [
        request(
            f"{number} {adapter}",
            [generator.randrange(VOCABULARY) for _ in range(9 + number)],
            [(adapter, 1.0)] if adapter else [],
            seed=number,
            max_tokens=8,
            **way,
        )
        for number, way in enumerate(ways)
        for adapter in ("", "lora")
    ]


def scores(told: list[TokenLogprobs]) -> list[float]:
    return [score for one in told for score in (one.logprob, *(p for _, p in one.top))]


def test_requests_without_added_tokens_are_as_on_a_server_without_them(model: Path) -> None:
    adapters = {
        "lora": random_adapter(model, 4, seed=1),
        "few": adding(model, 2),
        "all": adding(model, SPARE),
    }
    said: list[Driver] = []
    for spare in (0, SPARE):
        engine = make_engine(
            model,
            adapters.__getitem__,
            extra_vocabulary=spare,
            max_sequences=12,
            max_batch_tokens=32,
        )
        drive = Driver(engine)
        asked = submits()
        if spare:
            prompt = [VOCABULARY, 5, VOCABULARY + 1]
            wished = {VOCABULARY + SPARE - 1: 100.0}
            asked += [
                request(name, prompt, [(name, 1.0)], max_tokens=20, logit_bias=wished)
                for name in ("few", "all")
            ]
        for submit in asked:
            engine.submit(submit)
        drive.finish(*(submit.request_id for submit in asked))
        engine.close()
        said.append(drive)
    plain, beside = said
    for submit in submits():
        key = submit.request_id
        assert beside.tokens[key] == plain.tokens[key], key
        for with_, without in (
            (beside.logprobs[key], plain.logprobs[key]),
            (list(beside.first[key].prompt_logprobs), list(plain.first[key].prompt_logprobs)),
        ):
            np.testing.assert_allclose(scores(with_), scores(without), atol=1e-4)
            assert all(token < VOCABULARY for one in with_ for token, _ in one.top)
    assert set(beside.tokens["all"]) == {VOCABULARY + SPARE - 1}
    assert max(beside.tokens["few"]) in (VOCABULARY, VOCABULARY + 1)


@given(
    rows=st.integers(1, 6),
    spans=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6), st.integers(0, 3)), max_size=5),
    tokens=st.lists(st.integers(0, 9), min_size=4, max_size=4),
    own=st.integers(0, 9),
)
def test_a_row_keeps_the_tokens_that_any_of_its_adapters_has(
    rows: int, spans: list[tuple[int, int, int]], tokens: list[int], own: int
) -> None:
    logits = torch.zeros(rows, 9)
    segments = Segments(
        torch.tensor([span[:2] for span in spans], dtype=torch.int32).reshape(-1, 2),
        torch.tensor([span[2] for span in spans], dtype=torch.int32),
        torch.ones(len(spans)),
    )
    fence_(logits, own, segments, torch.tensor(tokens, dtype=torch.int32))
    for row in range(rows):
        covering = [tokens[slot] for begin, end, slot in spans if begin <= row < end]
        reach = max([own, *covering])
        expected = [0.0 if column < reach else -np.inf for column in range(9)]
        assert logits[row].tolist() == expected
