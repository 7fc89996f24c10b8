"""Requests whose tokens are drafted ahead: several tokens a step, and the same answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fake_engine import Behaviour, accepted_at, entries
from http_support import (
    BASE,
    LIMIT_SECONDS,
    Live,
    expected_text,
    live_server,
    make_adapter,
    make_turbo,
    write_medusa,
    write_peft,
)
from prometheus_client.parser import text_string_to_metric_families

from quickchange_server.frontend.request_admission import choice_seed
from quickchange_server.protocol import Component
from quickchange_store.store import Store

PROMPT = "Hello"
SEED = 3
DRAFTS = Behaviour().drafts  # a step
MODES = ["heads", "lookup", "own"]
JOURNAL = "journal"


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("turbo")
    store = Store(folder / "store")
    store.add("sql", make_adapter(1.0))
    store.add("heads", make_turbo(2.0))
    store.add("own", make_turbo(3.0, lora=True))
    store.alias("fast", "sql", turbo="heads")
    broken = store.add("broken", make_turbo(9.0)).digest
    behaviour = Behaviour(missing=frozenset({broken}), journal=folder / JOURNAL)
    with live_server(folder / "store", behaviour) as live:
        yield live


def completion(turbo: str | None = "heads", **changes: Any) -> dict[str, Any]:
    given = {} if turbo is None else {"turbo": turbo}
    return {"model": BASE, "prompt": PROMPT, "seed": SEED, "max_tokens": 40, **given, **changes}


def answer_of(live: Live, body: dict[str, Any], stream: bool) -> tuple[str, str, dict[str, Any]]:
    """Text, finish reason and usage of a request with one choice."""
    if stream:
        wanted = {**body, "stream_options": {"include_usage": True}}
        *events, last, done = live.events("/v1/completions", wanted)
        assert done == "[DONE]"
        choices = [event["choices"][0] for event in events]
        text = "".join(choice["text"] for choice in choices)
        return text, choices[-1]["finish_reason"], last["usage"]
    response = live.post("/v1/completions", body)
    assert response.status_code == 200, response.text
    answer = response.json()
    (choice,) = answer["choices"]
    return choice["text"], choice["finish_reason"], answer["usage"]


def steps_of(seed: int, tokens: int) -> list[int]:
    """The drafts that the fake engine accepts, step by step, until it has so many tokens."""
    accepted: list[int] = []
    while sum(accepted) + len(accepted) < tokens:
        accepted.append(accepted_at(seed, sum(accepted) + len(accepted), DRAFTS))
    return accepted


def predictions(seed: int, tokens: int) -> dict[str, int]:
    """The usage's details of a choice that ends after so many tokens."""
    steps = steps_of(seed, tokens)
    before = sum(steps[:-1]) + len(steps) - 1
    accepted = sum(steps[:-1]) + min(steps[-1], tokens - before)
    rejected = DRAFTS * len(steps) - accepted
    return {"accepted_prediction_tokens": accepted, "rejected_prediction_tokens": rejected}


def heads_seen(live: Live) -> Any:
    """The heads of the last request that the engine got."""
    return entries(Path(live.store.location).parent / JOURNAL, "Submit")[-1]["heads"]


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    return error


# --- the same answers ---------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("turbo", MODES)
def test_drafting_changes_no_text_and_its_usage_tells_of_it(
    live: Live, turbo: str, stream: bool
) -> None:
    text, finish, usage = answer_of(live, completion(turbo), stream)
    assert (text, finish) == (expected_text(SEED, 5, 40), "length")
    assert usage["completion_tokens"] == 40
    assert usage["completion_tokens_details"] == predictions(SEED, 40)
    assert usage["completion_tokens_details"]["accepted_prediction_tokens"] > 0


@pytest.mark.parametrize("turbo", [None, "auto", "off"])
def test_a_request_that_drafts_nothing_says_nothing_of_drafts(
    live: Live, turbo: str | None
) -> None:
    text, _, usage = answer_of(live, completion(turbo), stream=False)
    assert text == expected_text(SEED, 5, 40)
    assert "completion_tokens_details" not in usage
    assert heads_seen(live) is None


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("offset", range(2, 12))
@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_ends_a_choice_inside_a_run_of_accepted_drafts(
    live: Live, offset: int, stream: bool, include: bool
) -> None:
    whole = expected_text(SEED, 5, 40)
    stop = whole[offset : offset + 2]
    body = completion(stop=stop, include_stop_str_in_output=include)
    text, finish, usage = answer_of(live, body, stream)
    end = whole.index(stop)
    assert (text, finish) == (whole[: end + 2 * include], "stop")
    assert usage["completion_tokens"] == end + 2
    assert usage["completion_tokens_details"] == predictions(SEED, end + 2)


