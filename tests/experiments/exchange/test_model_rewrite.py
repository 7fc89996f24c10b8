"""Experiments as InferenceModelRewrite and back: shares come through, what can't is named."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from quickchange_server.errors import InvalidRequestError
from quickchange_server.experiments import experiment as state
from quickchange_server.experiments.definition import Definition
from quickchange_server.experiments.exchange.model_rewrite import (
    VARIANTS,
    Rewrite,
    exported,
    imported,
)
from quickchange_server.experiments.layout import shares

NOW = 1_000.0
MODELS = st.from_regex(r"[a-z0-9][a-z0-9._/-]{0,20}", fullmatch=True)
LABELS = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True)


def definition(**changes: Any) -> Definition:
    given = {
        "name": "orders",
        "variants": [
            {"name": "now", "model": "base", "weight": 9},
            {"name": "tuned", "model": "order-json", "weight": 1},
        ],
        **changes,
    }
    return Definition.model_validate(given)


def running(**changes: Any) -> state.Experiment:
    return state.created("id", definition(**changes), NOW)


def targets(document: dict[str, Any]) -> list[dict[str, Any]]:
    (rule,) = document["spec"]["rules"]
    targets: list[dict[str, Any]] = rule["targets"]
    return targets


def test_an_experiment_is_a_rule_with_weighted_targets() -> None:
    made = exported(running(), NOW, pool="llama")
    assert made.document == {
        "apiVersion": "inference.networking.x-k8s.io/v1alpha2",
        "kind": "InferenceModelRewrite",
        "metadata": {"name": "orders", "annotations": {VARIANTS: "now,tuned"}},
        "spec": {
            "poolRef": {
                "name": "llama",
                "group": "inference.networking.k8s.io",
                "kind": "InferencePool",
            },
            "rules": [
                {
                    "matches": [{"model": {"type": "Exact", "value": "orders"}}],
                    "targets": [
                        {"modelRewrite": "base", "weight": 9},
                        {"modelRewrite": "order-json", "weight": 1},
                    ],
                }
            ],
        },
    }
    assert [line.partition(":")[0] for line in made.left_out] == ["sticky"]


@settings(deadline=None)
@given(
    variants=st.lists(
        st.tuples(LABELS, MODELS, st.floats(1e-6, 1e6)),
        min_size=2,
        max_size=16,
        unique_by=lambda each: each[0],
    )
)
def test_names_models_and_shares_come_back(variants: list[tuple[str, str, float]]) -> None:
    given = [{"name": name, "model": model, "weight": w} for name, model, w in variants]
    experiment = running(variants=given)
    before, (stretch,) = experiment.definition, experiment.stretches
    served = [each for each in before.variants if each.name in shares(stretch.layout)]
    assume(len(served) > 1)
    made = exported(experiment, NOW, pool="llama")
    (after,), lines = imported(Rewrite.model_validate(made.document))
    assert [(v.name, v.model) for v in after.variants] == [(v.name, v.model) for v in served]
    for wanted, got in zip(served, after.variants, strict=True):
        share = wanted.weight / sum(before.weights.values())
        assert got.weight / sum(after.weights.values()) == pytest.approx(share, abs=2e-5)
    assert len(lines) == 1
    assert after.sticky.by == "user"
    for unserved in set(before.weights) - {each.name for each in served}:
        assert any(repr(unserved) in line for line in made.left_out)


@given(weights=st.lists(st.integers(1, 1_000_000), min_size=2, max_size=16))
def test_whole_weights_stay_as_they_are(weights: list[int]) -> None:
    given = [{"name": f"v{n}", "model": "base", "weight": w} for n, w in enumerate(weights)]
    document = exported(running(variants=given), NOW, pool="llama").document
    assert [target["weight"] for target in targets(document)] == weights


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"shadows": [{"name": "dark", "model": "sql"}]}, "shadows"),
        ({"allow": {"ana": "tuned"}}, "allow"),
        ({"deny": ["ana"]}, "deny"),
        ({"ramp": [{"after": 60, "share": 0.5}]}, "ramp"),
        ({"metrics": [{"name": "liked", "kind": "flag"}]}, "metrics"),
    ],
)
def test_what_a_rewrite_can_not_say_is_named(changes: dict[str, Any], named: str) -> None:
    lines = exported(running(**changes), NOW, pool="llama").left_out
    assert named in [line.partition(":")[0] for line in lines]


def test_a_variants_overrides_and_turbo_are_named_with_the_variant() -> None:
    variants = [
        {"name": "now", "model": "base", "overrides": {"temperature": 0}},
        {"name": "tuned", "model": "order-json", "turbo": "off"},
    ]
    lines = exported(running(variants=variants), NOW, pool="llama").left_out
    assert "variants: the overrides of 'now' are not sent along" in lines
    assert "variants: the turbo of 'tuned' are not sent along" in lines


def test_a_variant_without_a_share_is_no_target() -> None:
    variants = [
        {"name": "now", "model": "base"},
        {"name": "tuned", "model": "order-json"},
        {"name": "old", "model": "sql", "weight": 0},
    ]
    made = exported(running(variants=variants), NOW, pool="llama")
    assert [target["modelRewrite"] for target in targets(made.document)] == ["base", "order-json"]
    assert any("'old' has no share now" in line for line in made.left_out)


def test_a_ramps_present_share_is_exported() -> None:
    ramped = running(ramp=[{"at": 0, "share": 0.2}, {"after": 60, "share": 0.8}])
    for now, share in ((NOW, 0.2 * 0.1), (NOW + 61, 0.8 * 0.1)):
        given = targets(exported(ramped, now, pool="llama").document)
        assert given[1]["weight"] == pytest.approx(share * 1e6, abs=2)


def test_a_paused_experiment_is_the_variant_that_it_serves() -> None:
    made = exported(state.paused(running(), NOW), NOW, pool="llama")
    assert targets(made.document) == [{"modelRewrite": "base", "weight": 1}]
    assert any(line.startswith("state: it is paused") for line in made.left_out)


def test_a_composition_is_refused_with_its_variant() -> None:
    variants = [
        {"name": "now", "model": "base"},
        {"name": "both", "adapters": [{"id": "sql"}, {"id": "orders"}]},
    ]
    with pytest.raises(InvalidRequestError, match="'both' is a composition"):
        exported(running(variants=variants), NOW, pool="llama")


def rewrite(*rules: dict[str, Any]) -> Rewrite:
    return Rewrite.model_validate({"spec": {"poolRef": {"name": "p"}, "rules": list(rules)}})


def rule(*models: str, weights: tuple[int | None, ...] = (9, 1)) -> dict[str, Any]:
    return {
        "matches": [{"model": {"value": model}} for model in models],
        "targets": [
            {"modelRewrite": f"org/{n}", **({} if w is None else {"weight": w})}
            for n, w in enumerate(weights)
        ],
    }


def test_a_rule_of_several_models_is_an_experiment_for_each() -> None:
    made, _ = imported(rewrite(rule("a", "b")))
    assert [each.name for each in made] == ["a", "b"]
    assert [(v.name, v.model, v.weight) for v in made[0].variants] == [
        ("org-0", "org/0", 9),
        ("org-1", "org/1", 1),
    ]


def test_targets_without_weights_have_equal_shares_and_a_mixture_is_refused() -> None:
    (made,), _ = imported(rewrite(rule("a", weights=(None, None))))
    assert set(made.weights.values()) == {1.0}
    with pytest.raises(InvalidRequestError, match=r"spec\.rules\[0\]\.targets: give all"):
        imported(rewrite(rule("a", weights=(9, None))))


def test_rules_that_are_no_experiments_are_named() -> None:
    made, lines = imported(
        rewrite(rule("a"), rule(), rule("b", weights=(1,)), rule("a", weights=(1, 1)))
    )
    assert [each.name for each in made] == ["a"]
    assert made[0].weights == {"org-0": 9, "org-1": 1}  # the first rule counts
    assert [line.partition(":")[0] for line in lines[1:]] == [f"spec.rules[{n}]" for n in (1, 2, 3)]


def test_a_rewrite_without_an_experiment_is_an_error_that_says_why() -> None:
    with pytest.raises(InvalidRequestError, match="one target; point an alias at it"):
        imported(rewrite(rule("a", weights=(1,))))


def test_equal_targets_get_names_of_their_own() -> None:
    twins = {"matches": [{"model": {"value": "a"}}], "targets": [{"modelRewrite": "x"}] * 3}
    (made,), _ = imported(rewrite(twins))
    assert [variant.name for variant in made.variants] == ["x", "x-2", "x-3"]
