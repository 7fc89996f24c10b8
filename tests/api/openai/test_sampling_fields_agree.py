"""Every place that knows sampling parameters has those of `SamplingParams`, but for named ones."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from quickchange_kernels.sampling.sample_contract import FILTERS
from quickchange_server.api.lorax.requests import Parameters
from quickchange_server.api.lorax.translation import SHARED
from quickchange_server.api.openai.chat.chat_requests import ChatRequest
from quickchange_server.api.openai.requests import CompletionRequest
from quickchange_server.errors import InvalidRequestError
from quickchange_server.experiments.definition import OVERRIDABLE, REQUESTS_OWN
from quickchange_server.protocol import MOST_TOKENS, SamplingParams, Submit

DOCS = Path(__file__).parents[3] / "docs"
NAMES = {field.name for field in fields(SamplingParams)}
PROBES = (
    -(2**63) - 1,
    -(2**63),
    -2.5,
    -2,
    -1,
    0,
    0.5,
    1,
    1.5,
    2,
    3,
    20,
    21,
    128,
    129,
    2**63,
    2**64,
)
NARROWER: dict[
    str, Callable[[float], bool]
] = {  # what a body does not take of what SamplingParams does
    "temperature": lambda value: value > 2,
    "n": lambda value: value > 128,
    "seed": lambda value: value >= 2**63,
    "logprobs": lambda value: value > MOST_TOKENS,
    "prompt_logprobs": lambda value: value > MOST_TOKENS,
}
LORAX_NAMES = {
    "n": "best_of",
    "max_tokens": "max_new_tokens",
    "ignore_eos": "ignore_eos_token",
    "logprobs": "return_k_alternatives",
    "prompt_logprobs": "decoder_input_details",
}
NOT_IN_LORAX = {
    "min_p",
    "min_tokens",
    "stop_token_ids",
    "logit_bias",
    "logprob_token_ids",
    "allowed_token_ids",
    "bad_words",
    "include_stop_str_in_output",
    "skip_special_tokens",
}
DOCUMENTED_DEFAULTS = {"none", "off", "drawn"}  # of fields without a value, beside null and empty


def documented() -> dict[str, str]:
    """Default by field, from the table of /v1/completions."""
    table = (DOCS / "http.md").read_text().partition("## POST /v1/completions")[2]
    rows = re.findall(r"^\| (`.*?) \| (.*?) \|", table.partition("\n## ")[0], re.MULTILINE)
    return {name: default for cell, default in rows for name in re.findall(r"`(\w+)`", cell)}


def accepted(build: Any, **said: Any) -> bool:
    try:
        build(said)
    except (ValueError, ValidationError, InvalidRequestError):
        return False
    return True


def test_bodies_have_every_field() -> None:
    assert set(CompletionRequest.model_fields) >= NAMES
    assert set(ChatRequest.model_fields) >= NAMES


@pytest.mark.parametrize("name", sorted(NAMES - {"max_tokens"}))
def test_a_bodys_default_is_the_fields(name: str) -> None:
    body = CompletionRequest.model_validate({"model": "x", "prompt": "x"})
    assert getattr(body.sampling_params(), name) == getattr(SamplingParams(), name)


@pytest.mark.parametrize(
    "name", sorted(field.name for field in fields(SamplingParams) if "Interval" in str(field.type))
)
def test_a_body_takes_the_fields_range(name: str) -> None:
    enough = {"max_tokens": 200} if name == "min_tokens" else {}
    least = {"echo": True} if name == "max_tokens" else {}
    for value in PROBES:
        body = accepted(
            CompletionRequest.model_validate,
            **{"model": "x", "prompt": "x", **enough, **least, name: value},
        )
        params = accepted(lambda said: SamplingParams(**said), **{**enough, name: value})
        narrower = NARROWER.get(name, lambda _: False)(value)
        assert body == (params and not narrower), value


def test_the_protocol_copies_no_field_but_the_concrete_seed() -> None:
    assert {field.name for field in fields(Submit)} & NAMES == {"seed"}


def test_the_kernels_filters_are_fields_that_are_off_by_default() -> None:
    assert set(FILTERS) <= NAMES
    assert [getattr(SamplingParams(), name) for name in FILTERS] == [0, 1.0, 0.0, 1.0]


def test_every_field_may_be_overridden_or_is_the_requests_own() -> None:
    assert set(OVERRIDABLE) | REQUESTS_OWN == NAMES
    assert not set(OVERRIDABLE) & REQUESTS_OWN
    assert set(FILTERS) <= set(OVERRIDABLE)
    text = (DOCS / "experiments.md").read_text()
    said = text.partition("replace what the request says:")[2].partition(".")[0]
    assert set(re.findall(r"`(\w+)`", said)) == set(OVERRIDABLE)


def test_lorax_has_the_fields_but_for_those_named_here() -> None:
    own_meaning = {"temperature", "seed"}
    assert {*SHARED, *own_meaning, *LORAX_NAMES, *NOT_IN_LORAX} == NAMES
    assert set(LORAX_NAMES.values()) <= set(Parameters.model_fields)
    assert not NOT_IN_LORAX & set(Parameters.model_fields)


@pytest.mark.parametrize("name", sorted(NAMES))
def test_the_table_of_http_md_has_the_field_and_its_default(name: str) -> None:
    default = documented()[name]
    value = getattr(SamplingParams(), name)
    if value is None or value in ((), frozenset(), {}):
        assert default in DOCUMENTED_DEFAULTS
    else:
        assert default == str(value).lower().removesuffix(".0")
