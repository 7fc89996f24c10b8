"""The lorax-client library, unchanged, against a live server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_engine import Behaviour, embedding_of, entries
from http_support import Live, expected_text, live_server, make_adapter
from lorax_client import python_with_client, run_script
from text_support import byte_text

from quickchange_server.protocol import Component
from quickchange_store.combining.merging import Recipe, derive
from quickchange_store.store import Store

SCRIPT = Path(__file__).parents[2] / "support" / "lorax_script.py"
Outcomes = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def python() -> Path:
    return python_with_client()


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("lorax-client")
    store = Store(folder)
    store.add("team/sql", make_adapter(1.0))
    store.add("json", make_adapter(2.0))
    with live_server(folder, Behaviour(journal=folder / "journal"), byte_text()) as live:
        yield live


@pytest.fixture(scope="module")
def outcomes(live: Live, python: Path) -> Outcomes:
    """What the client made of every case."""
    found: Outcomes = run_script(python, SCRIPT, live.url)
    return found


def answer(outcomes: Outcomes, case: str) -> Any:
    assert "raised" not in outcomes[case], outcomes[case]
    return outcomes[case]["answer"]


def with_sql(live: Live) -> str:
    return expected_text(3, 5, 6, Component(live.store.resolve("team/sql").digest))


def parts(live: Live) -> list[Component]:
    weights = {"team/sql": 0.5, "json": 2.0}
    named = {live.store.resolve(name).digest: weight for name, weight in weights.items()}
    return [Component(digest, weight) for digest, weight in sorted(named.items())]


def test_the_base_answers_with_details_by_default(outcomes: Outcomes) -> None:
    plain = answer(outcomes, "plain")
    text = expected_text(3, 5, 6)
    assert plain["generated_text"] == text
    assert plain["details"]["finish_reason"] == "length"
    assert plain["details"]["generated_tokens"] == 6
    assert [token["text"] for token in plain["details"]["tokens"]] == list(text)
    assert answer(outcomes, "no details") == {"generated_text": text, "details": None}


@pytest.mark.parametrize("case", ["adapter", "adapter from hub", "async"])
def test_an_adapter_is_served(outcomes: Outcomes, live: Live, case: str) -> None:
    assert answer(outcomes, case)["generated_text"] == with_sql(live)


@pytest.mark.parametrize("case", ["stream", "async stream"])
def test_streams_bring_tokens_text_and_details(outcomes: Outcomes, live: Live, case: str) -> None:
    *events, last = answer(outcomes, case)
    texts = [event["token"]["text"] for event in [*events, last]]
    assert "".join(texts) == last["generated_text"] == with_sql(live)
    assert last["details"]["prompt_tokens"] == 5


def test_every_parameter_at_once(outcomes: Outcomes, live: Live) -> None:
    everything = answer(outcomes, "everything")
    component = Component(live.store.resolve("team/sql").digest)
    assert everything["generated_text"] == "Hello" + expected_text(3, 3, 6, component)
    details = everything["details"]
    assert details["seed"] == 3
    assert [token["text"] for token in details["prefill"]] == ["l", "l", "o"]
    assert details["tokens"][0]["alternative_tokens"][0]["id"] == details["tokens"][0]["id"]


def test_best_of_brings_the_other_candidates(outcomes: Outcomes) -> None:
    details = answer(outcomes, "best of")["details"]
    assert len(details["best_of_sequences"]) == 2


@pytest.mark.parametrize("case", ["linear", "merged stream"])
def test_merged_adapters_are_the_exact_sum(outcomes: Outcomes, live: Live, case: str) -> None:
    expected = expected_text(3, 5, 6, *parts(live))
    given = answer(outcomes, case)
    said = given[-1] if isinstance(given, list) else given
    assert said["generated_text"] == expected


def test_a_text_becomes_a_vector(outcomes: Outcomes) -> None:
    assert answer(outcomes, "embed") == {"embeddings": pytest.approx(embedding_of_x())}


def embedding_of_x() -> list[float]:
    """The fake engine's vector of "x", of length 1."""
    vector = np.array(embedding_of((ord("x"),), "last", ()))
    return [float(number) for number in vector / np.linalg.norm(vector)]


def test_a_response_format_is_a_constraint(outcomes: Outcomes, live: Live) -> None:
    assert answer(outcomes, "json")["generated_text"] == with_sql(live)
    assert answer(outcomes, "json stream")[-1]["generated_text"] == expected_text(3, 5, 6)
    asked = [
        entry["constraint"] for entry in entries(Path(live.store.location) / "journal", "Submit")
    ]
    sources = [json.loads(one[1]) for one in asked if one and one[0] == "json_schema"]
    assert [schema["properties"] for schema in sources] == [{"n": {"type": "integer"}}] * 2


def test_merged_adapters_by_ties(outcomes: Outcomes, live: Live) -> None:
    named = tuple((component.digest, component.weight) for component in parts(live))
    derived = derive(live.store, Recipe("ties", named, 0.5))
    expected = expected_text(3, 5, 6, Component(derived))
    assert answer(outcomes, "ties")["generated_text"] == expected


@pytest.mark.parametrize(
    ("case", "raised", "said"),
    [
        ("unknown adapter", "GenerationError", "owner/unknown"),
        ("unknown adapter, stream", "GenerationError", "owner/unknown"),
        ("unknown adapter, async", "GenerationError", "owner/unknown"),
        ("five stops", "ValidationError", "`stop` supports up to 4 stop sequences"),
        ("watermark", "ValidationError", "watermark"),
        ("too long", "ValidationError", "must be <= 2048"),
        ("too long, stream", "ValidationError", "must be <= 2048"),
        ("bad schema", "ValidationError", "response_format.schema.type: "),
        ("classify", "ValidationError", "/classify"),
    ],
)
def test_errors_are_the_clients_own(outcomes: Outcomes, case: str, raised: str, said: str) -> None:
    assert outcomes[case]["raised"] == raised
    assert said in outcomes[case]["message"]


def test_a_full_server_raises_overloaded(tmp_path: Path, python: Path) -> None:
    body = {"inputs": "x", "parameters": {"max_new_tokens": 2000}}
    with (
        live_server(tmp_path, Behaviour(step_seconds=0.05), max_queue=1) as live,
        live.http.stream("POST", "/generate_stream", json=body) as running,
    ):
        lines = running.iter_lines()
        next(lines)
        cases = run_script(python, SCRIPT, live.url, "plain", "long")
    assert {case["raised"] for case in cases.values()} == {"OverloadedError"}


def test_a_failure_in_mid_stream_raises_in_the_client(tmp_path: Path, python: Path) -> None:
    behaviour = Behaviour(poison=ord("H"), poison_at=2, step_seconds=0.01)
    with live_server(tmp_path, behaviour, max_request_deaths=1) as live:
        cases = run_script(python, SCRIPT, live.url, "long")
    assert cases["long"]["raised"] == "GenerationError"


def test_a_server_that_starts_raises_what_is_unknown_to_the_client(
    tmp_path: Path, python: Path
) -> None:
    with live_server(tmp_path, Behaviour(start_seconds=60)) as live:
        cases = run_script(python, SCRIPT, live.url, "plain")
    assert cases["plain"]["raised"] == "UnknownError"
    assert cases["plain"]["message"].startswith("Error status 503: unhealthy")
