"""Constraints are judged in a process that can be ended: places, limits, one compilation each."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import pytest
from prometheus_client import CollectorRegistry
from text_support import byte_text, metaspace_tokenizer, sentencepiece_tokenizer

from quickchange_server.errors import InvalidRequestError, QueueFullError
from quickchange_server.frontend.encoding.foreign_tokenizer import model_tokenizer
from quickchange_server.frontend.tokenizer import Text
from quickchange_server.observability.subsystem_metrics import StructuredMetrics
from quickchange_server.protocol import Constraint
from quickchange_server.structured_output.validator import Asked, ConstraintChecks

T = TypeVar("T")
BOMB = {
    "type": "string",
    "allOf": [{"pattern": f"(a|b)*a(a|b){{{i}}}"} for i in range(5, 25)],
}


def checked(
    scenario: Callable[[ConstraintChecks], Awaitable[T]],
    registry: CollectorRegistry | None = None,
    text: Text | None = None,
    seconds: float = 5.0,
) -> T:
    async def run() -> T:
        metrics = StructuredMetrics(registry or CollectorRegistry())
        checks = ConstraintChecks(text or byte_text(), metrics, seconds=seconds)
        try:
            return await scenario(checks)
        finally:
            await checks.close()

    return asyncio.run(asyncio.wait_for(run(), 60))


def of_schema(schema: Any) -> Asked:
    return Asked(Constraint("json_schema", json.dumps(schema)), "schema")


async def fault(checks: ConstraintChecks, asked: Asked) -> tuple[str | None, str]:
    with pytest.raises(InvalidRequestError) as caught:
        await checks.accept(asked)
    return caught.value.param, caught.value.message


@pytest.mark.parametrize(
    ("schema", "place"),
    [
        ({"properties": {"a": {"type": "string", "pattern": "("}}}, "schema.properties.a.pattern"),
        (
            {
                "type": "object",
                "properties": {"a": {"type": "integer", "minimum": 5, "maximum": 1}},
                "required": ["a"],
            },
            "schema.properties.a.minimum",
        ),
        ({"properties": {"a": {"$ref": "#/$defs/b"}}}, "schema.properties.a.$ref"),
        (
            {"$defs": {"b": {"type": "string", "pattern": "(?=a)"}}, "$ref": "#/$defs/b"},
            "schema.$defs.b.pattern",
        ),
        ({"items": {"oneOf": [{"type": "integer"}, {"type": "number"}]}}, "schema.items.oneOf"),
        (
            {
                "type": "object",
                "properties": {"a": {"pattern": "("}, "b": False},
                "additionalProperties": False,
            },
            "schema.properties.a.pattern",
        ),
        (
            {
                "type": "object",
                "properties": {"a": {"type": "string", "pattern": "^aaa$", "maxLength": 2}},
                "required": ["a"],
                "additionalProperties": False,
            },
            "schema.properties.a.pattern",
        ),
        (
            {"anyOf": [{"type": "object", "additionalProperties": False}, {"pattern": "("}]},
            "schema.anyOf[1].pattern",
        ),
        (
            {"items": {"pattern": "("}, "anyOf": [{"pattern": "["}, False]},
            "schema.anyOf[0].pattern",
        ),
        (False, "schema"),
    ],
)
def test_what_keeps_a_schema_from_compiling_is_found(schema: Any, place: str) -> None:
    param, message = checked(lambda checks: fault(checks, of_schema(schema)))
    assert param == place
    assert message.startswith(f"{place}: ")


@pytest.mark.parametrize(
    ("constraint", "says"),
    [
        (Constraint("regex", "(a"), "unclosed group"),
        (Constraint("grammar", "start: foo"), "unknown name"),
    ],
)
def test_a_bad_expression_or_grammar_says_why(constraint: Constraint, says: str) -> None:
    param, message = checked(lambda checks: fault(checks, Asked(constraint, "guided_regex")))
    assert param == "guided_regex"
    assert says in message


def test_the_place_of_a_fault_may_be_longer_than_a_line_of_a_stream() -> None:
    name = "\N{GRINNING FACE}" * 60_000
    param, _ = checked(lambda checks: fault(checks, of_schema({"properties": {name: False, "a": {
        "properties": {name: {"pattern": "("}}}}})))  # fmt: skip
    assert param == f"schema.properties.a.properties.{name}.pattern"


def test_a_schema_bomb_is_refused_in_time_and_the_next_one_is_served() -> None:
    async def scenario(checks: ConstraintChecks) -> tuple[str, float, Constraint]:
        started = time.monotonic()
        _, message = await fault(checks, of_schema(BOMB))
        seconds = time.monotonic() - started
        return message, seconds, await checks.accept(of_schema({"type": "integer"}))

    message, seconds, served = checked(scenario, seconds=1.0)
    assert "longer than 1 s" in message
    assert seconds < 120  # and not as long as it would take
    assert served.kind == "json_schema"


def test_equal_constraints_compile_once_and_are_remembered() -> None:
    registry = CollectorRegistry()

    async def scenario(checks: ConstraintChecks) -> None:
        asked = of_schema({"type": "integer"})
        await asyncio.gather(*(checks.accept(asked) for _ in range(20)))
        await checks.accept(asked)

    checked(scenario, registry)
    name = "quickchange_structured_compile_seconds_count"
    assert registry.get_sample_value(name) == 1
    total = "quickchange_structured_requests_total"
    assert registry.get_sample_value(total, {"kind": "json_schema"}) == 21


def test_a_refusal_is_remembered_too() -> None:
    registry = CollectorRegistry()

    async def scenario(checks: ConstraintChecks) -> None:
        for _ in range(3):
            await fault(checks, Asked(Constraint("regex", "("), "guided_regex"))

    checked(scenario, registry)
    assert registry.get_sample_value("quickchange_structured_compile_seconds_count") == 1


def test_the_loop_goes_on_while_a_constraint_compiles() -> None:
    async def scenario(checks: ConstraintChecks) -> int:
        task = asyncio.create_task(fault(checks, of_schema(BOMB)))
        turns = 0
        while not task.done():
            await asyncio.sleep(0.005)
            turns += 1
        await task
        return turns

    assert checked(scenario, seconds=1.0) > 5  # where the loop waits for the compiler: one or two


def test_a_caller_who_leaves_does_not_end_the_compilation_for_others() -> None:
    async def scenario(checks: ConstraintChecks) -> Constraint:
        asked = of_schema({"type": "boolean"})
        leaving = asyncio.create_task(checks.accept(asked))
        await asyncio.sleep(0)
        staying = asyncio.create_task(checks.accept(asked))
        await asyncio.sleep(0)
        leaving.cancel()
        return await staying

    assert checked(scenario).kind == "json_schema"


def test_too_many_waiting_are_turned_away() -> None:
    async def scenario(checks: ConstraintChecks) -> list[Any]:
        several = [checks.accept(of_schema({"const": i})) for i in range(40)]
        return await asyncio.gather(*several, return_exceptions=True)

    found = checked(scenario)
    refused = [one for one in found if isinstance(one, QueueFullError)]
    assert len(refused) == 8
    assert all(one.retry_after for one in refused)


def test_a_model_without_an_end_token_is_refused_with_the_reason() -> None:
    text = byte_text(eos=frozenset())
    _, message = checked(lambda c: fault(c, Asked(Constraint("json_object"), "f")), text=text)
    assert "no end-of-sequence token" in message


def test_a_tokenizer_at_which_the_library_panics_is_named() -> None:
    text = Text(
        model_tokenizer(sentencepiece_tokenizer(strip=True)), vocab_size=269, eos_ids=frozenset({2})
    )
    _, message = checked(lambda c: fault(c, Asked(Constraint("regex", "b"), "f")), text=text)
    assert "the model's tokenizer can't be read" in message


def test_a_tokenizer_that_the_library_does_not_read_is_named() -> None:
    text = Text(model_tokenizer(metaspace_tokenizer()), vocab_size=9, eos_ids=frozenset({1}))
    _, message = checked(lambda c: fault(c, Asked(Constraint("regex", "b"), "f")), text=text)
    assert "the model's tokenizer can't be read" in message
