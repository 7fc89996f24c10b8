"""Scores of answers against known values."""

from __future__ import annotations

import pytest

from quickchange_training.evaluation.scores import Scores, exact_match, is_json, score, token_f1


def test_an_exact_match_ignores_white_space_around_alone() -> None:
    assert exact_match(" SELECT 1;\n", "SELECT 1;")
    assert not exact_match("SELECT  1;", "SELECT 1;")
    assert not exact_match("select 1;", "SELECT 1;")


@pytest.mark.parametrize("text", ['{"a": [1, 2.5, null]}', " []\n", '[{"b": true}]'])
def test_objects_and_arrays_are_json(text: str) -> None:
    assert is_json(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        '{"a": 1} and more',
        "```json\n{}\n```",
        "{'a': 1}",
        '{"a": NaN}',
        "[Infinity]",
        "42",
    ],
)
def test_what_is_cut_off_wrapped_or_bare_is_not_json(text: str) -> None:
    assert not is_json(text)


def test_deeply_nested_text_is_judged_without_failing() -> None:
    assert not is_json("[" * 100_000)


# by hand from SQuAD's definition: 2 · shared / (words of both), articles and punctuation gone
@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("The cat sat.", "cat sat", 1.0),
        ("a cat", "dog", 0.0),
        ("cat cat dog", "cat bird", 2 * 1 / 5),
        ("in the year 1066", "1066", 2 * 1 / 4),
        ("theatre", "atre", 0.0),
        ("the", "an", 1.0),
        ("the", "cat", 0.0),
        ("", "", 1.0),
    ],
)
def test_token_f1_is_squads(answer: str, reference: str, expected: float) -> None:
    assert token_f1(answer, reference) == pytest.approx(expected)


def test_scores_are_means_and_json_is_judged_where_the_reference_is_json() -> None:
    answers = ['{"a": 1}', "no", "yes", "{"]
    references = ['{"a": 1}', "[1]", "yes", "other"]
    assert score(answers, references) == Scores(
        exact_match=0.5, json_valid=0.5, token_f1=pytest.approx(0.5)
    )
    assert score(["x"], ["y"]).json_valid is None


@pytest.mark.parametrize(("answers", "references"), [([], []), (["a"], [])])
def test_nothing_to_compare_is_refused(answers: list[str], references: list[str]) -> None:
    with pytest.raises(ValueError, match="answers for"):
        score(answers, references)
