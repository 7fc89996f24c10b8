"""The soak's requests and verdicts; and, by name, a short soak of a tiny model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from llm_models import make_llm_models

from quickchange_bench.service.soak import SoakOptions, measure_soak
from quickchange_bench.service.soak_requests import KINDS, SoakAnswer, make_pool

WHOLE = SoakAnswer(200, ("abcdef", "gh"), ("length", "stop"), tokens=8)


def test_a_pool_is_the_same_for_the_same_seed_and_holds_every_kind() -> None:
    names = [f"a{k}" for k in range(10)]
    pool = make_pool("base", names, 40, seed=3)
    assert pool == make_pool("base", names, 40, seed=3) != make_pool("base", names, 40, seed=4)
    assert len(pool) == 40
    assert {*names, "base", "soak-trial", "soak-alias"} >= {ask.body["model"] for ask in pool}
    kinds = {frozenset(ask.body) - {"temperature", "seed", "top_k"} for ask in pool}
    assert len(kinds) >= len(KINDS) - 3  # adapter, base and alias differ in the name alone


@pytest.mark.parametrize(
    ("answer", "wrong"),
    [
        (WHOLE, None),
        (replace(WHOLE, texts=("abcde", "gh")), "other text"),
        (replace(WHOLE, texts=("abcdeff", "gh")), "other text"),
        (replace(WHOLE, tokens=7), "other ends"),
        (replace(WHOLE, reasons=("length", "length")), "other ends"),
        (replace(WHOLE, texts=("abc", ""), tokens=None), None),
        (replace(WHOLE, texts=("acc",), tokens=None), "other text"),
        (replace(WHOLE, error="the stream ended"), "status 200: the stream ended"),
        (SoakAnswer(503, error="starting"), "status 503: starting"),
    ],
)
def test_an_answer_is_held_against_the_undisturbed_one(
    answer: SoakAnswer, wrong: str | None
) -> None:
    fault = answer.fault(WHOLE)
    assert fault is None if wrong is None else (fault or "").startswith(wrong)


@pytest.mark.slow
def test_a_short_soak_loses_nothing(tmp_path: Path) -> None:
    models = make_llm_models(tmp_path / "models")
    options = SoakOptions(
        model=models.path,
        adapters=12,
        pool=36,
        workers=4,
        minutes=2,
        resident=4,
        host_resident=6,
        stall_seconds=5,
        slope=1e6,  # two minutes say nothing about memory
    )
    result = measure_soak(options, tmp_path / "work", print)
    assert result.holds, [check for check in result.checks if not check.holds]
    assert result.counts["answered"] > 0