@pytest.mark.parametrize("offset", range(2, 8))
def test_a_stop_token_ends_a_choice_inside_a_run_of_accepted_drafts(
    live: Live, offset: int
) -> None:
    whole = expected_text(SEED, 5, 40)
    end = whole.index(whole[offset])
    text, finish, usage = answer_of(
        live, completion(stop_token_ids=[ord(whole[offset])]), stream=False
    )
    assert (text, finish) == (whole[:end], "stop")
    assert usage["completion_tokens"] == end + 1


def test_a_stop_string_counts_only_after_min_tokens_inside_a_run(live: Live) -> None:
    whole = expected_text(SEED, 5, 40)
    stop = whole[1]
    for least in range(2, 10):
        body = completion(stop=stop, min_tokens=least)
        text, _, _ = answer_of(live, body, stream=False)
        end = whole.find(stop, least)
        assert text == (whole if end < 0 else whole[:end])


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_stay_one_a_token(live: Live, stream: bool) -> None:
    body = completion(logprobs=1)
    if stream:
        *events, _ = live.events("/v1/completions", body)
        lists = [event["choices"][0]["logprobs"] for event in events]
    else:
        lists = [live.post("/v1/completions", body).json()["choices"][0]["logprobs"]]
    assert not stream or max(len(entry["tokens"]) for entry in lists) > 1
    letters = list(expected_text(SEED, 5, 40))
    assert [token for entry in lists for token in entry["tokens"]] == letters
    assert [offset for entry in lists for offset in entry["text_offset"]] == list(range(40))


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_end_with_the_text_inside_a_run(live: Live, stream: bool) -> None:
    whole = expected_text(SEED, 5, 40)
    for offset in range(2, 12):
        body = completion(logprobs=0, stop=whole[offset : offset + 2])
        if stream:
            *events, _ = live.events("/v1/completions", body)
            choices = [event["choices"][0] for event in events]
        else:
            choices = live.post("/v1/completions", body).json()["choices"]
        text = "".join(choice["text"] for choice in choices)
        logged = [token for choice in choices for token in choice["logprobs"]["tokens"]]
        assert "".join(logged) == text


def test_choices_side_by_side_add_up_in_the_usage(live: Live) -> None:
    body = live.post("/v1/completions", completion(n=3)).json()
    seeds = [choice_seed(SEED, index) for index in range(3)]
    assert [c["text"] for c in body["choices"]] == [expected_text(seed, 5, 40) for seed in seeds]
    wanted = [predictions(seed, 40) for seed in seeds]
    assert body["usage"]["completion_tokens_details"] == {
        key: sum(details[key] for details in wanted) for key in wanted[0]
    }


def test_the_openai_library_reads_the_usage_of_a_streamed_chat(live: Live) -> None:
    with openai.OpenAI(
        base_url=f"{live.url}/v1", api_key="none", max_retries=0, timeout=LIMIT_SECONDS
    ) as client:
        stream = client.chat.completions.create(
            model="own",
            messages=[{"role": "user", "content": "Hi"}],
            seed=SEED,
            max_tokens=30,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"turbo": "heads"},
        )
        *chunks, last = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    component = Component(live.store.resolve("own").digest)
    assert text == expected_text(SEED, len("<user\nHi>\n<assistant\n"), 30, component)
    assert len(chunks) < 30
    assert last.usage is not None
    details = last.usage.completion_tokens_details
    assert details is not None
    wanted = predictions(SEED, 30)
    assert details.accepted_prediction_tokens == wanted["accepted_prediction_tokens"]
    assert details.rejected_prediction_tokens == wanted["rejected_prediction_tokens"]


# --- what drafts --------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "drafter"), [("own", "own"), ("fast", "heads")])
def test_the_models_name_binds_its_turbo(live: Live, model: str, drafter: str) -> None:
    answer_of(live, completion(None, model=model), stream=False)
    assert heads_seen(live) == live.store.resolve(drafter).digest


