"""Output with drafts equals output without at the same seed, token for token, whatever is mixed:
requests in the background, under salts or constraints, and those that read their own prompt.

Each request is run alone, without drafts, on an engine with room for everything; then all together,
with drafts, on one so small that sequences are preempted, and across a restart of the engine.

What a draft is worth depends on the machine's mood, so here every draft for which there is room is
bought: whether output changes must not hang on that.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from bought_drafts import every_draft_bought
from constraint_tokens import tiny_grammars
from engine_driver import make_engine
from hypothesis import HealthCheck, given, settings
from turbo_models import HEADS, KV_BYTES, VOCABULARY, TurboModels, make_turbo_models

from quickchange_server.engine.engine import Engine
from quickchange_server.protocol import (
    Component,
    Constraint,
    Delta,
    Drafting,
    SamplingParams,
    Submit,
    TokenLogprobs,
)
from quickchange_server.structured_output.grammar import TokenGrammars

MAX_LEN = 72  # tokens
SMALL_CACHE = MAX_LEN * KV_BYTES * 5 // 4  # room for one sequence of any length, and a quarter


@dataclass
class Said:
    """All that the engine said of one request."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    embedding: bytes | None = None
    reason: str | None = None
    error: str | None = None
    drafted: int = 0
    accepted: int = 0

    def add(self, delta: Delta) -> None:
        assert self.reason is None, "a delta after the end"
        assert delta.accepted <= min(delta.drafted, len(delta.token_ids))
        self.tokens += delta.token_ids
        self.logprobs += delta.logprobs
        self.prompt_logprobs = self.prompt_logprobs or delta.prompt_logprobs
        self.embedding = self.embedding or delta.embedding
        self.error = delta.error
        self.reason = delta.finish_reason
        self.drafted += delta.drafted
        self.accepted += delta.accepted


def drive(engine: Engine, said: dict[str, Said], steps: int | None = None) -> None:
    """Step until all have ended, or so many steps; integrity is checked after each."""
    deadline = time.monotonic() + 60
    while any(one.reason is None for one in said.values()) and steps != 0:
        assert time.monotonic() < deadline, "not ended"
        engine.poll_adapters()
        report = engine.step()
        engine.check_integrity()
        if report is None:
            time.sleep(0.001)  # an adapter or a grammar is on its way
            continue
        steps = None if steps is None else steps - 1
        for delta in report.deltas:
            said[delta.request_id].add(delta)


def run(engine: Engine, submits: Sequence[Submit]) -> dict[str, Said]:
    said = {submit.request_id: Said() for submit in submits}
    for submit in submits:
        engine.submit(submit)
    drive(engine, said)
    return said


def alone(engine: Engine, submit: Submit) -> Said:
    """What it says undrafted, with nothing beside it."""
    return run(engine, [replace(submit, drafting=None)])[submit.request_id]


def check_equal(found: Said, expected: Said, submit: Submit) -> None:
    assert found.tokens == expected.tokens, submit
    assert found.reason == expected.reason, submit
    assert found.error == expected.error, submit
    check_close(found.logprobs, expected.logprobs)
    check_close(found.prompt_logprobs, expected.prompt_logprobs)
    assert (found.embedding is None) == (expected.embedding is None)
    if found.embedding is not None and expected.embedding is not None:
        ours, theirs = (np.frombuffer(one, "<f4") for one in (found.embedding, expected.embedding))
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def check_close(found: Sequence[TokenLogprobs], expected: Sequence[TokenLogprobs]) -> None:
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.token_id == theirs.token_id
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)
        assert [token for token, _ in ours.top] == [token for token, _ in theirs.top]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> TurboModels:
    return make_turbo_models(tmp_path_factory.mktemp("turbo") / "base")


@pytest.fixture(scope="module", autouse=True)
def _no_draft_is_too_dear() -> Iterator[None]:
    with every_draft_bought():
        yield


