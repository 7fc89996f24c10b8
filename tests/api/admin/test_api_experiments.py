"""Experiments over HTTP: definitions, assignment, states, outcomes, results, promotion."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from http_support import BASE, Live, live_server, make_adapter, wait_until
from sqlalchemy import create_engine, text

COMPLETION = {"prompt": "Hello", "seed": 1, "max_tokens": 4}
A, B = {"name": "a", "model": BASE}, {"name": "b", "model": "sql"}
TWO = {"name": "tone", "variants": [A, B]}
ONLY_B = {**TWO, "variants": [{**A, "weight": 0}, B]}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with live_server(tmp_path_factory.mktemp("experiments")) as live:
        live.store.add("sql", make_adapter(1.0))
        live.store.add("json", make_adapter(2.0))
        yield live


@pytest.fixture
def live(shared: Live) -> Iterator[Live]:
    """The shared server without experiments and aliases."""
    yield shared
    for experiment in shared.http.get("/v1/experiments").json()["data"]:
        shared.http.delete(f"/v1/experiments/{experiment['id']}").raise_for_status()
    for alias in shared.store.aliases():
        shared.store.unalias(alias)


def created(live: Live, **changes: Any) -> Any:
    response = live.post("/v1/experiments", {**TWO, **changes})
    assert response.status_code == 201, response.text
    return response.json()


def patched(live: Live, **changes: Any) -> httpx.Response:
    return live.http.patch("/v1/experiments/tone", json=changes)


def done(live: Live, action: str, body: Any = None) -> Any:
    response = live.http.post(f"/v1/experiments/tone/{action}", json=body)
    assert response.status_code in (200, 201), response.text
    return response.json()


def asked(live: Live, headers: dict[str, str] | None = None, **changes: Any) -> httpx.Response:
    body = {**COMPLETION, "model": "tone", **changes}
    response = live.http.post("/v1/completions", json=body, headers=headers)
    assert response.status_code == 200, response.text
    return response


def variant_of(live: Live, user: str, **changes: Any) -> str:
    return asked(live, user=user, **changes).headers["x-quickchange-variant"]


def text_of(live: Live, model: str) -> str:
    body = {**COMPLETION, "model": model}
    return str(live.post("/v1/completions", body).json()["choices"][0]["text"])


def told(live: Live, **outcome: Any) -> httpx.Response:
    return live.post("/v1/experiments/tone/outcomes", outcome)


def refused(response: httpx.Response, status: int, param: str | None = None) -> str:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["param"] == param
    return str(error["message"])


USERS = [f"user-{number}" for number in range(24)]
FLAG = {"name": "ok", "kind": "flag"}
NUMBER = {"name": "stars", "kind": "number"}
LABEL = {"name": "mood", "kind": "label"}

# --- definitions --------------------------------------------------------------------------------


def test_an_experiment_is_created_shown_listed_and_deleted(live: Live) -> None:
    made = created(live, description="formal or not")
    assert (made["id"], made["state"], made["version"]) == ("tone", "running", 1)
    assert made["shares"] == {"a": 0.5, "b": 0.5}
    assert made["definition"]["description"] == "formal or not"
    assert live.http.get("/v1/experiments/tone").json() == made
    assert live.http.get("/v1/experiments").json()["data"] == [made]
    assert live.http.delete("/v1/experiments/tone").json()["deleted"] is True
    refused(live.http.get("/v1/experiments/tone"), 404, "name")


def test_models_lists_experiments(live: Live) -> None:
    created(live)
    cards = {card["id"]: card for card in live.http.get("/v1/models").json()["data"]}
    assert cards["tone"]["quickchange"] == {"kind": "experiment", "state": "running"}
    assert live.http.get("/v1/models/tone").json() == cards["tone"]


def test_a_name_may_have_segments(live: Live) -> None:
    created(live, name="team/tone")
    assert live.http.get("/v1/experiments/team/tone/results").json()["id"] == "team/tone"
    assert asked(live, model="team/tone").headers["x-quickchange-experiment"] == "team/tone"


@pytest.mark.parametrize("name", ["sql", "live", BASE, "tone"])
def test_a_taken_name_is_refused(live: Live, name: str) -> None:
    live.store.alias("live", "sql")
    created(live)
    refused(live.post("/v1/experiments", {**TWO, "name": name}), 409, "name")


def test_its_name_is_taken_for_adapters_and_aliases(live: Live, tmp_path: Path) -> None:
    created(live)
    put = live.http.put("/v1/aliases/tone", json={"target": "sql"})
    refused(put, 409, "name")
    added = live.post("/v1/adapters", {"name": "tone", "path": str(tmp_path)})
    refused(added, 409, "name")


def test_a_variant_that_names_nothing_is_refused_by_its_place(live: Live) -> None:
    body = {**TWO, "variants": [A, {"name": "b", "model": "sqll"}]}
    message = refused(live.post("/v1/experiments", body), 404, "variants[1].model")
    assert "sqll" in message
    wrong = [{"id": "nope"}]
    body = {**TWO, "shadows": [{"name": "s", "adapters": wrong}]}
    refused(live.post("/v1/experiments", body), 404, "shadows[0].adapters[0].id")


def test_a_body_that_is_wrong_is_refused_by_its_field(live: Live) -> None:
    refused(live.post("/v1/experiments", {"name": "tone"}), 400, "variants")
    created(live)
    refused(patched(live, weights={"c": 1}), 400, "weights")
    refused(patched(live, weights={"a": -1}), 400, "weights.a")
    refused(patched(live, allow={"u": "c"}), 400, "allow")
    refused(patched(live, alpha=0.1), 400, "alpha")
    patched(live, metrics=[FLAG])
    refused(patched(live, metrics=[{**FLAG, "kind": "label"}]), 400, "metrics")
    refused(live.post("/v1/experiments/tone/stop", {"winner": "c"}), 400, "winner")
    assert live.http.get("/v1/experiments/tone").json()["version"] == 2


@pytest.mark.parametrize("route", ["", "/results", "/audit"])
def test_an_unknown_experiment_is_404(live: Live, route: str) -> None:
    message = refused(live.http.get(f"/v1/experiments/nobody{route}"), 404, "name")
    assert "'nobody'" in message


# --- assignment ---------------------------------------------------------------------------------


def test_an_answer_tells_its_variant_and_is_what_the_variant_says(live: Live) -> None:
    created(live)
    texts = {"a": text_of(live, BASE), "b": text_of(live, "sql")}
    assert texts["a"] != texts["b"]
    seen = set()
    for user in USERS:
        response = asked(live, user=user)
        variant = response.headers["x-quickchange-variant"]
        body = response.json()
        assert body["quickchange"] == {"experiment": "tone", "variant": variant}
        assert body["model"] == "tone"
        assert body["choices"][0]["text"] == texts[variant]
        seen.add(variant)
    assert seen == {"a", "b"}


def test_a_stream_tells_its_variant(live: Live) -> None:
    created(live)
    events = live.events("/v1/completions", {**COMPLETION, "model": "tone", "user": "u"})
    assert events[0]["quickchange"]["experiment"] == "tone"


def test_chats_are_assigned_like_completions(live: Live) -> None:
    created(live)
    chat = {"model": "tone", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
    for user in USERS[:6]:
        response = live.post("/v1/chat/completions", {**chat, "user": user})
        assert response.headers["x-quickchange-variant"] == variant_of(live, user)


@pytest.mark.parametrize(
    ("sticky", "request_of"),
    [
        ({"by": "user"}, lambda who: {"user": who}),
        ({"by": "header", "name": "X-Session"}, lambda who: {"headers": {"x-session": who}}),
        ({"by": "field", "name": "account"}, lambda who: {"metadata": {"account": who}}),
    ],
)
def test_assignment_sticks(live: Live, sticky: Any, request_of: Any) -> None:
    created(live, sticky=sticky)
    rounds = [
        [asked(live, **request_of(user)).headers["x-quickchange-variant"] for user in USERS]
        for _ in range(2)
    ]
    assert rounds[0] == rounds[1]
    assert set(rounds[0]) == {"a", "b"}


def test_random_assignment_sticks_to_nothing(live: Live) -> None:
    created(live, sticky={"by": "random"})
    assert {variant_of(live, "u") for _ in range(40)} == {"a", "b"}


def test_a_request_without_a_subject_is_drawn(live: Live) -> None:
    created(live)
    assert {asked(live).headers["x-quickchange-variant"] for _ in range(40)} == {"a", "b"}


def test_moved_weights_hold_at_once_and_move_only_their_share(live: Live) -> None:
    created(live)
    before = {user: variant_of(live, user) for user in USERS}
    response = patched(live, weights={"a": 1, "b": 3})
    assert response.json()["shares"] == {"a": 0.25, "b": 0.75}
    after = {user: variant_of(live, user) for user in USERS}
    assert all(after[user] == "b" for user in USERS if before[user] == "b")
    patched(live, weights={"a": 1, "b": 1})
    assert {user: variant_of(live, user) for user in USERS} == before


def test_lists_come_before_chance(live: Live) -> None:
    created(live)
    patched(live, allow=dict.fromkeys(USERS[:4], "b"), deny=USERS[4:8])
    assert {variant_of(live, user) for user in USERS[:4]} == {"b"}
    assert {variant_of(live, user) for user in USERS[4:8]} == {"a"}


def test_a_variant_changes_sampling_and_length(live: Live) -> None:
    longer = {**B, "overrides": {"max_tokens": 7, "stop": ["\n"]}}
    created(live, variants=[{**A, "weight": 0}, longer])
    body = asked(live, max_tokens=2, min_tokens=1).json()
    assert body["usage"]["completion_tokens"] == 7


def test_a_composition_beside_an_experiment_is_refused(live: Live) -> None:
    created(live)
    body = {**COMPLETION, "model": "tone", "adapters": [{"id": "sql"}]}
    refused(live.post("/v1/completions", body), 400, "adapters")


def test_a_variant_that_went_away_is_424_and_names_nothing(live: Live) -> None:
    live.store.add("gone", make_adapter(3.0))
    created(live, variants=[{**A, "weight": 0}, {"name": "b", "model": "gone"}])
    live.http.delete("/v1/adapters/gone").raise_for_status()
    response = live.post("/v1/completions", {**COMPLETION, "model": "tone"})
    assert "gone" not in refused(response, 424, "model")


def test_requests_for_a_variant_that_went_away_are_counted_as_refused(live: Live) -> None:
    live.store.add("gone", make_adapter(3.0))
    gone = {"name": "b", "model": "gone"}
    created(live, name="broken", variants=[{**A, "weight": 0}, gone], shadows=[])
    live.http.delete("/v1/adapters/gone").raise_for_status()
    live.post("/v1/completions", {**COMPLETION, "model": "broken"})
    line = (
        'quickchange_experiment_requests_total{experiment="broken",outcome="refused",variant="b"}'
    )
    assert f"{line} 1.0" in live.http.get("/metrics").text.splitlines()
    assert live.http.get("/v1/experiments/broken/results").json()["requests"] == {}


def test_the_weight_of_a_variant_that_went_away_can_be_taken_away(live: Live) -> None:
    live.store.add("gone", make_adapter(3.0))
    created(live, variants=[A, {"name": "b", "model": "gone"}])
    live.http.delete("/v1/adapters/gone").raise_for_status()
    assert patched(live, weights={"b": 0}).json()["shares"]["a"] == 1.0
    assert {variant_of(live, user) for user in USERS[:8]} == {"a"}
    more = [A, {"name": "b", "model": "gone", "weight": 0}, {"name": "c", "model": "gone"}]
    refused(patched(live, variants=more), 404, "variants[2].model")


def test_a_ramp_follows_the_clock(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    now = live.services.experiments.clock()
    clock = [now]
    monkeypatch.setattr(live.services.experiments, "clock", lambda: clock[0])
    created(live, ramp=[{"after": 60, "weights": {"b": 1}}])
    assert {variant_of(live, user) for user in USERS[:6]} == {"a"}
    clock[0] = now + 61
    assert {variant_of(live, user) for user in USERS[:6]} == {"b"}


# --- states -------------------------------------------------------------------------------------


def test_pause_gives_the_control_and_resume_gives_everybody_theirs(live: Live) -> None:
    created(live)
    before = {user: variant_of(live, user) for user in USERS}
    assert done(live, "pause")["state"] == "paused"
    assert {variant_of(live, user) for user in USERS[:8]} == {"a"}
    assert done(live, "resume")["state"] == "running"
    assert {user: variant_of(live, user) for user in USERS} == before


def test_stop_gives_the_winner_and_can_not_be_undone(live: Live) -> None:
    created(live)
    assert done(live, "stop", {"winner": "b"})["winner"] == "b"
    assert {variant_of(live, user) for user in USERS[:8]} == {"b"}
    refused(live.http.post("/v1/experiments/tone/resume"), 409, "name")
    refused(patched(live, weights={"a": 2}), 409, "name")


def test_an_update_of_another_version_is_refused(live: Live) -> None:
    created(live)
    assert patched(live, version=1, weights={"b": 3}).json()["version"] == 2
    refused(patched(live, version=1, weights={"b": 5}), 409, "version")


def test_of_updates_at_once_of_one_version_one_wins(live: Live) -> None:
    created(live)
    with ThreadPoolExecutor(8) as threads:
        update = partial(patched, live, version=1)
        answers = list(threads.map(lambda w: update(weights={"b": w}), range(1, 9)))
    assert sorted(answer.status_code for answer in answers) == [200] + [409] * 7
    (won,) = (n for n, answer in enumerate(answers, start=1) if answer.status_code == 200)
    assert live.http.get("/v1/experiments/tone").json()["shares"]["b"] == pytest.approx(
        won / (won + 1)
    )


def test_updates_at_once_are_all_in_the_end_result(live: Live) -> None:
    created(live)
    changes = [{"allow": {"u": "b"}}, {"deny": ["v"]}, {"metrics": [FLAG]}, {"weights": {"b": 3}}]
    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(lambda change: patched(live, **change), changes))
    assert all(answer.is_success for answer in answers)
    shown = live.http.get("/v1/experiments/tone").json()
    assert shown["version"] == 5
    assert shown["shares"]["b"] == 0.75
    definition = shown["definition"]
    assert (definition["allow"], definition["deny"]) == ({"u": "b"}, ["v"])
    assert definition["metrics"][0]["name"] == "ok"


def test_the_audit_trail_has_every_change_and_outlives_the_experiment(live: Live) -> None:
    created(live, name="audited")
    live.http.patch("/v1/experiments/audited", json={"weights": {"b": 3}}).raise_for_status()
    live.http.delete("/v1/experiments/audited").raise_for_status()
    entries = live.http.get("/v1/experiments/audited/audit").json()["data"]
    assert [entry["action"] for entry in entries] == ["delete", "update", "create"]
    update = entries[1]
    weights = [
        [v["weight"] for v in update[side]["definition"]["variants"]]
        for side in ("before", "after")
    ]
    assert weights == [[1.0, 1.0], [1.0, 3.0]]
    assert update["tenant"] == "default"
    assert entries[2]["before"] is None


# --- outcomes and results -----------------------------------------------------------------------


def test_outcomes_by_completion_and_by_unit_reach_the_results(live: Live) -> None:
    created(live, metrics=[FLAG, NUMBER, LABEL])
    for number, user in enumerate(USERS):
        completion = asked(live, user=user).json()["id"]
        assert told(live, completion=completion, name="ok", value=number % 2 == 0).is_success
        assert told(live, unit=user, name="stars", value=number).is_success
        assert told(live, unit=user, name="mood", value="glad" if number % 3 else "sad").is_success
    variants = {user: variant_of(live, user) for user in USERS}
    counts = Counter(variants.values())
    results = live.http.get("/v1/experiments/tone/results").json()
    by_name = {(o["name"], o["label"]): o["variants"] for o in results["outcomes"]}
    assert set(by_name) == {("ok", None), ("stars", None), ("mood", "glad"), ("mood", "sad")}
    for place, variant in enumerate("ab"):
        mine = [n for n, user in enumerate(USERS) if variants[user] == variant]
        expected = {
            ("ok", None): sum(n % 2 == 0 for n in mine),
            ("stars", None): sum(mine),
            ("mood", "glad"): sum(n % 3 > 0 for n in mine),
            ("mood", "sad"): sum(n % 3 == 0 for n in mine),
        }
        for key, total in expected.items():
            found = by_name[key][place]
            assert (found["variant"], found["count"]) == (variant, counts[variant])
            assert found["mean"] == pytest.approx(total / counts[variant])
    assert results["ratio"]["observed"] == {"a": counts["a"], "b": counts["b"]}
    assert results["requests"]["a"] == {"length": 2 * counts["a"]}


def test_automatic_measures_need_no_outcomes(live: Live) -> None:
    created(live)
    for user in USERS[:8]:
        asked(live, user=user)
    results = live.http.get("/v1/experiments/tone/results").json()
    measured = {o["name"]: o["variants"] for o in results["automatic"]}
    assert set(measured) == {
        "latency", "first_token", "tokens", "accepted_per_step",
        "stop", "length", "cancelled", "failed",
    }  # fmt: skip
    for variant in measured["tokens"]:
        assert variant["mean"] == (4 if variant["count"] else None)
    assert all(v["mean"] in (1.0, None) for v in measured["length"])
    assert sum(v["count"] for v in measured["latency"]) == 8


def test_results_of_a_new_experiment_have_every_place(live: Live) -> None:
    created(live, metrics=[FLAG])
    results = live.http.get("/v1/experiments/tone/results").json()
    (outcome,) = results["outcomes"]
    assert [v["count"] for v in outcome["variants"]] == [0, 0]
    assert outcome["comparisons"][0]["decision"] == "keep collecting"
    assert (results["control"], results["alpha"], results["state"]) == ("a", 0.05, "running")


def test_a_unit_counts_once_with_its_mean(live: Live) -> None:
    created(live, variants=ONLY_B["variants"], metrics=[NUMBER])
    for value in (1, 2, 6):
        completion = asked(live, user="one").json()["id"]
        told(live, completion=completion, name="stars", value=value).raise_for_status()
    asked(live, user="other")
    told(live, unit="other", name="stars", value=5).raise_for_status()
    (outcome,) = live.http.get("/v1/experiments/tone/results").json()["outcomes"]
    assert outcome["variants"][1]["count"] == 2
    assert outcome["variants"][1]["mean"] == 4.0


def test_units_without_an_outcome_count_where_asked_for(live: Live) -> None:
    created(live, variants=ONLY_B["variants"], metrics=[{**FLAG, "missing": 0}])
    for user in USERS[:4]:
        asked(live, user=user)
    told(live, unit=USERS[0], name="ok", value=True).raise_for_status()
    (outcome,) = live.http.get("/v1/experiments/tone/results").json()["outcomes"]
    assert (outcome["variants"][1]["count"], outcome["variants"][1]["mean"]) == (4, 0.25)


def test_listed_and_paused_requests_do_not_count(live: Live) -> None:
    created(live, metrics=[FLAG], allow={"vip": "b"})
    completion = asked(live, user="vip").json()["id"]
    kept = told(live, completion=completion, name="ok", value=True).json()["data"]
    assert [(each["variant"], each["counted"]) for each in kept] == [("b", False)]
    done(live, "pause")
    asked(live, user="u")
    results = live.http.get("/v1/experiments/tone/results").json()
    assert results["ratio"]["observed"] == {"a": 0, "b": 0}
    assert [v["count"] for v in results["outcomes"][0]["variants"]] == [0, 0]


def test_an_outcome_of_something_unknown_is_404_and_nothing_is_kept(live: Live) -> None:
    created(live, metrics=[FLAG])
    completion = asked(live).json()["id"]
    known = {"completion": completion, "name": "ok", "value": True}
    body = {"outcomes": [known, {**known, "completion": "cmpl-nope"}]}
    response = live.post("/v1/experiments/tone/outcomes", body)
    assert "cmpl-nope" in refused(response, 404, "outcomes[1].completion")
    refused(told(live, unit="nobody", name="ok", value=True), 404, "outcomes[0].unit")
    (outcome,) = live.http.get("/v1/experiments/tone/results").json()["outcomes"]
    assert sum(v["count"] for v in outcome["variants"]) == 0


@pytest.mark.parametrize(
    ("outcome", "param"),
    [
        ({"name": "ok", "value": 1}, "outcomes[0].value"),
        ({"name": "stars", "value": True}, "outcomes[0].value"),
        ({"name": "mood", "value": 1}, "outcomes[0].value"),
        ({"name": "mood", "value": "two words"}, "outcomes[0].value"),
        ({"name": "stars", "value": [1]}, "value"),
        ({"name": "unheard", "value": 1}, "outcomes[0].name"),
        ({"name": "ok"}, "value"),
        ({"name": "ok", "value": True, "unit": "u"}, "completion"),
    ],
)
def test_an_outcome_that_is_wrong_is_400_by_its_field(
    live: Live, outcome: dict[str, Any], param: str
) -> None:
    created(live, metrics=[FLAG, NUMBER, LABEL])
    completion = asked(live).json()["id"]
    refused(told(live, completion=completion, **outcome), 400, param)


def test_an_idempotency_key_keeps_an_outcome_once(live: Live) -> None:
    created(live, metrics=[NUMBER])
    completion = asked(live, user="u").json()["id"]
    outcome = {"completion": completion, "name": "stars", "idempotency_key": "k"}
    first = told(live, **outcome, value=1).json()["data"][0]
    again = told(live, **outcome, value=5).json()["data"][0]
    assert (first["new"], again["new"]) == (True, False)
    (found,) = live.http.get("/v1/experiments/tone/results").json()["outcomes"]
    assert max(v["mean"] or 0 for v in found["variants"]) == 1.0


def test_an_acknowledged_outcome_is_in_the_database(live: Live) -> None:
    created(live, metrics=[FLAG])
    completion = asked(live).json()["id"]
    told(live, completion=completion, name="ok", value=True).raise_for_status()
    engine = create_engine(live.services.settings.database_url)
    with engine.connect() as connection:
        query = text("SELECT name, value FROM experiment_outcomes WHERE completion = :id")
        rows = connection.execute(query, {"id": completion}).all()
    engine.dispose()
    assert rows == [("ok", 1.0)]


def test_a_deleted_experiment_leaves_no_records(live: Live) -> None:
    created(live, metrics=[FLAG])
    asked(live, user="u")
    live.http.delete("/v1/experiments/tone").raise_for_status()
    created(live, metrics=[FLAG])
    assert live.http.get("/v1/experiments/tone/results").json()["requests"] == {}
    refused(told(live, unit="u", name="ok", value=True), 404, "outcomes[0].unit")


def test_metrics_tell_of_requests_and_outcomes(live: Live) -> None:
    created(live, name="counted", variants=ONLY_B["variants"], metrics=[FLAG])
    completion = asked(live, model="counted").json()["id"]
    body = {"completion": completion, "name": "ok", "value": True}
    live.post("/v1/experiments/counted/outcomes", body).raise_for_status()
    lines = live.http.get("/metrics").text.splitlines()
    family, of = "quickchange_experiment", 'experiment="counted"'
    assert f'{family}_requests_total{{{of},outcome="length",variant="b"}} 1.0' in lines
    assert f'{family}_tokens_total{{{of},variant="b"}} 4.0' in lines
    assert f'{family}_request_seconds_count{{{of},variant="b"}} 1.0' in lines
    assert f'{family}_first_token_seconds_count{{{of},variant="b"}} 1.0' in lines
    assert f'{family}_outcomes_total{{{of},name="ok",variant="b"}} 1.0' in lines


# --- promotion ----------------------------------------------------------------------------------


def test_promote_moves_the_alias_and_rollback_restores_it(live: Live) -> None:
    live.store.alias("live", "json")
    created(live, alias="live")
    moved = done(live, "promote", {"variant": "b"})
    assert moved["before"] == {"target": "json", "turbo": None}
    assert moved["after"] == {"target": "sql", "turbo": None}
    assert text_of(live, "live") == text_of(live, "sql")
    assert done(live, "rollback")["after"] == {"target": "json", "turbo": None}
    assert text_of(live, "live") == text_of(live, "json")
    refused(live.http.post("/v1/experiments/tone/rollback"), 409, "name")


def test_rollback_of_a_first_promotion_removes_the_alias(live: Live) -> None:
    created(live, alias="live")
    done(live, "promote", {"variant": "b"})
    done(live, "rollback")
    assert live.store.aliases() == {}


def test_a_promotion_that_is_sent_again_is_undone_by_one_rollback(live: Live) -> None:
    live.store.alias("live", "json")
    created(live, alias="live")
    done(live, "promote", {"variant": "b"})
    again = done(live, "promote", {"variant": "b"})
    assert again["after"] == {"target": "sql", "turbo": None}
    done(live, "rollback")
    assert str(live.store.aliases()["live"]) == "json"
    assert live.http.get("/v1/experiments/tone").json()["promoted"] is None


def test_promotions_are_undone_one_by_one(live: Live) -> None:
    variants = [{"name": "a", "model": "json"}, B]
    created(live, variants=variants, alias="live")
    done(live, "promote", {"variant": "a"})
    done(live, "promote", {"variant": "b"})
    assert str(live.store.aliases()["live"]) == "sql"
    done(live, "rollback")
    assert str(live.store.aliases()["live"]) == "json"


def test_the_audit_trail_has_both_ends_of_a_move(live: Live) -> None:
    live.store.alias("live", "json")
    created(live, alias="live")
    done(live, "promote", {"variant": "b"})
    done(live, "rollback")
    entries = live.http.get("/v1/experiments/tone/audit").json()["data"][:2]
    assert [entry["action"] for entry in entries] == ["rollback", "promote"]
    (promotion,) = entries[1]["after"]["promotions"]
    assert (promotion["variant"], promotion["alias"]) == ("b", "live")
    assert promotion["before"] == {"target": "json", "turbo": None}


def test_what_an_alias_can_not_carry_is_told(live: Live) -> None:
    warm = {**B, "turbo": "off", "overrides": {"temperature": 0.5}}
    created(live, variants=[A, warm], alias="live")
    moved = done(live, "promote", {"variant": "b"})
    assert moved["not_carried"] == ["overrides", "turbo"]


@pytest.mark.parametrize(
    ("changes", "variant", "param"),
    [({}, "b", "alias"), ({"alias": "live"}, "a", "variant"), ({"alias": "live"}, "c", "variant")],
)
def test_a_promotion_that_can_not_be_is_refused(
    live: Live, changes: dict[str, Any], variant: str, param: str
) -> None:
    created(live, **changes)
    body = {"variant": variant}
    refused(live.post("/v1/experiments/tone/promote", body), 400, param)
    assert live.http.get("/v1/experiments/tone").json()["promoted"] is None


def test_a_promotion_that_the_store_refuses_changes_nothing(live: Live) -> None:
    created(live, alias="json")  # an adapter's name
    refused(live.post("/v1/experiments/tone/promote", {"variant": "b"}), 409, None)
    assert live.http.get("/v1/experiments/tone").json()["promoted"] is None


# --- replicas -----------------------------------------------------------------------------------


def test_two_servers_on_one_database_see_each_others_changes(live: Live, tmp_path: Path) -> None:
    url = live.services.settings.database_url
    with live_server(tmp_path / "other", database=url) as other:
        other.store.add("sql", make_adapter(1.0))
        created(live)
        wait_until(lambda: other.http.get("/v1/experiments/tone").status_code == 200)
        assert {u: variant_of(other, u) for u in USERS[:8]} == {
            u: variant_of(live, u) for u in USERS[:8]
        }
        other.http.patch("/v1/experiments/tone", json={"weights": {"a": 0}}).raise_for_status()
        wait_until(lambda: live.http.get("/v1/experiments/tone").json()["shares"]["b"] == 1.0)
        live.http.post("/v1/experiments/tone/pause").raise_for_status()
        state = lambda: other.http.get("/v1/experiments/tone").json()["state"]  # noqa: E731
        wait_until(lambda: state() == "paused")


def test_experiments_outlive_the_server(tmp_path: Path) -> None:
    with live_server(tmp_path) as first:
        first.store.add("sql", make_adapter(1.0))
        created(first)
        before = {user: variant_of(first, user) for user in USERS[:8]}
    with live_server(tmp_path) as second:
        assert {user: variant_of(second, user) for user in USERS[:8]} == before
