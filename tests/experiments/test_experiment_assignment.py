"""Who gets what: sticky by hash, stable under changed weights, lists, ramps, states."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import pytest
from experiment_support import START, definition_of, experiment_of
from hypothesis import given, settings
from hypothesis import strategies as st

from quickchange_server.api.openai.requests import CompletionRequest
from quickchange_server.errors import ConflictError, InvalidRequestError
from quickchange_server.experiments import experiment as changes
from quickchange_server.experiments.assignment import assign, subject_of
from quickchange_server.experiments.definition import Sticky
from quickchange_server.experiments.documents import decode, encode
from quickchange_server.experiments.experiment import Experiment, Pointed
from quickchange_server.experiments.layout import SIZE

UNITS = [f"user-{number}" for number in range(4000)]


def variant_of(experiment: Experiment, unit: str, now: float = START, tenant: str = "t") -> str:
    return assign(experiment, tenant, unit, 0, now).variant


def variants_of(experiment: Experiment, now: float = START) -> dict[str, str]:
    return {unit: variant_of(experiment, unit, now) for unit in UNITS}


def weighed(weights: dict[str, float]) -> Experiment:
    variants = [{"name": n, "model": "base", "weight": w} for n, w in weights.items()]
    return experiment_of(variants=variants)


def reweighed(old: Experiment, weights: dict[str, float], now: float = START) -> Experiment:
    variants = [
        variant.model_copy(update={"weight": weights[variant.name]})
        for variant in old.definition.variants
    ]
    definition = old.definition.model_copy(update={"variants": variants})
    return changes.updated(old, definition, now)


def within(count: int, share: float, of: int = len(UNITS)) -> bool:
    """True if a binomial count is within five standard deviations."""
    return abs(count - share * of) <= 5 * math.sqrt(of * max(share * (1 - share), 1 / of))


def test_a_unit_gets_the_same_variant_every_time() -> None:
    experiment = experiment_of()
    assert variants_of(experiment) == variants_of(experiment, START + 1e6)


def test_shares_follow_the_weights() -> None:
    counts = Counter(variants_of(weighed({"a": 6, "b": 3, "c": 1})).values())
    assert within(counts["a"], 0.6)
    assert within(counts["b"], 0.3)
    assert within(counts["c"], 0.1)


vectors = st.fixed_dictionaries({name: st.floats(0.05, 1.0) for name in "abc"})


@given(vectors, vectors)
@settings(max_examples=20, deadline=None)
def test_as_many_units_move_as_the_weights_are_apart(
    before: dict[str, float], after: dict[str, float]
) -> None:
    old = weighed(before)
    new = reweighed(old, after)
    first, second = variants_of(old), variants_of(new)
    shares = [{n: w / sum(v.values()) for n, w in v.items()} for v in (before, after)]
    distance = sum(abs(shares[0][n] - shares[1][n]) for n in "abc") / 2
    moved = sum(first[unit] != second[unit] for unit in UNITS)
    assert within(moved, distance)


def test_no_unit_moves_between_variants_whose_share_stays() -> None:
    old = weighed({"a": 0.4, "b": 0.2, "c": 0.2, "d": 0.2})
    new = reweighed(old, {"a": 0.5, "b": 0.2, "c": 0.2, "d": 0.1})
    first, second = variants_of(old), variants_of(new)
    moves = {(first[unit], second[unit]) for unit in UNITS if first[unit] != second[unit]}
    assert moves == {("d", "a")}


def test_experiments_and_tenants_draw_independently() -> None:
    one, other = experiment_of(), changes.created("another", definition_of(), START)
    agree = sum(variant_of(one, unit) == variant_of(other, unit) for unit in UNITS)
    assert within(agree, 0.5)
    agree = sum(
        variant_of(one, unit, tenant="t") == variant_of(one, unit, tenant="u") for unit in UNITS
    )
    assert within(agree, 0.5)


def test_without_a_subject_the_draw_decides() -> None:
    experiment = experiment_of()
    low, high = (assign(experiment, "t", None, draw, START) for draw in (0, SIZE - 1))
    assert (low.variant, high.variant) == ("a", "b")
    assert (low.unit, low.by, low.counted) == (None, "random", True)


def test_listed_units_get_what_the_lists_say_and_do_not_count() -> None:
    free = experiment_of()
    a, b = (next(u for u in UNITS if variant_of(free, u) == v) for v in "ab")
    listed = experiment_of(allow={a: "b"}, deny=[b])
    got = [assign(listed, "t", unit, 0, START) for unit in (a, b)]
    assert [each.variant for each in got] == ["b", "a"]
    assert [(each.by, each.counted) for each in got] == [("list", False)] * 2


RAMP = [{"after": 10, "share": 0.2}, {"after": 20, "share": 1.0}]


def test_a_ramp_goes_from_the_control_by_its_steps() -> None:
    experiment = experiment_of(ramp=RAMP)
    counts = [Counter(variants_of(experiment, START + s).values())["b"] for s in (0, 10, 25)]
    assert counts[0] == 0
    assert within(counts[1], 0.1)
    assert within(counts[2], 0.5)


def test_a_ramp_only_adds_units_to_what_it_ramps_up() -> None:
    experiment = experiment_of(ramp=RAMP)
    early, late = (variants_of(experiment, START + s) for s in (10, 20))
    assert all(late[unit] == "b" for unit in UNITS if early[unit] == "b")


def test_steps_at_a_time_of_day_are_taken_in_order_of_time() -> None:
    steps = [{"at": START + 20, "weights": {"b": 1}}, {"at": START + 10, "weights": {"a": 1}}]
    experiment = experiment_of(ramp=steps)
    assert set(variants_of(experiment, START + 15).values()) == {"a"}
    assert set(variants_of(experiment, START + 25).values()) == {"b"}


def test_a_paused_experiment_gives_the_control_and_does_not_count() -> None:
    paused = changes.paused(experiment_of(), START + 1)
    got = [assign(paused, "t", unit, 0, START + 2) for unit in UNITS[:50]]
    assert {(each.variant, each.by, each.counted) for each in got} == {("a", "state", False)}


def test_a_resumed_experiment_gives_back_what_units_had() -> None:
    experiment = experiment_of()
    again = changes.resumed(changes.paused(experiment, START + 1), START + 100)
    assert variants_of(again, START + 100) == variants_of(experiment)
    assert again.stretches == experiment.stretches


def test_a_pause_holds_the_ramp() -> None:
    paused = changes.paused(experiment_of(ramp=RAMP), START + 12)
    resumed = changes.resumed(paused, START + 112)
    early, held, late = (variants_of(resumed, START + s) for s in (12, 115, 121))
    assert held == early
    assert within(Counter(late.values())["b"], 0.5)


def test_a_stopped_experiment_gives_the_winner_or_the_control() -> None:
    for winner, served in (("b", "b"), (None, "a")):
        stopped = changes.stopped(experiment_of(), winner, START)
        assert set(variants_of(stopped).values()) == {served}


def test_stretches_that_have_been_keep_their_numbers() -> None:
    old = reweighed(weighed({"a": 1, "b": 1}), {"a": 3, "b": 1}, START + 5)
    new = reweighed(old, {"a": 1, "b": 1}, START + 9)
    assert new.stretches[:2] == old.stretches
    assert [new.stretch(START + s) for s in (0, 6, 9)] == [0, 1, 2]


def test_what_changes_no_share_begins_no_stretch() -> None:
    old = weighed({"a": 1, "b": 1})
    assert reweighed(old, {"a": 2, "b": 2}, START + 5).stretches == old.stretches


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"sticky": {"by": "random"}}, "sticky"),
        ({"control": "b"}, "control"),
        ({"alpha": 0.1}, "alpha"),
        ({"variants": [{"name": "a", "model": "x"}, {"name": "b", "model": "sql"}]}, "variants"),
        ({"variants": [{"name": "a", "model": "base"}, {"name": "c", "model": "x"}]}, "variants"),
    ],
)
def test_what_results_rest_on_can_not_change(change: dict[str, object], param: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        changes.updated(experiment_of(), definition_of(**change), START)
    assert refused.value.param == param


@pytest.mark.parametrize(
    "change",
    [
        lambda old: changes.paused(old, START),
        lambda old: changes.resumed(old, START),
        lambda old: changes.updated(old, old.definition, START),
        lambda old: changes.stopped(old, None, START),
    ],
)
def test_a_stopped_experiment_stays_stopped(change: Callable[[Experiment], Experiment]) -> None:
    stopped = changes.stopped(experiment_of(), None, START)
    with pytest.raises(ConflictError):
        change(stopped)


def test_a_document_gives_back_the_experiment() -> None:
    full = experiment_of(
        ramp=RAMP,
        alias="live",
        shadows=[{"name": "s", "model": "x", "share": 0.5}],
        metrics=[{"name": "ok", "kind": "flag", "margin": 0.1}],
    )
    promoted = changes.promoted(full, "b", Pointed("sql@1", "fast"))
    twice = changes.promoted(changes.paused(promoted, START + 3), "a", None)
    assert decode(encode(twice)) == twice


@pytest.mark.parametrize(
    ("sticky", "subject"),
    [
        (Sticky(by="user", name=None), "u"),
        (Sticky(by="header", name="x-session"), "s"),
        (Sticky(by="field", name="account"), "m"),
        (Sticky(by="field", name="absent"), None),
        (Sticky(by="random", name=None), None),
    ],
)
def test_the_subject_is_where_the_definition_says(sticky: Sticky, subject: str | None) -> None:
    body = CompletionRequest(model="x", prompt="x", user="u", metadata={"account": "m"})
    assert subject_of(sticky, body, {"x-session": "s"}) == subject