@pytest.fixture(scope="module")
def grammars() -> TokenGrammars:
    return tiny_grammars()


def engine_of(
    models: TurboModels, constraints: TokenGrammars | None = None, **options: object
) -> Engine:
    small = {"max_model_len": MAX_LEN, **options}
    return make_engine(models.path, models.adapters.__getitem__, constraints, **small)


@pytest.fixture(scope="module")
def roomy(models: TurboModels, grammars: TokenGrammars) -> Engine:
    """Where requests run alone."""
    return engine_of(models, grammars)


# --- requests at random -------------------------------------------------------------------------

TOKEN = st.integers(0, VOCABULARY - 1)
PROMPTS = st.one_of(
    st.lists(TOKEN, min_size=1, max_size=24),
    st.builds(
        lambda motif, times: (motif * times)[:30],  # what prompt lookup finds
        st.lists(TOKEN, min_size=1, max_size=5),
        st.integers(2, 12),
    ),
)


def sampling_params(*, max_tokens: int, min_tokens: int, **rest: Any) -> SamplingParams:
    least = min(min_tokens, max_tokens)
    return SamplingParams(max_tokens=max_tokens, min_tokens=least, **rest)


SAMPLING = st.builds(
    sampling_params,
    max_tokens=st.integers(1, 30),
    temperature=st.sampled_from([0.0, 0.0, 0.5, 1.0, 3.0]),
    top_k=st.sampled_from([0, 0, 3]),
    top_p=st.sampled_from([1.0, 0.8]),
    min_p=st.sampled_from([0.0, 0.05]),
    typical_p=st.sampled_from([1.0, 0.8]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.3, 0.8]),
    presence_penalty=st.sampled_from([0.0, 0.0, 0.7]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 0.4, -0.3]),
    logit_bias=st.lists(st.tuples(TOKEN, st.sampled_from([-100.0, 1.5])), max_size=2),
    min_tokens=st.sampled_from([0, 0, 4]),
    stop_token_ids=st.frozensets(TOKEN, max_size=3),
    logprobs=st.sampled_from([None, None, 0, 2]),
    prompt_logprobs=st.sampled_from([None, None, None, 0, 2]),
)
ADAPTERS = st.sampled_from(
    [
        (),
        (),
        (Component("lora-a"),),
        (Component("lora-b"),),
        (Component("five"),),
        (Component("lora-a", 0.6), Component("lora-b", -0.4)),
    ]
)
DRAFTING = st.one_of(
    st.none(),
    st.just(Drafting(lookup=True)),
    st.builds(Drafting, st.sampled_from(sorted(HEADS)), st.booleans()),
)


CONSTRAINTS = st.sampled_from(
    [
        Constraint("regex", "(ab|c){2,12}"),
        Constraint("json_object", ""),
        Constraint("json_schema", '{"type": "array", "items": {"enum": ["a", 12, null]}}'),
    ]
)
KINDS: st.SearchStrategy[dict[str, Any]] = st.one_of(
    st.just({}),
    st.just({}),
    st.fixed_dictionaries({"constraint": CONSTRAINTS}),
    st.fixed_dictionaries({"pooling": st.sampled_from(["last", "mean"])}),
)


@st.composite
def requests(draw: st.DrawFn) -> list[Submit]:
    count = draw(st.integers(1, 6))
    return [
        Submit(
            str(k),
            tuple(draw(PROMPTS)),
            draw(SAMPLING),
            draw(ADAPTERS),
            (),
            draw(DRAFTING),
            salt=draw(st.sampled_from(["", "", "one", "other"])),
            background=draw(st.sampled_from([False, False, True])),
            seed=draw(st.integers(0, 2**63 - 1)),
            **draw(KINDS),
        )
        for k in range(count)
    ]


