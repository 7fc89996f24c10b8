"""Every number that the OpenAPI document lets a client send, at its extremes, to a real engine.

Each is answered, or refused as the client's fault; the engine goes on, and its sound requests give
what they gave before.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from classifier_models import classifier
from fuzz_support import document
from http_support import Live
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from keys_support import created, keyed_server
from llm_models import make_llm_models
from real_engine import with_real_engine
from thorough import drawn

from quickchange_server.experiments.definition import OVERRIDABLE
from quickchange_server.protocol import _RANGES, SamplingParams

EVERY = "[]"  # in a path: each item of a list
ANY = "{}"  # in a path: each value of an object
EXTREMES = (
    *("9223372036854775807", "9223372036854775808", "-9223372036854775808", "-9223372036854775809"),
    *("18446744073709551615", "18446744073709551616", "2147483647", "2147483648", "-2147483649"),
    *("9007199254740993", "1" + "0" * 400, "-1" + "0" * 400, "9" * 5000),
    *("1e400", "-1e400", "1e308", "-1e308", "1e-45", "5e-324", "-0.0", "0", "1", "-1", "0.5"),
    *("NaN", "Infinity", "-Infinity", "true", "null", '"1"', "[]", "{}"),
)
HELLO = {"model": "base", "prompt": "Hello", "max_tokens": 2, "temperature": 0}
VARIANTS = [{"name": "now", "model": "base"}, {"name": "tuned", "model": "sql"}]
TARGETS = [{"modelRewrite": name, "weight": 1} for name in ("base", "sql")]
OUTCOME = {"name": "liked", "unit": "someone"}
RAMP = {"at": 2e9, "share": 0.5}
WHOLE: dict[str, dict[str, Any]] = {  # a sound body of each operation whose numbers are sent
    "POST /v1/completions": HELLO,
    "POST /v1/chat/completions": {
        **{"model": "base", "max_tokens": 2, "logprobs": True},
        "messages": [{"role": "user", "content": "Hello"}],
    },
    "POST /v1/completions/render": HELLO,
    "POST /v1/chat/completions/render": {
        **{"model": "base", "max_tokens": 2, "logprobs": True},
        "messages": [{"role": "user", "content": "Hello"}],
    },
    "POST /v1/messages/render": {
        **{"model": "base", "max_tokens": 2},
        "messages": [{"role": "user", "content": "Hello"}],
    },
    "POST /v1/responses/render": {"model": "base", "input": "Hello", "max_output_tokens": 2},
    "POST /v1/responses": {"model": "base", "input": "Hello", "max_output_tokens": 2},
    "POST /v1/messages": {
        **{"model": "base", "max_tokens": 2},
        "messages": [{"role": "user", "content": "Hello"}],
    },
    "POST /v1/messages/count_tokens": {
        "model": "base",
        "messages": [{"role": "user", "content": "Hello"}],
    },
    "POST /v1/embeddings": {"model": "base", "input": "Hello"},
    "POST /embed": {"inputs": "Hello"},
    "POST /pooling": {"model": "base", "input": "Hello"},
    "POST /classify": {"model": "kinds", "input": "Hello"},
    "POST /score": {"model": "base", "text_1": "Hello", "text_2": "you"},
    "POST /rerank": {"model": "base", "query": "Hello", "documents": ["you"]},
    "POST /detokenize": {"model": "base", "tokens": [1, 2]},
    "POST /v1/experiments": {"name": "made", "variants": VARIANTS, "metrics": [{"name": "liked"}]},
    "PATCH /v1/experiments/{name}": {},
    "POST /v1/model-rewrites": {
        "spec": {"rules": [{"matches": [{"model": {"value": "split"}}], "targets": TARGETS}]}
    },
    "POST /v1/experiments/{name}/outcomes": OUTCOME | {"value": 1},
    "POST /v1/adapters": {"name": "summed", "adapters": [{"id": "sql"}]},
    "POST /v1/adapters/{name}/rollback": {"version": 1},
    "POST /v1/keys": {"tenant": "t", "names": ["*"]},
    "PATCH /v1/keys/{id}": {},
    "POST /v1/keys/{id}/rotate": {},
    **{
        f"POST {path}": {"inputs": "Hello", "parameters": {"max_new_tokens": 2}}
        for path in ("/generate", "/generate_stream", "/invocations", "/")
    },
}
# what an item of a list needs beside the number that is put into it
ITEMS: dict[str, Any] = {
    "adapters": {"id": "sql"},
    "variants": VARIANTS[1],
    "shadows": {**VARIANTS[1], "name": "shadow"},
    "metrics": {"name": "liked"},
    "ramp": RAMP,
    "rules": {"targets": TARGETS},
    "targets": TARGETS[1],
    "outcomes": OUTCOME,
    "merged_adapters": {"ids": ["sql", "orders"], "merge_strategy": "linear", "weights": [1, 1]},
}


@dataclass(frozen=True)
class Number:
    """A number of a request body: the operation's method and path, and where it stands."""

    method: str
    path: str
    where: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.method} {self.path} {'.'.join(self.where)}"

    @property
    def operation(self) -> str:
        return f"{self.method} {self.path}"