def test_a_turbo_as_the_model_is_the_base_with_its_heads(live: Live) -> None:
    text, _, usage = answer_of(live, completion(None, model="heads"), stream=False)
    assert text == expected_text(SEED, 5, 40)
    assert heads_seen(live) == live.store.resolve("heads").digest
    assert usage["completion_tokens_details"] == predictions(SEED, 40)


def test_a_turbo_that_is_not_a_drafter_is_refused_by_field(live: Live) -> None:
    refused = error_of(live.post("/v1/completions", completion("sql")), 400)
    assert refused["param"] == "turbo"
    unknown = error_of(live.post("/v1/completions", completion("nobody")), 404)
    assert (unknown["param"], unknown["code"]) == ("turbo", "model_not_found")
    assert error_of(live.post("/v1/completions", completion(turbo=3)), 400)["param"] == "turbo"


def test_a_turbo_that_can_not_be_loaded_fails_its_request_with_the_remedy(live: Live) -> None:
    error = error_of(live.post("/v1/completions", completion("broken")), 424)
    assert error["code"] == "adapter_failed"
    assert "'broken'" in error["message"]
    assert 'turbo: "off"' in error["message"]
    text, _, _ = answer_of(live, completion("off"), stream=False)
    assert text == expected_text(SEED, 5, 40)


def test_with_turbo_off_by_setting_requests_draft_nothing(tmp_path: Path) -> None:
    Store(tmp_path).add("own", make_turbo(3.0, lora=True))
    with live_server(tmp_path, turbo=False) as live:
        _, _, usage = answer_of(live, completion(None, model="own"), stream=False)
        assert "completion_tokens_details" not in usage
        error = error_of(live.post("/v1/completions", completion("own")), 403)
        assert "QUICKCHANGE_TURBO" in error["message"]


def test_drafts_are_in_the_metrics_by_the_drafters_name(tmp_path: Path) -> None:
    Store(tmp_path).add("team/heads", make_turbo(2.0))
    with live_server(tmp_path) as live:
        for turbo in ("team/heads", "lookup"):
            live.post("/v1/completions", completion(turbo)).raise_for_status()
        scraped = live.http.get("/metrics").text
    samples = [s for f in text_string_to_metric_families(scraped) for s in f.samples]
    speculation = "quickchange_speculation_"

    def total(name: str, **labels: str) -> float:
        named = [s for s in samples if s.name == f"{speculation}{name}_total"]
        return sum(s.value for s in named if labels.items() <= s.labels.items())

    steps = steps_of(SEED, 40)
    for drafter in ("team/heads", "lookup"):
        assert total("drafted_tokens", adapter=drafter) == DRAFTS * len(steps)
        assert total("drafted_tokens", adapter=drafter, depth="2") == len(steps)
        accepted = sum(step >= 2 for step in steps[:-1])
        assert total("accepted_tokens", adapter=drafter, depth="2") - accepted in (0, 1)
    assert total("rows") == 2 * DRAFTS * len(steps)
    assert total("estimated_tokens") == DRAFTS * len(steps)
    assert total("gained_tokens") == 2 * predictions(SEED, 40)["accepted_prediction_tokens"]
    assert total("requests", drafter="heads+lookup") == total("requests", drafter="lookup") == 1


# --- administration -----------------------------------------------------------------------------


