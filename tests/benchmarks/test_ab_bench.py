"""An experiment over HTTP: its definition, its outcomes, its report, and a run on a live server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from http_support import BASE, Live, live_server, make_adapter, make_turbo

from quickchange_bench.service.ab_report import results_text
from quickchange_bench.service.ab_test import (
    RUNS,
    TASK,
    AbOptions,
    Run,
    Server,
    decision_of,
    definition,
    outcomes_of,
    promote_and_back,
    run_ab,
)
from quickchange_server.experiments.definition import Definition
from quickchange_server.experiments.statistics.analysis import (
    OutcomeSums,
    StretchUnits,
    Sums,
    analyse,
)
from quickchange_server.experiments.statistics.plan import Plan
from quickchange_store.store import Store
from quickchange_training.demo.tasks import TaskExample

(EXAMPLE,) = TASK.examples("held-out", 1, seed=5)


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[Live]:
    """A server with the demo's names; its answers are letters, so no one is valid."""
    store = Store(tmp_path)
    store.add("order-json", make_adapter(1.0))
    store.add("order-json-heads", make_turbo(2.0))
    store.add("base-heads", make_turbo(3.0))
    with live_server(tmp_path) as live:
        yield live


def options(url: str = "", run: Run = "ab", **changes: Any) -> AbOptions:
    return AbOptions(url, run, "trial", BASE, **{"users": 12, "look_every": 4, **changes})


def answer(text: str) -> dict[str, Any]:
    return {"id": "chatcmpl-1", "choices": [{"message": {"content": text}}]}


def results(valid: tuple[int, int], units: int = 200) -> dict[str, Any]:
    """The server's own form: `valid` of `units` users of each variant."""
    flags = [Sums(units, float(good), float(good)) for good in valid]
    tokens = [Sums(units, 30.0 * units, 1000.0 * units)] * 2
    told = [OutcomeSums("valid", "flag", [flags]), OutcomeSums("tokens", "number", [tokens])]
    found = analyse(
        ["now", "tuned"], told, [StretchUnits((1, 1), (units, units))], Plan()
    ).to_json()
    every = found.pop("outcomes")
    about = {"id": "trial", "state": "running", "version": 1}
    return {**about, **found, "outcomes": every[:1], "automatic": every[1:]}


@pytest.mark.parametrize("run", RUNS)
def test_the_definition_is_one(run: Run) -> None:
    defined = Definition.model_validate(definition(options(run=run)))
    same = defined.variants[0].serves_as(defined.variants[1])
    assert same == (run == "aa")


def test_the_right_answer_is_valid_with_all_fields() -> None:
    told = outcomes_of(answer(f"```json\n{EXAMPLE.completion}\n```"), EXAMPLE)
    assert {each["name"]: each["value"] for each in told} == {"valid": True, "fields": 1.0}
    assert {each["completion"] for each in told} == {"chatcmpl-1"}


def test_json_with_other_keys_is_not_valid() -> None:
    order = json.loads(EXAMPLE.completion)
    del order["due"]
    told = {each["name"]: each["value"] for each in outcomes_of(answer(json.dumps(order)), EXAMPLE)}
    assert told["valid"] is False
    assert told["fields"] == pytest.approx(4 / 5)


def test_the_decision_is_that_of_the_flag() -> None:
    assert decision_of(results((60, 160))) == "better"
    assert decision_of(results((100, 104))) == "keep collecting"


def test_the_report_tells_each_outcome_and_the_shares() -> None:
    text = results_text(results((60, 160)))
    rows = [row for row in text.splitlines() if row.startswith("| valid")]
    assert len(rows) == 3
    assert rows[-1].rstrip(" |").endswith("better")
    assert "| tokens" in text
    assert "now 200, tuned 200; as the weights say" in text


def test_a_mismatch_of_shares_is_told() -> None:
    found = results((60, 160))
    assert "MISMATCH" in results_text({**found, "ratio": {**found["ratio"], "mismatch": True}})


def test_every_user_is_asked_and_told_once(demo: Live) -> None:
    said: list[str] = []
    found = asyncio.run(run_ab(options(demo.url, "ab"), said.append))
    valid = found.results["outcomes"][0]["variants"]
    assert sum(variant["count"] for variant in valid) == 12
    assert all(variant["mean"] == 0 for variant in valid)
    assert found.looks == ("keep collecting",) * 3
    assert found.promoted is None


def test_a_winner_is_promoted_and_rolled_back(demo: Live) -> None:
    async def work() -> tuple[Any, Any]:
        async with httpx.AsyncClient(base_url=demo.url) as http:
            server = Server(http, "trial")
            await server.ask("POST", "/v1/experiments", definition(options()))
            return await promote_and_back(server, lambda _: None)

    promoted, rolled_back = asyncio.run(work())
    assert promoted["after"] == {"target": "order-json", "turbo": "order-json-heads"}
    assert rolled_back["after"] is None
    assert demo.http.get("/v1/aliases").json()["data"] == []


def test_a_refusal_says_what_was_asked(demo: Live) -> None:
    asyncio.run(run_ab(options(demo.url, users=2), lambda _: None))
    with pytest.raises(RuntimeError, match=r"POST /v1/experiments: 409: .*trial"):
        asyncio.run(run_ab(options(demo.url), lambda _: None))


def test_examples_are_not_those_of_training() -> None:
    held_out: list[TaskExample] = TASK.examples("held-out", 20, seed=0)
    assert not {e.prompt for e in held_out} & {e.prompt for e in TASK.examples("train", 200, 0)}