def numbers(openapi: dict[str, Any]) -> Iterator[Number]:
    """Each number of each JSON body; of routes that take the same body, the first one's."""
    seen = set()
    for path, operations in openapi["paths"].items():
        for method, operation in operations.items():
            content = operation.get("requestBody", {}).get("content", {})
            schema = content.get("application/json", {}).get("schema", {})
            if json.dumps(schema) not in seen:
                for where in sorted(set(_numbers(openapi, schema, (), ()))):
                    yield Number(method.upper(), path, where)
            seen.add(json.dumps(schema))


def _numbers(
    openapi: dict[str, Any], schema: dict[str, Any], where: tuple[str, ...], seen: tuple[str, ...]
) -> Iterator[tuple[str, ...]]:
    reference = schema.get("$ref")
    if reference is not None:
        if reference not in seen:
            named = openapi["components"]["schemas"][reference.rsplit("/", 1)[1]]
            yield from _numbers(openapi, named, where, (*seen, reference))
        return
    if {"integer", "number"} & set(_types(schema)):
        yield where
    for branch in (*schema.get("anyOf", ()), *schema.get("oneOf", ()), *schema.get("allOf", ())):
        yield from _numbers(openapi, branch, where, seen)
    below = dict(schema.get("properties", {}))
    if isinstance(schema.get("additionalProperties"), dict):
        below[ANY] = schema["additionalProperties"]
    if isinstance(schema.get("items"), dict):
        below[EVERY] = schema["items"]
    for name, part in below.items():
        yield from _numbers(openapi, part, (*where, name), seen)


def _types(schema: dict[str, Any]) -> list[str]:
    kind = schema.get("type", [])
    return kind if isinstance(kind, list) else [kind]


NUMBERS = list(numbers(document()))
KEYS: list[str] = []  # public ids of those that the fixture makes
EXPERIMENTS = next(number for number in NUMBERS if number.operation == "POST /v1/experiments")
SAMPLING = [number for number in NUMBERS if number.path == "/v1/completions"]


def put(body: Any, where: tuple[str, ...], value: Any, owner: str = "") -> Any:
    """The body with the value at that place; what lies between is made."""
    if not where:
        return value
    step, rest = where[0], where[1:]
    if step == EVERY:
        old = body[0] if isinstance(body, list) and body else ITEMS.get(owner, {})
        return [put(old, rest, value), *(body[1:] if isinstance(body, list) else ())]
    made = dict(body) if isinstance(body, dict) else {}
    name = {"logit_bias": "5", "weights": "tuned"}.get(owner, "x") if step == ANY else step
    made[name] = put(made.get(name, ITEMS.get(name)), rest, value, owner=name)
    return made


