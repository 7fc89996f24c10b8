"""LoRAX's routes: what is answered, over the fake engine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_engine import Behaviour, logprob_at
from http_support import BASE, Live, expected_text, live_server, make_adapter, make_turbo
from text_support import START, byte_text

from quickchange_server.api.lorax.requests import GenerateRequest, Parameters
from quickchange_server.api.lorax.translation import completion
from quickchange_server.api.openai.text_constraints import asked
from quickchange_server.frontend.request_admission import choice_seed
from quickchange_server.protocol import Component
from quickchange_store.store import Store

PROMPT = "Hello"


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("lorax")
    store = Store(folder)
    store.add("team/sql", make_adapter(1.0))
    store.add("json", make_adapter(2.0))
    store.add("quick", make_turbo(3.0, lora=True))
    with live_server(folder, Behaviour(sure=False)) as live:
        yield live


def generate(live: Live, **parameters: Any) -> dict[str, Any]:
    body = {"inputs": PROMPT, "parameters": {"seed": 3, "max_new_tokens": 6, **parameters}}
    response = live.post("/generate", body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def digest(live: Live, name: str) -> str:
    return live.store.resolve(name).digest


# --- the whole answer ---------------------------------------------------------------------------


def test_without_details_the_answer_is_the_text_alone(live: Live) -> None:
    assert generate(live) == {"generated_text": expected_text(3, 5, 6)}


def test_details_tell_every_token_with_its_text_and_logprob(live: Live) -> None:
    text = expected_text(3, 5, 6)
    answer = generate(live, details=True, temperature=0.5)
    details = answer["details"]
    assert answer["generated_text"] == text
    tokens = [
        {
            "id": ord(character),
            "text": character,
            "logprob": logprob_at(5 + place, ord(character)),
            "special": False,
            "skipped": False,
        }
        for place, character in enumerate(text)
    ]
    assert details == {
        "finish_reason": "length",
        "prompt_tokens": 5,
        "generated_tokens": 6,
        "skipped_tokens": 0,
        "seed": 3,
        "prefill": [],
        "tokens": tokens,
    }


def test_parameters_may_be_left_out_and_then_the_context_is_filled(tmp_path: Path) -> None:
    with live_server(tmp_path, max_model_len=32, seed=1) as live:
        answer = live.post("/generate", {"inputs": PROMPT}).json()
    assert len(answer["generated_text"]) == 27


def test_the_compatible_route_wraps_the_answer_in_a_list(live: Live) -> None:
    body = {"inputs": PROMPT, "parameters": {"seed": 3, "max_new_tokens": 6}}
    for path in ("/", "/invocations"):
        assert live.post(path, body).json() == [{"generated_text": expected_text(3, 5, 6)}]


def test_return_full_text_puts_the_inputs_in_front(live: Live) -> None:
    answer = generate(live, return_full_text=True)
    assert answer["generated_text"] == PROMPT + expected_text(3, 5, 6)


def test_decoder_input_details_bring_the_prompts_logprobs_and_the_details(live: Live) -> None:
    details = generate(live, decoder_input_details=True)["details"]
    assert details["prefill"] == [
        {
            "id": ord(character),
            "text": character,
            "logprob": None if place == 0 else logprob_at(place, ord(character)),
        }
        for place, character in enumerate(PROMPT)
    ]


def test_alternative_tokens_are_told_where_asked_for(live: Live) -> None:
    first = generate(live, details=True, return_k_alternatives=1)["details"]["tokens"][0]
    assert first["alternative_tokens"] == [
        {"id": first["id"], "text": first["text"], "logprob": first["logprob"]}
    ]


def test_the_top_tokens_are_told_in_tgis_form(live: Live) -> None:
    details = generate(live, details=True, top_n_tokens=1)["details"]
    tokens = [[{**token}] for token in details["tokens"]]
    for (token,) in tokens:
        del token["skipped"]
    assert details["top_tokens"] == tokens  # the fake engine draws the likeliest
    assert "top_tokens" not in generate(live, details=True)["details"]
    assert "details" not in generate(live, top_n_tokens=1)
    parameters = {"seed": 3, "max_new_tokens": 6, "top_n_tokens": 1}
    told = live.post("/generate_stream", {"inputs": PROMPT, "parameters": parameters}).text
    events = [json.loads(line.removeprefix("data: ")) for line in told.splitlines() if line]
    assert [event["top_tokens"] for event in events] == tokens


SCHEMA = {"type": "object", "properties": {"size": {"type": "string"}}}


@pytest.mark.parametrize(
    ("grammar", "kind", "source"),
    [
        ({"type": "regex", "value": "a+"}, "regex", "a+"),
        ({"type": "json", "value": SCHEMA}, "json_schema", SCHEMA),
        ({"type": "json", "value": json.dumps(SCHEMA)}, "json_schema", SCHEMA),
        ({"type": "json_object", "value": SCHEMA}, "json_schema", SCHEMA),
        (
            {"type": "json_schema", "value": {"schema": SCHEMA, "name": "x", "strict": True}},
            "json_schema",
            SCHEMA,
        ),
    ],
)
def test_tgis_grammar_constrains_the_text(
    live: Live, grammar: dict[str, Any], kind: str, source: Any
) -> None:
    request = GenerateRequest(inputs="x", parameters=Parameters(**{"grammar": grammar}))
    found = asked(completion(live.services, request, tokens=False))
    assert found is not None
    assert found.constraint.kind == kind
    told = found.constraint.source
    assert (told if kind == "regex" else json.loads(told)) == source


def test_a_stop_sequence_ends_the_text_and_stays_in_it(live: Live) -> None:
    text = expected_text(3, 5, 6)
    answer = generate(live, stop=[text[1:3]], details=True)
    assert answer["generated_text"] == text[:3]
    assert answer["details"]["finish_reason"] == "stop_sequence"
    assert answer["details"]["generated_tokens"] == 3
    assert [token["text"] for token in answer["details"]["tokens"]] == list(text[:3])


def test_an_end_token_is_told_and_ignored_where_asked(tmp_path: Path) -> None:
    text = expected_text(3, 5, 6)
    end = frozenset({ord(text[4])})
    assert text.index(text[4]) == 4
    with live_server(tmp_path, text=byte_text(eos=end)) as live:
        details = generate(live, details=True)["details"]
        ignored = generate(live, ignore_eos_token=True, details=True)["details"]
    assert details["finish_reason"] == "eos_token"
    assert details["generated_tokens"] == 5
    assert details["tokens"][-1]["id"] in end
    assert ignored["finish_reason"] == "length"


def test_truncate_keeps_the_last_tokens(live: Live) -> None:
    details = generate(live, truncate=2, details=True, decoder_input_details=True)["details"]
    assert details["prompt_tokens"] == 2
    assert [token["text"] for token in details["prefill"]] == ["l", "o"]


def test_a_seed_may_have_64_bits(live: Live) -> None:
    seed = 2**64 - 5
    assert generate(live, seed=seed)["generated_text"] == expected_text(seed, 5, 6)


def test_a_greedy_answer_has_no_seed(live: Live) -> None:
    assert generate(live, details=True)["details"]["seed"] is None


# --- how tokens are chosen ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameters", "temperature"),
    [
        ({}, 0.0),
        ({"temperature": 1.0}, 0.0),
        ({"temperature": 0.7}, 0.7),
        ({"temperature": 3.5}, 3.5),
        ({"temperature": 0.0, "do_sample": True, "top_k": 5}, 0.0),
        ({"do_sample": True}, 1.0),
        ({"top_k": 5}, 1.0),
        ({"top_p": 0.9}, 1.0),
        ({"typical_p": 0.9, "temperature": 2.5}, 2.5),
    ],
)
def test_tokens_are_drawn_where_lorax_draws_them(
    live: Live, parameters: dict[str, Any], temperature: float
) -> None:
    request = GenerateRequest(inputs="x", parameters=Parameters(**parameters))
    assert completion(live.services, request, tokens=True).temperature == temperature


def test_every_sampling_parameter_reaches_the_engines_request(live: Live) -> None:
    given = Parameters(
        top_k=7,
        top_p=0.9,
        typical_p=0.8,
        repetition_penalty=1.1,
        frequency_penalty=0.2,
        presence_penalty=-0.3,
        stop=["a"],
        ignore_eos_token=True,
        best_of=3,
        max_new_tokens=9,
        return_k_alternatives=4,
        user="u",
    )
    wanted = completion(live.services, GenerateRequest(inputs="x", parameters=given), tokens=True)
    assert (wanted.top_k, wanted.top_p, wanted.typical_p) == (7, 0.9, 0.8)
    assert wanted.repetition_penalty == 1.1
    assert (wanted.frequency_penalty, wanted.presence_penalty) == (0.2, -0.3)
    assert (wanted.stop, wanted.ignore_eos, wanted.n) == (["a"], True, 3)
    assert (wanted.max_tokens, wanted.logprobs, wanted.user) == (9, 4, "u")


# --- which adapters -----------------------------------------------------------------------------


@pytest.mark.parametrize("source", [None, "hub", "local", "s3", "pbase"])
def test_an_adapter_of_the_store_is_served_whatever_its_source_is_called(
    live: Live, source: str | None
) -> None:
    body = {"adapter_id": "team/sql", "adapter_source": source, "api_token": "secret"}
    expected = expected_text(3, 5, 6, Component(digest(live, "team/sql")))
    assert generate(live, **body)["generated_text"] == expected


@pytest.mark.parametrize("name", [None, "", "__base_model__", BASE])
def test_the_base_has_several_names(live: Live, name: str | None) -> None:
    assert generate(live, adapter_id=name)["generated_text"] == expected_text(3, 5, 6)


def test_linear_merging_is_the_exact_composition_with_any_weights(live: Live) -> None:
    merged = {"ids": ["team/sql", "json"], "weights": [0.75, 2], "density": 0.0}
    parts = {digest(live, "team/sql"): 0.75, digest(live, "json"): 2.0}
    components = [Component(key, weight) for key, weight in sorted(parts.items())]
    assert generate(live, merged_adapters=merged)["generated_text"] == expected_text(
        3, 5, 6, *components
    )


def test_turbo_drafts_and_the_skipped_tokens_are_those_that_it_drafted(live: Live) -> None:
    details = generate(live, adapter_id="quick", details=True, max_new_tokens=40)["details"]
    skipped = [token["skipped"] for token in details["tokens"]]
    assert details["skipped_tokens"] == sum(skipped) > 0
    assert not all(skipped)
    off = generate(live, adapter_id="quick", turbo="off", details=True, max_new_tokens=40)
    assert off["details"]["skipped_tokens"] == 0
    texts = [token["text"] for token in details["tokens"]]
    assert [token["text"] for token in off["details"]["tokens"]] == texts


# --- best_of ------------------------------------------------------------------------------------


def test_best_of_answers_with_the_likeliest_and_tells_the_others(tmp_path: Path) -> None:
    with live_server(tmp_path, Behaviour(sure=False), seed=4) as live:
        answer = generate(live, seed=None, best_of=4, do_sample=True, details=True)
    details = answer["details"]
    others = details["best_of_sequences"]
    candidates = [details, *others]
    assert len(others) == 3
    means = [sum(token["logprob"] for token in c["tokens"]) / 6 for c in candidates]
    assert means[0] == max(means) > max(means[1:])
    seeds = [candidate["seed"] for candidate in candidates]
    texts = [answer["generated_text"], *(other["generated_text"] for other in others)]
    assert texts == [expected_text(seed, 5, 6) for seed in seeds]
    assert any({choice_seed(seed, i) for i in range(4)} == set(seeds) for seed in seeds)
    assert set(others[0]) == {
        "generated_text",
        "finish_reason",
        "generated_tokens",
        "skipped_tokens",
        "seed",
        "prefill",
        "tokens",
    }


# --- streams ------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/generate_stream", "/"])
def test_a_stream_has_an_event_a_token_and_the_last_has_text_and_details(
    live: Live, path: str
) -> None:
    text = expected_text(3, 5, 6)
    parameters = {"seed": 3, "max_new_tokens": 6, "details": True, "top_k": 5}
    body = {"inputs": PROMPT, "parameters": parameters}
    body |= {"stream": True} if path == "/" else {}
    response = live.post(path, body)
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.text.splitlines() if line]
    *events, last = [json.loads(line.removeprefix("data: ")) for line in lines]
    assert [event["token"]["text"] for event in [*events, last]] == list(text)
    assert all(event["generated_text"] is event["details"] is None for event in events)
    assert last["generated_text"] == text
    assert [event["index"] for event in [*events, last]] == [1, 2, 3, 4, 5, 6]
    assert last["details"] == {
        "finish_reason": "length",
        "prompt_tokens": 5,
        "input_length": 5,
        "generated_tokens": 6,
        "skipped_tokens": 0,
        "seed": 3,
    }


def test_a_streams_texts_without_special_tokens_are_the_generated_text(tmp_path: Path) -> None:
    end = byte_text(eos=frozenset({ord(expected_text(3, 5, 6)[4])}))
    body = {"inputs": PROMPT, "parameters": {"seed": 3, "stop": ["zz"], "max_new_tokens": 6}}
    with live_server(tmp_path, text=end) as live:
        lines = [line for line in live.post("/generate_stream", body).text.splitlines() if line]
    events = [json.loads(line.removeprefix("data: ")) for line in lines]
    said = "".join(e["token"]["text"] for e in events if not e["token"]["special"])
    assert said == events[-1]["generated_text"] == expected_text(3, 5, 5)


# --- headers ------------------------------------------------------------------------------------

TIMES = ["total", "validation", "queue", "inference"]


def test_headers_tell_times_tokens_model_and_adapter(live: Live) -> None:
    parameters = {"seed": 3, "max_new_tokens": 6, "adapter_id": "team/sql"}
    headers = live.post("/generate", {"inputs": PROMPT, "parameters": parameters}).headers
    times = {name: int(headers[f"x-{name}-time"]) for name in TIMES}
    assert times["total"] >= max(times["queue"], times["inference"], times["validation"])
    assert int(headers["x-time-to-first-token"]) <= times["total"]
    assert int(headers["x-time-per-token"]) <= times["inference"]
    counts = [headers[f"x-{kind}-tokens"] for kind in ("prompt", "generated", "skipped", "total")]
    assert counts == ["5", "6", "0", "11"]
    assert headers["x-model-id"] == BASE
    assert headers["x-adapter-id"] == "team/sql"
    assert headers["x-adapter-source"] == "local"


def test_a_streams_headers_are_those_known_at_its_start(live: Live) -> None:
    merged = {"ids": ["team/sql", "json"], "weights": [1, 1], "density": 0}
    parameters = {"merged_adapters": merged, "adapter_source": "hub", "max_new_tokens": 2}
    headers = live.post("/generate_stream", {"inputs": "x", "parameters": parameters}).headers
    assert headers["x-adapter-id"] == "team/sql,json"
    assert headers["x-adapter-source"] == "hub"
    assert headers["x-prompt-tokens"] == "1"
    assert headers["x-model-id"] == BASE
    assert "x-total-time" not in headers


def test_the_plain_base_has_no_adapter_headers(live: Live) -> None:
    headers = live.post("/generate", {"inputs": "x", "parameters": {"max_new_tokens": 1}}).headers
    assert not {"x-adapter-id", "x-adapter-source"} & set(headers)


def test_a_models_name_beyond_ascii_is_quoted_in_its_header(tmp_path: Path) -> None:
    with live_server(tmp_path, served_model_name="模型/a") as live:
        body = {"inputs": "x", "parameters": {"max_new_tokens": 1}}
        assert live.post("/generate", body).headers["x-model-id"] == "%E6%A8%A1%E5%9E%8B/a"


# --- the rest -----------------------------------------------------------------------------------


def test_info_tells_the_model_and_the_limits(live: Live) -> None:
    info = live.http.get("/info").json()
    assert info["model_id"] == BASE
    assert info["model_dtype"] == "torch.float32"
    assert info["max_total_tokens"] == info["max_input_length"] + 1 == 2048
    assert info["max_stop_sequences"] == 4
    assert info["max_concurrent_requests"] == live.services.settings.max_queue


def test_tokenize_answers_inputs_in_lorax_form_and_prompt_in_vllms(live: Live) -> None:
    spans = live.post("/tokenize", {"inputs": "aé<|im_start|>"}).json()
    assert [(span["id"], span["start"], span["stop"]) for span in spans] == [
        (ord("a"), 0, 1),
        (0xC3, 1, 2),
        (0xA9, 1, 2),
        (START, 2, 14),
    ]
    assert spans[-1]["text"] == "<|im_start|>"
    tokens = live.post("/tokenize", {"prompt": "aé<|im_start|>"}).json()["tokens"]
    assert tokens == [span["id"] for span in spans]