RANDOM = settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@RANDOM
@given(submits=requests())
def test_random_mixes_say_what_each_request_says_alone(
    models: TurboModels, grammars: TokenGrammars, roomy: Engine, submits: list[Submit]
) -> None:
    engine = engine_of(models, grammars, kv_cache_bytes=SMALL_CACHE, max_sequences=4)
    found = run(engine, submits)
    engine.close()
    for submit in submits:
        check_equal(found[submit.request_id], alone(roomy, submit), submit)


@RANDOM
@given(submits=requests(), steps=st.integers(1, 30))
def test_an_engine_that_starts_anew_goes_on_where_each_request_stood(
    models: TurboModels, grammars: TokenGrammars, roomy: Engine, submits: list[Submit], steps: int
) -> None:
    said = {submit.request_id: Said() for submit in submits}
    engine = engine_of(models, grammars, kv_cache_bytes=SMALL_CACHE, max_sequences=4)
    for submit in submits:
        engine.submit(submit)
    drive(engine, said, steps)
    engine.close()
    engine = engine_of(models, grammars)
    for submit in submits:
        if said[submit.request_id].reason is None:
            engine.submit(replace(submit, output=tuple(said[submit.request_id].tokens)))
    drive(engine, said)
    engine.close()
    for submit in submits:
        check_equal(said[submit.request_id], alone(roomy, submit), submit)


# --- that all this is about drafts that hold, and fail ------------------------------------------


def beginning(seed: int, length: int = 4) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(VOCABULARY, (length,), generator=generator).tolist())


def greedy(name: str, prompt: Sequence[int], drafting: Drafting | None, *loras: str) -> Submit:
    sampling = SamplingParams(max_tokens=40, temperature=0.0)
    components = tuple(map(Component, loras))
    return Submit(name, tuple(prompt), sampling, components, (), drafting, seed=0)


def test_speculators_of_two_three_and_five_heads_beside_loras_and_plain_rows(
    models: TurboModels, roomy: Engine
) -> None:
    submits = [
        greedy("two", beginning(1), Drafting("two")),
        greedy("three", beginning(2), Drafting("three")),
        greedy("five", beginning(3), Drafting("five"), "five"),
        greedy("two-on-a-lora", beginning(4), Drafting("two"), "lora-a"),
        greedy("lora-a", beginning(5), None, "lora-a"),
        greedy("lora-b", beginning(6), None, "lora-b"),
        greedy("plain", beginning(7), None),
        greedy("lookup", beginning(8), Drafting(lookup=True)),
    ]
    engine = engine_of(models)
    found = run(engine, submits)
    engine.close()
    for submit in submits:
        check_equal(found[submit.request_id], alone(roomy, submit), submit)
    for name in ("two", "five", "two-on-a-lora", "lookup"):
        assert found[name].accepted > 0, f"{name}: no draft held"
    assert found["three"].drafted > found["three"].accepted, "no draft failed"
    for name in ("lora-a", "lora-b", "plain"):
        assert found[name].drafted == 0


def test_what_is_preempted_says_the_same(models: TurboModels, roomy: Engine) -> None:
    drafters = [Drafting("two", lookup=True), Drafting("five"), None, Drafting(lookup=True)]
    submits = [
        greedy(str(k), beginning(10 + k, 6), drafters[k % 4], *(["lora-a"] * (k % 2)))
        for k in range(8)
    ]
    engine = engine_of(models, kv_cache_bytes=SMALL_CACHE)
    found = run(engine, submits)
    preemptions = engine.scheduler.preemptions
    engine.close()
    assert preemptions > 0
    assert sum(one.accepted for one in found.values()) > 0
    for submit in submits:
        check_equal(found[submit.request_id], alone(roomy, submit), submit)


