"""Positions that are scaled by the text's length: token for token what transformers generates, for
texts on both sides of the limit and across it in one batch, in chunks, after preemption, behind
cached prefixes, with drafts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from bought_drafts import every_draft_bought
from engine_driver import Driver, make_engine, request
from scaled_models import LIMIT, SCALED, UNSCALED, generated, save_scaled

from quickchange_server.protocol import Delta, Drafting

PROMPTS = {
    "short": [5, 6, 7],
    "crossing": [(7 * n + 3) % 97 for n in range(LIMIT - 4)],
    "at the limit": [(11 * n + 5) % 97 for n in range(LIMIT)],
    "long": [(13 * n + 1) % 97 for n in range(LIMIT + 13)],
}
NEW = 12
CONTEXT = 64


@pytest.fixture(scope="module", params=sorted(SCALED))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_scaled(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def expected(model: Path) -> dict[str, list[int]]:
    return {name: generated(model, prompt, NEW) for name, prompt in PROMPTS.items()}


def test_texts_of_one_batch_equal_transformers(model: Path, expected: dict[str, list[int]]) -> None:
    driver = Driver(make_engine(model, max_model_len=CONTEXT))
    for name, prompt in PROMPTS.items():
        driver.engine.submit(request(name, prompt, max_tokens=NEW))
    driver.finish(*PROMPTS)
    assert driver.tokens == expected


def test_preempted_texts_equal_transformers(model: Path, expected: dict[str, list[int]]) -> None:
    few_blocks = 44_000  # bytes: three of the prompts are admitted, and have no room to grow
    engine = make_engine(model, max_model_len=CONTEXT, kv_cache_bytes=few_blocks)
    driver = Driver(engine)
    for name, prompt in PROMPTS.items():
        driver.engine.submit(request(name, prompt, max_tokens=NEW))
    driver.finish(*PROMPTS)
    begun_anew = ("phi" in model.name) * 2
    assert engine.scheduler.preemptions > begun_anew
    assert driver.tokens == expected


def test_a_text_that_goes_on_after_a_restart_equals_transformers(
    model: Path, expected: dict[str, list[int]]
) -> None:
    driver = Driver(make_engine(model, max_model_len=CONTEXT))
    for name, prompt in PROMPTS.items():
        told = expected[name][:7]
        driver.engine.submit(request(name, prompt, output=told, max_tokens=NEW))
    driver.finish(*PROMPTS)
    assert driver.tokens == {name: tokens[7:] for name, tokens in expected.items()}


@pytest.mark.parametrize("lengths", [(8, 48), (48, 8), (40, 48), (48, 40)])
def test_prefixes_are_shared_only_where_they_are_scaled_alike(
    model: Path, lengths: tuple[int, int]
) -> None:
    driver = Driver(make_engine(model, max_model_len=CONTEXT))
    text = PROMPTS["long"] + PROMPTS["crossing"]
    for length in lengths:
        driver.engine.submit(request(str(length), text[:length], max_tokens=4))
        driver.finish(str(length))
        assert driver.tokens[str(length)] == generated(model, text[:length], 4), length


def test_equal_prompts_share_their_prefix_on_both_sides_of_the_limit(model: Path) -> None:
    driver = Driver(make_engine(model, max_model_len=CONTEXT))
    for name in ("crossing", "long"):
        for turn in ("first", "second"):
            driver.engine.submit(request(f"{name} {turn}", PROMPTS[name], max_tokens=2))
            driver.finish(f"{name} {turn}")
        cached = driver.first[f"{name} second"].cached_tokens
        assert cached == (len(PROMPTS[name]) - 1) // 4 * 4
        assert driver.tokens[f"{name} first"] == driver.tokens[f"{name} second"]


def test_drafts_change_nothing_at_the_limit(model: Path) -> None:
    """One token is far likelier than all others, so that drafts of it hold; its log-probability
    tells how its position was scaled."""
    likely = {"logit_bias": {5: 60.0}, "logprobs": 0, "max_tokens": 30}
    prompt = [*PROMPTS["crossing"][: LIMIT - 12], 5, 5, 5]

    def scores(driver: Driver, drafting: Drafting | None) -> list[float]:
        found: list[float] = []
        driver.engine.submit(replace(request("one", prompt, **likely), drafting=drafting))
        while "one" not in driver.last:
            driver.engine.poll_adapters()
            report = driver.engine.step()
            for delta in () if report is None else report.deltas:
                keep(driver, delta)
                found += [row.logprob for row in delta.logprobs]
        return found

    plain = scores(Driver(make_engine(model, max_model_len=CONTEXT)), None)
    with every_draft_bought():
        driver = Driver(make_engine(model, max_model_len=CONTEXT))
        drafted = scores(driver, Drafting(lookup=True))
    assert driver.accepted["one"] > 5
    assert drafted == pytest.approx(plain, rel=1e-3, abs=1e-6)


def keep(driver: Driver, delta: Delta) -> None:
    driver.accepted[delta.request_id] += delta.accepted
    if delta.finish_reason:
        driver.last[delta.request_id] = delta


@pytest.mark.parametrize("kind", sorted(UNSCALED))
def test_positions_scaled_for_all_texts_alike_equal_transformers(kind: str, tmp_path: Path) -> None:
    folder = save_scaled(kind, tmp_path)
    driver = Driver(make_engine(folder, max_model_len=CONTEXT))
    for name, prompt in PROMPTS.items():
        driver.engine.submit(request(name, prompt, max_tokens=NEW))
    driver.finish(*PROMPTS)
    for name, prompt in PROMPTS.items():
        assert driver.tokens[name] == generated(folder, prompt, NEW), name