def raw(body: Any, literals: dict[str, str]) -> bytes:
    """The body's JSON, each placeholder replaced by its literal."""
    text = json.dumps(body)
    for name, literal in literals.items():
        text = text.replace(json.dumps(name), literal)
    return text.encode()


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server with a real engine, two adapters, an experiment and keys."""
    folder = tmp_path_factory.mktemp("extremes")
    models = make_llm_models(folder)
    model = str(models.path)
    with keyed_server(
        folder / "store", **with_real_engine(model, kv_cache_bytes=16 << 20)
    ) as server:
        for name, path in models.adapters.items():
            added = server.post("/v1/adapters", {"name": name, "path": str(path)})
            assert added.status_code == 201, added.text
        sql = server.store.load(server.store.resolve("sql").digest)
        server.store.add("kinds", classifier(sql, 3, hidden=server.services.engine.hidden_size))
        made = server.post("/v1/experiments", {**WHOLE["POST /v1/experiments"], "name": "trial"})
        assert made.status_code == 201, made.text
        answered = server.post("/v1/completions", {**HELLO, "model": "trial", "user": "someone"})
        assert answered.status_code == 200, answered.text
        KEYS.append(created(server)[0])
        yield server


def send(live: Live, number: Number, body: bytes) -> httpx.Response:
    named = "trial" if "experiments" in number.path else "sql"
    path = number.path.format(name=named, id=KEYS[-1])
    headers = {"Content-Type": "application/json"}
    return live.http.request(number.method, path, content=body, headers=headers)


@pytest.mark.parametrize("operation", sorted({number.operation for number in NUMBERS}))
def test_the_sound_body_of_an_operation_is_accepted(operation: str, live: Live) -> None:
    number = next(number for number in NUMBERS if number.operation == operation)
    response = send(live, number, json.dumps(WHOLE[operation]).encode())
    assert response.status_code < 300, spoken(response)


def restarts(live: Live) -> float:
    """quickchange_engine_restarts_total."""
    value = live.services.metrics.registry.get_sample_value("quickchange_engine_restarts_total")
    assert value is not None
    return value


def spoken(response: httpx.Response) -> str:
    return f"{response.status_code} {response.text[:300]}"


@pytest.mark.parametrize("number", NUMBERS, ids=str)
def test_an_extreme_number_is_answered_or_refused_as_the_clients_fault(
    number: Number, live: Live
) -> None:
    whole = WHOLE[number.operation]
    for literal in EXTREMES:
        response = send(live, number, raw(put(whole, number.where, "@"), {"@": literal}))
        right = response.status_code < 424 and "NaN" not in response.text
        assert right, f"{literal[:40]}: {spoken(response)}"
    assert live.post("/v1/completions", HELLO).status_code == 200
    assert restarts(live) == 0


@drawn(80, 400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    chosen=st.dictionaries(
        st.sampled_from(SAMPLING), st.sampled_from(EXTREMES), min_size=2, max_size=6
    )
)
def test_extreme_numbers_together_are_answered_or_refused_as_the_clients_fault(
    chosen: dict[Number, str], live: Live
) -> None:
    body: Any = HELLO
    for index, number in enumerate(chosen):
        body = put(body, number.where, f"@{index}")
    literals = {f"@{index}": literal for index, literal in enumerate(chosen.values())}
    response = send(live, SAMPLING[0], raw(body, literals))
    assert response.status_code < 424, f"{body}: {spoken(response)}"
    assert restarts(live) == 0


@pytest.mark.parametrize("name", ["stop_token_ids", "prompt"])
def test_a_huge_list_of_numbers_is_answered_or_refused_as_the_clients_fault(
    name: str, live: Live
) -> None:
    response = live.post("/v1/completions", {**HELLO, name: [1] * 500_000})
    assert response.status_code < 424, spoken(response)
    assert restarts(live) == 0


def test_an_override_of_an_experiment_is_bounded_as_a_requests_field_is(live: Live) -> None:
    for field in sorted(set(OVERRIDABLE) & {number.where[0] for number in SAMPLING}):
        for literal in EXTREMES:
            variants = [VARIANTS[0], {**VARIANTS[1], "overrides": {field: "@"}}]
            made = {**WHOLE["POST /v1/experiments"], "variants": variants, "name": "overriding"}
            response = send(live, EXPERIMENTS, raw(made, {"@": literal}))
            assert response.status_code < 424, f"{field} {literal[:40]}: {spoken(response)}"
            if response.status_code == 201:
                for user in range(4):  # both variants
                    asked = {**HELLO, "model": "overriding", "user": str(user)}
                    answer = live.post("/v1/completions", asked)
                    assert answer.status_code < 424, f"{field} {literal[:40]}: {spoken(answer)}"
                live.http.delete("/v1/experiments/overriding")
    assert restarts(live) == 0


@pytest.mark.parametrize("query", ["limit"])
def test_an_extreme_number_in_a_query_is_answered_or_refused(query: str, live: Live) -> None:
    for literal in EXTREMES:
        response = live.http.get("/v1/experiments/trial/audit", params={query: literal})
        assert response.status_code < 424, f"{literal[:40]}: {spoken(response)}"


@pytest.mark.parametrize(
    ("off", "value"),
    [("top_k", 2**63 - 1), ("top_k", 2**31), ("top_k", -1), ("min_p", 5e-324), ("top_p", 1.0)],
)
def test_a_number_that_switches_a_filter_off_changes_no_token(
    off: str, value: float, live: Live
) -> None:
    drawn = {**HELLO, "temperature": 1.0, "seed": 5, "max_tokens": 12, "ignore_eos": True}
    plain = live.post("/v1/completions", drawn).json()["choices"]
    assert live.post("/v1/completions", {**drawn, off: value}).json()["choices"] == plain


@pytest.mark.parametrize(
    ("narrow", "value"),
    [("temperature", 1e-45), ("top_p", 1e-45), ("top_p", 5e-324), ("typical_p", 5e-324)],
)
def test_the_smallest_number_of_a_filter_leaves_tokens_to_draw(
    narrow: str, value: float, live: Live
) -> None:
    drawn = {**HELLO, "temperature": 1.0, "seed": 5, narrow: value}
    assert live.post("/v1/completions", drawn).status_code == 200


@given(
    field=st.sampled_from(sorted(_RANGES)),
    value=st.one_of(st.floats(), st.integers(-(2**70), 2**70), st.just(10**400)),
)
def test_sampling_parameters_keep_a_number_in_its_range_or_name_its_field(
    field: str, value: float
) -> None:
    problem = None
    try:
        kept = getattr(SamplingParams(**{"max_tokens": None, field: value}), field)
    except ValueError as error:
        problem = str(error)
    if problem is None:
        assert kept == value or (field == "top_k" and kept == max(0, min(value, 2**31 - 1)))
    else:
        assert problem.startswith(f"{field}: ")
