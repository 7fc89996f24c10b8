"""The demo tasks: what they generate and how they score."""

from __future__ import annotations

import json

import pytest

from quickchange_training.demo.tasks import TASKS, Task, TaskExample, sql
from quickchange_training.demo.tasks.docstring import documented_functions, rouge_l, word_f1
from quickchange_training.demo.tasks.order_json import OrderJson
from quickchange_training.demo.tasks.sql import Sql
from quickchange_training.demo.tasks.task import split_of, unfenced

COUNT = 60


@pytest.fixture(scope="module", params=sorted(TASKS))
def task(request: pytest.FixtureRequest) -> Task:
    return TASKS[request.param]


@pytest.fixture(scope="module")
def order() -> TaskExample:
    return OrderJson().examples("held-out", 1, seed=3)[0]


@pytest.fixture(scope="module")
def ordered_query() -> TaskExample:
    made = Sql().examples("held-out", 80, seed=3)
    return next(e for e in made if "ORDER BY" in e.completion and "DESC" in e.completion)


def test_the_same_seed_makes_the_same_examples(task: Task) -> None:
    assert task.examples("train", 20, seed=1) == task.examples("train", 20, seed=1)


def test_another_seed_makes_other_examples(task: Task) -> None:
    assert task.examples("train", 20, seed=1) != task.examples("train", 20, seed=2)


def test_examples_are_as_many_as_asked_and_distinct(task: Task) -> None:
    prompts = [e.prompt for e in task.examples("train", COUNT, seed=0)]
    assert len(set(prompts)) == COUNT


def test_no_held_out_prompt_is_a_training_prompt(task: Task) -> None:
    train = {e.prompt for e in task.examples("train", 400, seed=0)}
    assert train.isdisjoint(e.prompt for e in task.examples("held-out", COUNT, seed=0))


def test_the_expected_answers_score_one(task: Task) -> None:
    made = task.examples("held-out", COUNT, seed=0)
    scores = task.score(made, [e.completion for e in made])
    assert set(scores.values()) == {1.0}


def test_empty_answers_score_zero(task: Task) -> None:
    made = task.examples("held-out", 10, seed=0)
    assert set(task.score(made, [""] * 10).values()) == {0.0}


def test_more_distinct_queries_than_there_are_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sql, "_KINDS", (sql._group,))
    with pytest.raises(ValueError, match="sql: 1000 distinct held-out examples are too many"):
        Sql().examples("held-out", 1000, seed=0)


def test_too_many_docstrings_are_refused_with_the_number_there_is() -> None:
    with pytest.raises(ValueError, match=r"standard library has \d+ held-out examples"):
        TASKS["docstring"].examples("held-out", 10**6, seed=0)


def test_held_out_orders_are_for_other_products_and_cities() -> None:
    def subjects(split: str) -> set[str]:
        orders = [json.loads(e.completion) for e in OrderJson().examples(split, COUNT, seed=0)]  # type: ignore[arg-type]
        return {o["city"] for o in orders} | {i["product"] for o in orders for i in o["items"]}

    assert subjects("train").isdisjoint(subjects("held-out"))


def test_held_out_queries_are_over_other_tables() -> None:
    def tables(split: str) -> set[str]:
        made = Sql().examples(split, 200, seed=0)  # type: ignore[arg-type]
        return {e.prompt.partition("(")[0] for e in made}

    assert tables("train").isdisjoint(tables("held-out"))


def test_held_out_functions_come_from_other_modules() -> None:
    split_by_module = {module: split_of(module) for module, _, _ in documented_functions()}
    assert set(split_by_module.values()) == {"train", "held-out"}


def test_one_wrong_field_of_an_order_costs_its_share_of_the_fields(order: TaskExample) -> None:
    wrong = json.dumps(json.loads(order.completion) | {"city": "Atlantis"})
    assert OrderJson().score([order], [wrong]) == {"exact": 0.0, "fields": 0.8, "valid": 1.0}


def test_an_order_with_a_further_key_is_not_valid(order: TaskExample) -> None:
    more = json.dumps(json.loads(order.completion) | {"note": "none"})
    scores = OrderJson().score([order], [more])
    assert (scores["exact"], scores["valid"]) == (0.0, 0.0)


def test_a_fence_around_json_is_not_held_against_it(order: TaskExample) -> None:
    fenced = f"Here it is:\n```json\n{order.completion}\n```\nAnything else?"
    assert OrderJson().score([order], [fenced])["exact"] == 1.0


def test_another_query_with_the_same_rows_is_right(ordered_query: TaskExample) -> None:
    longer = ordered_query.completion.replace(" LIMIT", ", id LIMIT").lower() + ";"
    scores = Sql().score([ordered_query], [longer])
    assert (scores["execution"], scores["exact"], scores["runs"]) == (1.0, 0.0, 1.0)


def test_the_wrong_order_of_rows_is_wrong(ordered_query: TaskExample) -> None:
    backwards = ordered_query.completion.replace("DESC", "ASC")
    assert Sql().score([ordered_query], [backwards])["execution"] == 0.0


@pytest.mark.parametrize(
    "query", ["DROP TABLE dogs", "SELECT nothing FROM nowhere", "SELECT 1; SELECT 2", "none"]
)
def test_what_is_not_one_select_that_runs_scores_zero(
    query: str, ordered_query: TaskExample
) -> None:
    assert set(Sql().score([ordered_query], [query]).values()) == {0.0}


def test_a_runaway_query_is_ended(ordered_query: TaskExample) -> None:
    endless = (
        "SELECT count(*) FROM (WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) "
        "SELECT i FROM n)"
    )
    assert Sql().score([ordered_query], [endless])["runs"] == 0.0


def test_rouge_l_counts_words_in_order_and_word_f1_in_any() -> None:
    assert rouge_l("return the name", "Return a name.") == pytest.approx(2 / 3)
    assert rouge_l("a b c", "c b a") == pytest.approx(1 / 3)
    assert word_f1("a b c", "c b a") == 1.0


def test_a_docstring_of_two_lines_is_not_one_line() -> None:
    example = TaskExample("", "Return it.")
    assert TASKS["docstring"].score([example], ["Return it.\nMore."])["one_line"] == 0.0


def test_an_answer_without_a_fence_is_itself() -> None:
    assert unfenced("  SELECT 1\n") == "SELECT 1"
