"""sample in every version: against a statement of its rules in NumPy float64, and bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mass_edges import draws_at_edges
from torch import Tensor

from quickchange_kernels import gpu_targets
from quickchange_kernels.aot import compiling
from quickchange_kernels.sampling import sample_triton
from quickchange_kernels.sampling.sample_contract import Drawn, Draws, Edits, sample
from quickchange_kernels.sampling.sample_plain import masses, plain_sample

Row = npt.NDArray[np.float64]
PROPERTY = settings(deadline=None, max_examples=60)
NEVER = float("-inf")


@dataclass(frozen=True)
class Rules:
    """One row's parameters."""

    temperature: float = 1.0
    uniform: float = 0.5
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0


def draws(rules: list[Rules]) -> Draws:
    def column(name: str) -> Tensor:
        return torch.tensor([getattr(one, name) for one in rules], dtype=torch.float64)

    return Draws(
        column("temperature"),
        column("uniform"),
        column("top_k"),
        column("top_p"),
        column("min_p"),
        column("typical_p"),
    )


def run_plain(logits: Tensor, how: Draws, edits: Edits | None = None) -> Drawn:
    changes = (None, None, None) if edits is None else (edits.begin, edits.token, edits.value)
    return Drawn(*plain_sample(logits, how.temperature, how.uniform, how.filters, *changes))


Run = Callable[..., Drawn]


@pytest.fixture
def run(version: str) -> Run:
    return run_plain if version == "plain" else sample


BIT = np.log(2.0) * 2.0**-16  # the unit of depths


def probabilities(logits: Row, rules: Rules, shift: float = 0.0) -> Row:
    """The rules as they are documented, in float64, with sorting: what is drawn, how often.

    shift: of the entropy that typical_p looks around, in units of depth.
    """
    scaled = logits / rules.temperature
    kept = np.ones(len(scaled), dtype=bool)
    if 0 < rules.top_k < len(scaled):
        kept = logits >= np.sort(logits)[-rules.top_k]
    weights = np.where(kept, np.exp(scaled - scaled.max()), 0.0)
    weights /= weights.sum()
    least = 0.0
    if rules.top_p < 1:
        ordered = np.sort(weights)[::-1]
        least = ordered[np.searchsorted(ordered.cumsum(), rules.top_p * (1 - 1e-12))]
    least = max(least, rules.min_p * weights.max())
    weights = np.where(weights >= least, weights, 0.0)
    weights /= weights.sum()
    if rules.typical_p < 1:
        told = -np.log(weights, out=np.full(len(weights), -np.inf), where=weights > 0)
        entropy = (weights[weights > 0] * told[weights > 0]).sum() + shift * BIT
        away = np.abs(told - entropy)
        order = np.argsort(away, kind="stable")
        edge = np.searchsorted(weights[order].cumsum(), rules.typical_p * (1 - 1e-12))
        weights = np.where(away <= away[order][edge], weights, 0.0)
    drawn: Row = weights / weights.sum()
    return drawn


RULES = st.builds(
    Rules,
    temperature=st.floats(0.1, 3.0),
    uniform=st.floats(0.0, 1.0, exclude_max=True),
    top_k=st.sampled_from([0, 0, 1, 3, 40, 97, 1000]),
    top_p=st.one_of(st.just(1.0), st.floats(0.01, 0.999)),
    min_p=st.one_of(st.just(0.0), st.floats(0.001, 0.9)),
    typical_p=st.one_of(st.just(1.0), st.floats(0.01, 0.999)),
)