def test_an_alias_binds_a_turbo(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.add("sql", make_adapter(1.0))
    store.add("heads", make_turbo(2.0))
    with live_server(tmp_path) as live:
        pointed = live.http.put("/v1/aliases/prod", json={"target": "sql", "turbo": "heads@1"})
        alias = {"id": "prod", "object": "alias", "target": "sql", "turbo": "heads@1"}
        assert pointed.json() == alias
        assert live.http.get("/v1/aliases").json()["data"] == [alias]
        _, _, usage = answer_of(live, completion(None, model="prod"), stream=False)
        assert "completion_tokens_details" in usage
        wrong = live.http.put("/v1/aliases/prod", json={"target": "sql", "turbo": "sql"})
        assert "no Turbo heads" in error_of(wrong, 400)["message"]
        missing = live.http.put("/v1/aliases/prod", json={"target": "sql", "turbo": "nobody"})
        assert "nobody" in error_of(missing, 404)["message"]
        assert "prod" in error_of(live.http.delete("/v1/adapters/heads"), 409)["message"]
        live.http.put("/v1/aliases/prod", json={"target": "sql"}).raise_for_status()
        _, _, usage = answer_of(live, completion(None, model="prod"), stream=False)
        assert "completion_tokens_details" not in usage


def test_models_tell_what_drafts_for_them(live: Live) -> None:
    cards = {card["id"]: card for card in live.http.get("/v1/models").json()["data"]}
    bound = {name: card["quickchange"].get("turbo") for name, card in cards.items()}
    assert bound == {
        BASE: None,
        "broken": "broken@1",
        "broken@1": "broken@1",
        "fast": "heads@1",
        "heads": "heads@1",
        "heads@1": "heads@1",
        "own": "own@1",
        "own@1": "own@1",
        "sql": None,
        "sql@1": None,
    }
    for name, card in cards.items():
        assert live.http.get(f"/v1/models/{name}").json() == card


def test_a_turbo_lora_folder_is_added_from_a_path_and_shown_with_its_heads(
    tmp_path: Path,
) -> None:
    folder = write_medusa(write_peft(tmp_path / "both"))
    with live_server(tmp_path / "store") as live:
        added = live.post("/v1/adapters", {"name": "both", "path": str(folder)})
        assert added.status_code == 201, added.text
        (listed,) = live.http.get("/v1/adapters").json()["data"]
        shown = live.http.get("/v1/adapters/both").json()
    heads = {
        "depth": 2,
        "sequential": False,
        "vocabulary": None,
        "own_outputs": False,
        "parameters": 2 * (4 * 4 + 4),
        "medusa_1_ratio": round((4 * 4 + 258 * 4) / (4 * 4 + 4), 1),
    }
    assert listed["turbo"] == shown["turbo"] == heads
    assert shown["versions"][0]["turbo"] == heads
    assert shown["info"]["ranks"] == [1]


def test_an_older_version_is_shown_with_its_own_heads(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.add("both", make_turbo(1.0, lora=True, depth=3))
    store.add("both", make_adapter(1.0))
    with live_server(tmp_path) as live:
        shown = live.http.get("/v1/adapters/both@1").json()
        (listed,) = live.http.get("/v1/adapters").json()["data"]
    assert (shown["turbo"]["depth"], listed["turbo"]) == (3, None)
    assert [v["turbo"] is None for v in shown["versions"]] == [False, True]


@pytest.mark.parametrize("lora", [False, True])
def test_an_upload_may_hold_turbo_heads(tmp_path: Path, lora: bool) -> None:
    folder = write_medusa(tmp_path / "heads")
    if lora:
        for path in write_peft(tmp_path / "lora").iterdir():
            path.rename(folder / path.name)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    with live_server(tmp_path / "store") as live:
        response = live.http.post("/v1/adapters", data={"name": "fast"}, files=files)
        assert response.status_code == 201, response.text
        _, _, usage = answer_of(live, completion(None, model="fast"), stream=False)
        assert "completion_tokens_details" in usage


@pytest.mark.parametrize(
    "field", ["../config.json", "a/b.json", ".json", "adapter_model.bin", "x.safetensors\n", ""]
)
def test_an_upload_without_an_adapters_files_is_refused(live: Live, field: str) -> None:
    response = live.http.post("/v1/adapters", data={"name": "new"}, files=[(field, b"{}")])
    said = error_of(response, 400)["message"]
    if field == "adapter_model.bin":
        assert "adapter_model.bin: a pickle" in said
    else:
        assert "adapter_config.json" in said or "can't be taken" in said


def test_an_upload_with_text_in_place_of_a_file_is_refused(live: Live) -> None:
    form = {"config.json": (None, "{}"), "name": (None, "new")}
    response = live.http.post("/v1/adapters", files=form)
    assert error_of(response, 400)["message"]


def test_an_upload_with_a_file_twice_is_refused_by_its_name(live: Live, tmp_path: Path) -> None:
    config = (write_medusa(tmp_path / "heads") / "config.json").read_bytes()
    files = [("config.json", config), ("config.json", config)]
    response = live.http.post("/v1/adapters", data={"name": "new"}, files=files)
    assert error_of(response, 400)["param"] == "config.json"


def test_vllms_load_takes_turbo_heads(tmp_path: Path) -> None:
    folder = write_medusa(tmp_path / "heads")
    with live_server(tmp_path / "store") as live:
        body = {"lora_name": "heads", "lora_path": str(folder)}
        assert live.post("/v1/load_lora_adapter", body).status_code == 200
        _, _, usage = answer_of(live, completion("heads"), stream=False)
        assert "completion_tokens_details" in usage
