"""The sampler against transformers' processors, naive loops and the distribution itself."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from quickchange_kernels.sampling.sample_contract import Draws, sample
from quickchange_kernels.sampling.sample_plain import kept_masses
from quickchange_server.engine.sampler import RowError, SampledToken, Sampler, SampleRow
from quickchange_server.protocol import SamplingParams

V = 97
CPU = torch.device("cpu")
PROPERTY = settings(deadline=None, max_examples=40)


def params(**changes: object) -> SamplingParams:
    base = SamplingParams(max_tokens=1000)
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def row(
    sampling: SamplingParams,
    position: int = 0,
    prompt: Sequence[int] = (1, 2, 3),
    output: Sequence[int] = (),
    seed: int = 11,
) -> SampleRow:
    return SampleRow(sampling, seed, position, prompt, output)


def random_logits(seed: int, rows: int = 1, size: int = V, spread: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, size, generator=generator) * spread


def sample_one(logits: torch.Tensor, one: SampleRow) -> SampledToken:
    result = Sampler(logits.shape[1], CPU).draw(logits.clone(), [one]).results()[0]
    assert isinstance(result, SampledToken)
    return result


def edited(logits: torch.Tensor, one: SampleRow) -> torch.Tensor:
    """The logits after bias, suppression and penalties: what the sampler leaves in place."""
    work = logits.clone()
    greedy = dataclasses.replace(one, params=dataclasses.replace(one.params, temperature=0.0))
    Sampler(logits.shape[1], CPU).draw(work, [greedy]).results()
    return work


def draws(sampling: Sequence[SamplingParams], uniforms: Sequence[float]) -> Draws:
    def column(name: str) -> torch.Tensor:
        return torch.tensor([getattr(p, name) for p in sampling], dtype=torch.float64)

    return Draws(
        temperature=column("temperature"),
        uniform=torch.tensor(uniforms, dtype=torch.float64),
        top_k=column("top_k"),
        top_p=column("top_p"),
        min_p=column("min_p"),
        typical_p=column("typical_p"),
    )


def reachable(logits: torch.Tensor, sampling: SamplingParams) -> set[int]:
    """Every token that some uniform number draws (the kept sets here are small)."""
    grid = np.linspace(0.0, 1.0, 2000, endpoint=False).tolist()
    many = draws([sampling] * len(grid), grid)
    return set(sample(logits.repeat(len(grid), 1), many).tokens.tolist())


TOKENS = st.lists(st.integers(0, V - 1), max_size=30)


@PROPERTY
@given(st.integers(0, 1000), st.floats(0.2, 3.0), TOKENS, TOKENS)
def test_repetition_penalty_equals_transformers(
    seed: int, penalty: float, prompt: list[int], output: list[int]
) -> None:
    logits = random_logits(seed)
    one = row(params(repetition_penalty=penalty), prompt=prompt, output=output)
    ids = torch.tensor([prompt + output], dtype=torch.int64)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.clone())
    torch.testing.assert_close(edited(logits, one), expected)


@PROPERTY
@given(st.integers(0, 1000), st.floats(-2, 2), st.floats(-2, 2), TOKENS)
def test_frequency_and_presence_penalties_equal_a_naive_loop(
    seed: int, frequency: float, presence: float, output: list[int]
) -> None:
    logits = random_logits(seed)
    sampling = params(frequency_penalty=frequency, presence_penalty=presence)
    expected = logits.clone().double()
    for token in range(V):
        count = output.count(token)
        expected[0, token] -= count * frequency + (presence if count else 0.0)
    result = edited(logits, row(sampling, output=output))
    torch.testing.assert_close(result, expected.float(), rtol=1e-5, atol=1e-5)


def test_prompt_tokens_carry_no_frequency_or_presence_penalty() -> None:
    logits = random_logits(0)
    sampling = params(frequency_penalty=1.0, presence_penalty=1.0)
    assert torch.equal(edited(logits, row(sampling, prompt=range(50))), logits)


def test_logit_bias_is_added_and_repeated_ids_add_up() -> None:
    logits = random_logits(1)
    expected = logits.clone()
    expected[0, 5] += 3.0
    expected[0, 9] -= 100.0
    sampling = params(logit_bias=((5, 1.0), (9, -100.0), (5, 2.0)))
    torch.testing.assert_close(edited(logits, row(sampling)), expected)


def test_logit_bias_outside_the_vocabulary_fails_that_row_by_name() -> None:
    rows = [row(params(logit_bias=((V, 1.0),))), row(params())]
    first, second = Sampler(V, CPU).draw(random_logits(2, rows=2), rows).results()
    assert isinstance(first, RowError)
    assert str(V) in first.error
    assert "logit_bias" in first.error
    assert isinstance(second, SampledToken)


def test_stop_tokens_are_suppressed_until_min_tokens() -> None:
    logits = random_logits(3)
    stop = int(logits.argmax())
    sampling = params(temperature=0.0, min_tokens=2, stop_token_ids=frozenset({stop, V + 50}))
    chosen = [sample_one(logits, row(sampling, output=[1] * n)).token_id for n in range(4)]
    assert stop not in chosen[:2]
    assert chosen[2:] == [stop, stop]


def test_edits_apply_in_the_documented_order() -> None:
    logits = random_logits(4)
    output = [5, 5, 6]
    one = row(
        params(
            logit_bias=((5, 2.0),),
            min_tokens=9,
            stop_token_ids=frozenset({6}),
            repetition_penalty=1.3,
            frequency_penalty=0.5,
            presence_penalty=0.25,
        ),
        output=output,
    )
    expected = logits.clone()
    expected[0, 5] += 2.0
    expected[0, 6] = -math.inf
    ids = torch.tensor([[1, 2, 3, *output]])
    expected = RepetitionPenaltyLogitsProcessor(1.3)(ids, expected)
    for token, count in Counter(output).items():
        expected[0, token] -= 0.5 * count + 0.25
    torch.testing.assert_close(edited(logits, one), expected)


@PROPERTY
@given(st.integers(0, 1000), st.floats(0.3, 2.0), st.integers(1, V + 5))
def test_top_k_keeps_what_transformers_keeps(seed: int, temperature: float, k: int) -> None:
    logits = random_logits(seed, spread=1.0)
    warped = TopKLogitsWarper(k)(None, TemperatureLogitsWarper(temperature)(None, logits))
    expected = set(warped.isfinite()[0].nonzero().flatten().tolist())
    drawn = reachable(logits, params(temperature=temperature, top_k=k))
    assert drawn <= expected
    frequent = set((torch.softmax(warped, -1)[0] > 1e-3).nonzero().flatten().tolist())
    assert drawn >= frequent


@PROPERTY
@given(st.integers(0, 1000), st.floats(0.01, 0.99), st.sampled_from([0.3, 1.0, 6.0]))
def test_top_p_keeps_what_transformers_keeps(seed: int, p: float, spread: float) -> None:
    logits = random_logits(seed, spread=spread)
    expected = TopPLogitsWarper(p)(None, logits.double()).isfinite()
    peak = logits.amax(dim=-1, keepdim=True)
    one, limit = torch.tensor([[1.0], [p]], dtype=torch.float64)
    assert torch.equal(kept_masses(logits, peak, one, None, limit, None, None) > 0, expected)


@PROPERTY
@given(st.integers(0, 1000), st.floats(0.01, 1.0))
def test_min_p_keeps_what_transformers_keeps(seed: int, min_p: float) -> None:
    logits = random_logits(seed)
    warped = MinPLogitsWarper(min_p)(None, logits)
    expected = set(warped.isfinite()[0].nonzero().flatten().tolist())
    drawn = reachable(logits, params(min_p=min_p))
    assert drawn <= expected
    frequent = set((torch.softmax(warped, -1)[0] > 1e-3).nonzero().flatten().tolist())
    assert drawn >= frequent


@PROPERTY
@given(st.integers(0, 1000), st.floats(0.01, 0.99), st.floats(0.3, 2.0))
def test_typical_p_keeps_what_transformers_keeps(seed: int, p: float, temperature: float) -> None:
    logits = random_logits(seed).double()
    warped = TypicalLogitsWarper(p)(None, TemperatureLogitsWarper(temperature)(None, logits))
    peak = logits.amax(dim=-1, keepdim=True).float()
    how = (torch.tensor([temperature], dtype=torch.float64), None, None, None)
    kept = kept_masses(logits.float(), peak, *how, torch.tensor([p], dtype=torch.float64))
    assert torch.equal(kept > 0, warped.isfinite())


def test_filters_combine_in_transformers_order() -> None:
    logits = random_logits(8, spread=1.0)
    warped = TemperatureLogitsWarper(0.8)(None, logits)
    warpers = (
        TopKLogitsWarper(20),
        TopPLogitsWarper(0.8),
        MinPLogitsWarper(0.2),
        TypicalLogitsWarper(0.6),
    )
    counts = []
    for warper in warpers:
        warped = warper(None, warped)
        counts.append(int(warped.isfinite().sum()))
    assert counts == sorted(set(counts), reverse=True), "a filter that drops nothing tests nothing"
    expected = set(warped.isfinite()[0].nonzero().flatten().tolist())
    sampling = params(temperature=0.8, top_k=20, top_p=0.8, min_p=0.2, typical_p=0.6)
    assert reachable(logits, sampling) == expected


def test_tokens_that_tie_at_the_edge_of_a_filter_all_stay() -> None:
    logits = torch.full((1, V), -50.0)
    logits[0, [4, 40, 77]] = 1.0
    assert reachable(logits, params(top_k=1)) == {4, 40, 77}
    assert reachable(logits, params(top_p=0.1)) == {4, 40, 77}


@pytest.mark.parametrize("u", [0.0, 0.5, 1.0 - 2.0**-53])
@pytest.mark.parametrize("temperature", [1e-45, 1e-6, 1.0, 100.0])
def test_extreme_temperatures_and_uniforms_draw_a_possible_token(
    u: float, temperature: float
) -> None:
    logits = random_logits(9)
    logits[0, 0] = logits[0, -1] = -math.inf
    sampling = params(temperature=temperature)
    token = sample(logits, draws([sampling], [u])).tokens.item()
    assert 0 < token < V - 1
    if temperature < 1e-5:
        assert token == int(logits.argmax())


@pytest.mark.parametrize(
    "changes", [{}, {"top_k": 12}, {"top_p": 0.8}, {"min_p": 0.1}, {"typical_p": 0.5}]
)
def test_samples_follow_the_filtered_softmax(changes: dict[str, float]) -> None:
    logits = random_logits(10, size=24, spread=1.0)
    warped = logits / 0.9
    if "top_k" in changes:
        warped = TopKLogitsWarper(12)(None, warped)
    if "top_p" in changes:
        warped = TopPLogitsWarper(0.8)(None, warped)
    if "min_p" in changes:
        warped = MinPLogitsWarper(0.1)(None, warped)
    if "typical_p" in changes:
        warped = TypicalLogitsWarper(0.5)(None, warped)
    probabilities = torch.softmax(warped.double(), -1)[0].numpy()
    count = 4000
    sampling = params(temperature=0.9, **changes)
    rows = [row(sampling, position=i) for i in range(count)]
    results = Sampler(24, CPU).draw(logits.repeat(count, 1), rows).results()
    observed = np.bincount(
        [r.token_id for r in results if isinstance(r, SampledToken)], minlength=24
    )
    possible = probabilities > 0
    assert observed[~possible].sum() == 0
    expected = probabilities[possible] * count
    chi_square = float(((observed[possible] - expected) ** 2 / expected).sum())
    assert chi_square < 58.0  # the 0.9999 quantile at 23 degrees of freedom


def mixed_rows() -> list[SampleRow]:
    kinds = [
        params(temperature=0.0),
        params(),
        params(temperature=0.7, top_p=0.9, logprobs=3),
        params(temperature=1.3, top_k=20, logprobs=0),
        params(min_p=0.05, repetition_penalty=1.2),
        params(typical_p=0.7),
        params(temperature=0.0, frequency_penalty=0.3, logprobs=20),
        params(top_k=900, top_p=0.95, min_p=0.001, presence_penalty=0.5),
        params(logit_bias=((3, 5.0),), min_tokens=4, stop_token_ids=frozenset({7})),
    ]
    return [
        row(p, position=100 + i, prompt=range(40), output=[5, 6, 5], seed=i)
        for i, p in enumerate(kinds * 2)
    ]


def test_a_row_alone_gives_bit_for_bit_what_it_gives_in_a_batch() -> None:
    rows = mixed_rows()
    logits = random_logits(12, rows=len(rows), size=40_001)
    sampler = Sampler(40_001, CPU)
    together = sampler.draw(logits.clone(), rows).results()
    alone = [
        sampler.draw(logits[i : i + 1].clone(), [one]).results()[0] for i, one in enumerate(rows)
    ]
    assert together == alone
    order = list(reversed(range(len(rows))))
    shuffled = sampler.draw(logits[order].clone(), [rows[i] for i in order]).results()
    assert shuffled == [together[i] for i in order]


def test_the_same_seed_and_position_give_the_same_token_and_others_differ() -> None:
    logits = torch.zeros(1, V)
    tokens = [sample_one(logits, row(params(), position=i)).token_id for i in range(20)]
    assert tokens == [sample_one(logits, row(params(), position=i)).token_id for i in range(20)]
    assert len(set(tokens)) > 10


def test_logprobs_are_the_models_own_before_any_edit() -> None:
    logits = random_logits(13)
    reference = torch.log_softmax(logits.double(), -1)[0]
    sampling = params(temperature=0.3, logit_bias=((3, 100.0),), repetition_penalty=2.0, logprobs=4)
    result = sample_one(logits, row(sampling)).logprobs
    assert result is not None
    assert result.token_id == 3
    assert result.logprob == pytest.approx(reference[3].item(), abs=1e-5)
    best = reference.topk(4)
    assert [token for token, _ in result.top] == best.indices.tolist()
    assert [value for _, value in result.top] == pytest.approx(best.values.tolist(), abs=1e-5)


def test_logprobs_zero_gives_the_chosen_token_alone_and_none_gives_nothing() -> None:
    logits = random_logits(14)
    alone = sample_one(logits, row(params(logprobs=0))).logprobs
    assert alone is not None
    assert alone.top == ()
    assert sample_one(logits, row(params())).logprobs is None


def test_more_logprobs_than_the_vocabulary_gives_the_whole_vocabulary() -> None:
    result = sample_one(random_logits(15, size=5), row(params(logprobs=20), prompt=())).logprobs
    assert result is not None
    assert sum(math.exp(value) for _, value in result.top) == pytest.approx(1.0, abs=1e-5)


BAD = {
    "NaN": lambda line: line.fill_(math.nan),
    "one NaN": lambda line: line[17:18].fill_(math.nan),
    "infinity": lambda line: line[17:18].fill_(math.inf),
    "nothing possible": lambda line: line.fill_(-math.inf),
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 0.0},
        {},
        {"top_k": 5, "logprobs": 3},
        {"top_p": 0.5},
        {"min_p": 0.5, "top_k": 4, "top_p": 0.5, "typical_p": 0.3},
    ],
)
def test_a_row_without_a_possible_token_fails_alone(kind: str, changes: dict[str, float]) -> None:
    rows = [row(params(**changes), position=i) for i in range(3)]
    logits = random_logits(16, rows=3)
    sound = Sampler(V, CPU).draw(logits.clone(), rows).results()
    BAD[kind](logits[1])
    results = Sampler(V, CPU).draw(logits.clone(), rows).results()
    assert isinstance(results[1], RowError)
    assert results[1].row == 1
    assert [results[0], results[2]] == [sound[0], sound[2]]


def test_greedy_takes_the_first_of_equal_logits() -> None:
    logits = torch.zeros(1, V)
    logits[0, [30, 60]] = 2.0
    assert sample_one(logits, row(params(temperature=0.0))).token_id == 30


def test_bfloat16_logits_are_sampled_in_float32() -> None:
    logits = random_logits(17).bfloat16()
    low = sample_one(logits, row(params(top_p=0.9)))
    assert low == sample_one(logits.float(), row(params(top_p=0.9)))


def test_logits_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="vocabulary of 97"):
        Sampler(V, CPU).draw(torch.zeros(2, V), [row(params())]).results()


# --- what vLLM's clients ask for besides --------------------------------------------------------


@PROPERTY
@given(
    st.integers(0, 1000),
    st.lists(st.lists(st.integers(0, V - 1), unique=True, max_size=9), min_size=1, max_size=4),
    st.integers(0, 3),
)
def test_listed_logprobs_are_the_models_own_with_the_tokens_among_them(
    seed: int, listed: list[list[int]], best: int
) -> None:
    logits = random_logits(seed, rows=len(listed))
    rows = [row(params(logprobs=best, logprob_token_ids=ids, temperature=0.0)) for ids in listed]
    own = torch.log_softmax(logits, dim=-1)
    results = Sampler(V, CPU).draw(logits.clone(), rows).results()
    for at, (result, ids) in enumerate(zip(results, listed, strict=True)):
        assert isinstance(result, SampledToken)
        assert result.logprobs is not None
        token = int(logits[at].argmax())
        told = dict(result.logprobs.top)
        assert set(told) == ({*ids, token} if ids else set(own[at].topk(best).indices.tolist()))
        assert told == {i: float(own[at, i]) for i in told}
        values = [value for _, value in result.logprobs.top]
        assert values == sorted(values, reverse=True)


@PROPERTY
@given(
    st.integers(0, 1000),
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=3), max_size=5),
    st.lists(st.integers(0, 3), max_size=6),
)
def test_a_bad_words_last_token_is_suppressed_where_the_others_stand(
    seed: int, runs: list[list[int]], output: list[int]
) -> None:
    logits = random_logits(seed)
    expected = logits.clone()
    for token in range(V):
        after = [*output, token]
        if any(after[len(after) - len(run) :] == run for run in runs if len(run) <= len(after)):
            expected[0, token] = -math.inf
    one = dataclasses.replace(row(params(bad_words=["x"]), output=output), bad_tokens=runs)
    assert torch.equal(edited(logits, one), expected)


def test_a_prompt_completes_no_bad_word() -> None:
    logits = random_logits(0)
    one = row(params(bad_words=["x"]), prompt=[7, 7], output=[])
    one = dataclasses.replace(one, bad_tokens=[[7, 8]])
    assert torch.equal(edited(logits, one), logits)


def test_a_request_that_leaves_itself_no_token_is_at_fault() -> None:
    rows = [
        dataclasses.replace(
            row(params(bad_words=["x"], temperature=0.0)), bad_tokens=[[i] for i in range(V)]
        ),
        row(params(temperature=0.0)),
    ]
    first, second = Sampler(V, CPU).draw(random_logits(2, rows=2), rows).results()
    assert isinstance(first, RowError)
    assert first.kind == "request"
    assert "bad_words" in first.error
    assert isinstance(second, SampledToken)