@PROPERTY
@given(st.integers(0, 10**6), st.sampled_from([1, 2, 97, 700]), st.floats(0.1, 8), RULES)
def test_the_token_is_the_one_that_the_rules_give_in_float64(
    seed: int, size: int, spread: float, rules: Rules
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(1, size, generator=generator) * spread
    weights = probabilities(logits[0].double().numpy(), rules)
    above = weights.cumsum()
    for token in (run_plain(logits, draws([rules])), sample(logits, draws([rules]))):
        i = int(token.tokens.item())
        # rounding may move an edge of the distribution by a little; a filter's edge by one token,
        # where the mass that it compares comes within rounding of top_p or min_p
        low = above[i] - weights[i]
        assert low - 1e-5 <= rules.uniform <= above[i] + 1e-5 or _on_an_edge(logits, rules)


def _on_an_edge(logits: Tensor, rules: Rules) -> bool:
    """True if a change of top_p, min_p or typical_p within rounding changes what is kept."""
    row = logits[0].double().numpy()
    kept = [
        probabilities(
            row,
            Rules(
                rules.temperature,
                rules.uniform,
                rules.top_k,
                rules.top_p * (1 + sign * 1e-5) if rules.top_p < 1 else 1.0,
                rules.min_p * (1 + sign * 1e-5),
                rules.typical_p * (1 + edge * 1e-5) if rules.typical_p < 1 else 1.0,
            ),
            shift,
        )
        > 0
        for sign in (-1, 1)
        for edge in (-1, 1)
        for shift in (-4, 4)
    ]
    return any(not np.array_equal(kept[0], other) for other in kept[1:])


@settings(PROPERTY, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(0, 10**6),
    st.sampled_from([1, 3, 97, 256, 511, 6000]),
    st.floats(0.1, 30),
    st.lists(st.one_of(RULES, st.just(Rules(temperature=0.0))), min_size=1, max_size=5),
    st.sampled_from(["float32", "coarse", "some -inf"]),
)
def test_the_native_version_draws_what_the_plain_one_draws_bit_for_bit(
    native_version: str, seed: int, size: int, spread: float, rules: list[Rules], kind: str
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(rules), size, generator=generator) * spread
    if kind == "coarse":  # many ties
        logits = logits.bfloat16().float()
    if kind == "some -inf":
        logits[torch.rand(logits.shape, generator=generator) < 0.5] = NEVER
    expected = run_plain(logits.clone(), draws(rules))
    out = sample(logits.clone(), draws(rules))
    assert torch.equal(out.sound, expected.sound), native_version
    assert torch.equal(out.tokens, expected.tokens), native_version


@pytest.mark.parametrize("spread", [0.1, 1.0, 8.0])
def test_masses_have_every_bit_of_the_plain_versions(
    spread: float, run: Run, generator: torch.Generator
) -> None:
    logits = torch.randn(50, 300, generator=generator) * spread
    temperature = torch.rand(50, generator=generator).double() + 0.5
    rows, how, expected = draws_at_edges(logits, temperature)
    assert run(rows, how).tokens.tolist() == expected


def test_masses_are_the_exponentials_in_units_of_the_best_tokens(
    generator: torch.Generator,
) -> None:
    logits = torch.randn(4, 2000, generator=generator) * 3
    peak = logits.amax(dim=1, keepdim=True)
    temperature = torch.tensor([0.3, 0.9, 1.0, 2.0], dtype=torch.float64)
    power = (logits - peak).double() / temperature[:, None]
    mass = masses(logits, peak, temperature).double()
    assert ((mass - power.exp() * 2**42).abs() <= power.exp() * 2**42 * 4e-6 + 1).all()
    assert (mass.amax(dim=1) == 2**42).all()


def test_tokens_follow_their_probabilities(run: Run, generator: torch.Generator) -> None:
    logits = torch.randn(24, generator=generator)
    rules = Rules(temperature=0.8, top_p=0.9)
    count = 20_000
    how = Draws(
        temperature=torch.full((count,), 0.8, dtype=torch.float64),
        uniform=torch.rand(count, generator=generator, dtype=torch.float64),
        top_p=torch.full((count,), 0.9, dtype=torch.float64),
    )
    tokens = run(logits.repeat(count, 1), how).tokens
    expected = probabilities(logits.double().numpy(), rules) * count
    observed = np.bincount(tokens.numpy(), minlength=24)
    possible = expected > 0
    assert observed[~possible].sum() == 0
    difference = observed[possible] - expected[possible]
    chi_square = float((difference**2 / expected[possible]).sum())
    assert chi_square < 58.0  # the 0.9999 quantile at 23 degrees of freedom


def test_a_rows_token_does_not_depend_on_its_batch(run: Run, generator: torch.Generator) -> None:
    logits = torch.randn(7, 5001, generator=generator) * 4
    rules = [
        Rules(
            0.7 + 0.1 * i,
            0.13 * i,
            top_k=[0, 50][i % 2],
            top_p=0.5 + 0.08 * i,
            typical_p=1 - 0.09 * i,
        )
        for i in range(7)
    ]
    together = run(logits.clone(), draws(rules)).tokens.tolist()
    alone = [
        run(logits[i : i + 1].clone(), draws([one])).tokens.item() for i, one in enumerate(rules)
    ]
    assert together == alone


def test_no_temperature_takes_the_first_of_the_best(run: Run) -> None:
    logits = torch.zeros(2, 700)
    logits[0, [300, 600]] = 1
    logits[1, :] = -5
    assert run(logits, Draws()).tokens.tolist() == [300, 0]


@pytest.mark.parametrize("u", [0.0, 1 - 2.0**-53])
def test_the_ends_of_the_unit_interval_draw_possible_tokens(run: Run, u: float) -> None:
    logits = torch.full((1, 1000), NEVER)
    logits[0, 400:500] = torch.linspace(-1, 1, 100)
    expected = 400 if u == 0 else 499
    assert run(logits, draws([Rules(uniform=u)])).tokens.item() == expected


def test_extreme_filters_keep_the_best_token(run: Run) -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, -0.0]])
    rules = [
        Rules(top_p=0.0, uniform=0.99),
        Rules(min_p=1.0, uniform=0.99),
        Rules(min_p=7.0, uniform=0.99),
        Rules(top_k=1, uniform=0.99),
        Rules(top_k=1, typical_p=0.0, uniform=0.99),
        Rules(temperature=1e-45, uniform=0.99),
    ]
    assert run(logits.repeat(len(rules), 1), draws(rules)).tokens.tolist() == [1] * len(rules)