def test_a_stop_token_inside_accepted_drafts_ends_the_output(
    models: TurboModels, roomy: Engine
) -> None:
    whole = alone(roomy, greedy("whole", beginning(1), None)).tokens
    stop = next(token for k, token in enumerate(whole) if k > 9 and token not in whole[:k])
    submit = greedy("stopped", beginning(1), Drafting("two", lookup=True))
    submit = replace(submit, sampling=replace(submit.sampling, stop_token_ids=frozenset({stop})))
    engine = engine_of(models)
    found = run(engine, [submit])["stopped"]
    engine.close()
    assert found.tokens == whole[: whole.index(stop) + 1]
    assert found.reason == "stop"


@pytest.mark.parametrize(
    "edits",
    [
        {"frequency_penalty": 1.0},
        {"presence_penalty": 2.0},
        {"repetition_penalty": 1.2},
        {"min_tokens": 12, "stop_token_ids": frozenset(range(0, VOCABULARY, 3))},
        {"logit_bias": ((11, 2.0), (2, -3.0))},
        {"temperature": 1.5, "frequency_penalty": 0.5},
    ],
    ids=lambda edits: next(iter(edits)),
)
def test_what_is_edited_counts_the_drafts_before_it(
    models: TurboModels, roomy: Engine, edits: dict[str, object]
) -> None:
    """Periods, where drafts hold until what has been said too often is said no more."""
    submits = []
    for k in range(12):
        submit = greedy(str(k), beginning(20 + k, 2) * 6, Drafting("two", lookup=True))
        sampling = replace(submit.sampling, **edits)  # type: ignore[arg-type]
        submits.append(replace(submit, sampling=sampling, seed=k))
    engine = engine_of(models)
    found = run(engine, submits)
    engine.close()
    assert sum(one.accepted for one in found.values()) > 0
    for submit in submits:
        check_equal(found[submit.request_id], alone(roomy, submit), submit)


# --- the distribution ---------------------------------------------------------------------------

DRAWN = 1500  # requests, each with a seed of its own
PROMPT = (3, 11, 5, 3, 11, 5, 3, 11)  # lookup drafts 5, 3, 11, …
WARM = 2.5  # temperature at which several tokens are likely


@torch.inference_mode()
def expected_pairs(path: Path) -> torch.Tensor:
    """[V, V] float64: the chance of the first two tokens after PROMPT, by transformers alone."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path).double().eval()
    ids = torch.tensor([[*PROMPT, token] for token in range(VOCABULARY)])
    chances = (model(input_ids=ids).logits[:, -2:] / WARM).softmax(-1)
    return chances[0, 0][:, None] * chances[:, 1]


def test_sampled_pairs_with_drafts_follow_the_models_own_distribution(models: TurboModels) -> None:
    submits = [
        Submit(
            str(seed),
            PROMPT,
            SamplingParams(max_tokens=4, temperature=WARM),
            drafting=Drafting("two", lookup=True) if seed % 2 else Drafting(lookup=True),
            seed=seed,
        )
        for seed in range(DRAWN)
    ]
    engine = engine_of(models)
    found = run(engine, submits)
    engine.close()
    accepted = sum(one.accepted for one in found.values())
    assert 0 < accepted < sum(one.drafted for one in found.values()), "nothing held, or all did"
    counts = torch.zeros(VOCABULARY, VOCABULARY, dtype=torch.float64)
    for one in found.values():
        counts[one.tokens[0], one.tokens[1]] += 1
    assert chi_square_p(counts.flatten(), DRAWN * expected_pairs(models.path).flatten()) > 1e-3


def chi_square_p(observed: torch.Tensor, expected: torch.Tensor) -> float:
    """Pearson's p-value; cells that expect fewer than 5 are counted as one."""
    rare = expected < 5
    cells = [
        torch.cat([counts[~rare], counts[rare].sum()[None]]) for counts in (observed, expected)
    ]
    statistic = ((cells[0] - cells[1]) ** 2 / cells[1]).sum()
    freedom = torch.tensor(len(cells[0]) - 1, dtype=torch.float64)
    assert freedom >= 8, "too few likely outcomes to judge"
    return float(torch.special.gammaincc(freedom / 2, statistic / 2))