def test_zeros_of_both_signs_are_equal_at_the_edge_of_top_k(run: Run) -> None:
    logits = torch.tensor([[-0.0, 0.0, 2.0, -3.0, -0.0]]).repeat(3, 1)
    rules = [Rules(top_k=2, uniform=u) for u in (0.0, 0.999, 0.13)]
    assert run(logits, draws(rules)).tokens.tolist() == [0, 4, 1]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("at", [0, 511, 600])
def test_rows_that_are_not_sound_are_marked_and_disturb_no_other(
    run: Run, bad: float, at: int, generator: torch.Generator
) -> None:
    logits = torch.randn(4, 601, generator=generator)
    rules = [Rules(top_k=40, top_p=0.9, min_p=0.01, typical_p=0.8)] * 3 + [Rules(temperature=0.0)]
    expected = run(logits.clone(), draws(rules)).tokens.tolist()
    logits[1, at] = bad
    logits[2] = NEVER
    out = run(logits, draws(rules))
    assert out.sound.tolist() == [True, False, False, True]
    assert out.tokens.tolist() == [expected[0], 0, 0, expected[3]]


def edits(*rows: tuple[dict[int, float], ...]) -> Edits:
    """Four dictionaries a row, in the order of EDITS; with padding at the end."""
    begin, tokens, values = [0], [], []
    for row in rows:
        for kind in row:
            tokens += list(kind)
            values += list(kind.values())
            begin.append(len(tokens))
    return Edits(
        torch.tensor(begin, dtype=torch.int32),
        torch.tensor([*tokens, 2**30], dtype=torch.int32),
        torch.tensor([*values, float("nan")]),
    )


def test_edits_are_made_in_their_order_and_in_place(run: Run) -> None:
    logits = torch.tensor([[1.0, -2.0, 3.0, 4.0, 5.0], [0.0, 0.0, 0.0, 0.0, 1.0]])
    changes = edits(
        ({0: 2.0, 3: 1.0}, {3: -1.0}, {0: 2.0, 1: 2.0, 3: 4.0}, {0: 0.25, 2: 1.0}),
        ({4: -2.0}, {4: NEVER, 2: 7.0}, {}, {}),
    )
    out = run(logits, Draws(), changes)
    assert logits.tolist() == [[1.25, -4.0, 2.0, -4.0, 5.0], [0.0, 0.0, 7.0, 0.0, NEVER]]
    assert out.tokens.tolist() == [4, 2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_logits_are_drawn_and_edited_in_float32(
    run: Run, dtype: torch.dtype, generator: torch.Generator
) -> None:
    low = torch.randn(2, 300, generator=generator).to(dtype)
    kept = low.clone()
    changes = edits(({7: 3.1}, {}, {}, {}), ({}, {}, {9: 1.3}, {}))
    rules = draws([Rules(uniform=0.3, top_p=0.8), Rules(uniform=0.9)])
    expected = run(low.float(), rules, changes)
    assert run(low, rules, changes).tokens.tolist() == expected.tokens.tolist()
    assert torch.equal(low, kept)


def test_rows_may_be_apart(run: Run, generator: torch.Generator) -> None:
    wide = torch.randn(3, 700, generator=generator)
    rules = draws([Rules(uniform=0.2 * i, top_p=0.9) for i in range(3)])
    assert run(wide[:, 50:350], rules).tokens.tolist() == (
        run(wide[:, 50:350].clone(), rules).tokens.tolist()
    )


def test_no_rows_give_no_tokens(run: Run) -> None:
    out = run(torch.zeros(0, 5), draws([]))
    assert out.tokens.shape == (0,)
    assert out.sound.shape == (0,)


@pytest.mark.parametrize(
    ("logits", "how", "changes", "message"),
    [
        (torch.zeros(2, 6).T, Draws(), None, "contiguous rows"),
        (torch.zeros(2, 0), Draws(), None, "V"),
        (torch.zeros(1, 6), Draws(temperature=torch.ones(1).double()), None, "together"),
        (torch.zeros(2, 6), draws([Rules()]), None, "temperature"),
        (torch.zeros(2, 6), Draws(), edits(({}, {}, {}, {})), "edits.begin"),
    ],
)
def test_what_the_contract_does_not_have_is_refused_by_name(
    logits: Tensor, how: Draws, changes: Edits | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        sample(logits, how, changes)


@pytest.mark.usefixtures("native_version")
def test_a_native_edit_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(IndexError, match=r"edits.token\[0\] is 5"):
        sample(torch.zeros(1, 5), Draws(), edits(({5: 1.0}, {}, {}, {})))


def test_the_gpus_masses_fuse_no_product_with_a_sum() -> None:
    checked = 0
    for one in sample_triton.compilations():
        if "no filter" in one.name and one.name.endswith("fp32"):
            code = compiling.compiled(one, gpu_targets.TARGETS["sm_90"]).asm["ptx"]
            assert "mul.rn.f32" in code
            assert "div.rn.f32" in code
            assert "fma.rn.f32" not in code
            checked += 1
    assert checked == 2
