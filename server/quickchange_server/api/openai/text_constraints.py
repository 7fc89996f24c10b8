"""The constraint on a request's text, from OpenAI's or vLLM's fields, as the engine takes it."""

from __future__ import annotations

import json

from quickchange_server.api.openai.requests import Constrained, StructuredOutputs
from quickchange_server.errors import InvalidRequestError
from quickchange_server.protocol import Constraint
from quickchange_server.structured_output.pattern_size import LARGEST, TOO_LARGE, written_out
from quickchange_server.structured_output.schema_keywords import check_schema
from quickchange_server.structured_output.validator import Asked

LONGEST = 64 * 1024  # characters of a schema, a regular expression or a grammar


def asked(body: Constrained) -> Asked | None:
    """The body's constraint, with the field that it came from; None if any text will do.

    Raises InvalidRequestError, naming the field, for more than one constraint, for one that is too
    long, and for a schema with keywords that are not enforced.
    """
    found = [one for one in (_of_format(body), *_of_guided(body), *_of_outputs(body)) if one]
    if len(found) > 1:
        both = f"{found[0].place} and {found[1].place}"
        raise InvalidRequestError(
            f"{found[1].place}: {both} both constrain the text; give one", param=found[1].place
        )
    if not found:
        return None
    only = found[0]
    if len(only.constraint.source) > LONGEST:
        raise InvalidRequestError(
            f"{only.place}: has {len(only.constraint.source)} characters, of {LONGEST} at most; "
            "simplify it",
            param=only.place,
        )
    if only.constraint.kind == "regex" and written_out(only.constraint.source) > LARGEST:
        raise InvalidRequestError(f"{only.place}: {TOO_LARGE}", param=only.place)
    if only.constraint.kind == "json_schema":
        check_schema(json.loads(only.constraint.source), only.place)
    return only


def choice_grammar(choices: list[str]) -> str:
    """A Lark grammar of exactly one of these texts."""
    return "start: " + " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices)


def _of_format(body: Constrained) -> Asked | None:
    wanted = body.response_format
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        if wanted.schema_ is not None:
            return _schema(wanted.schema_, "response_format.schema")
        if wanted.value is not None:
            return _schema(wanted.value, "response_format.value")
        return Asked(Constraint("json_object"), "response_format")
    place = "response_format.json_schema.schema"
    if wanted.json_schema is None or wanted.json_schema.schema_ is None:
        return Asked(Constraint("json_object"), place)
    return _schema(wanted.json_schema.schema_, place)


def _of_guided(body: Constrained) -> list[Asked]:
    named = StructuredOutputs(
        json_=body.guided_json,
        regex=body.guided_regex,
        choice=body.guided_choice,
        grammar=body.guided_grammar,
    )
    return _outputs(named, "guided_")


def _of_outputs(body: Constrained) -> list[Asked]:
    wanted = body.structured_outputs
    return [] if wanted is None else _outputs(wanted, "structured_outputs.")


def _outputs(wanted: StructuredOutputs, before: str) -> list[Asked]:
    found = []
    if wanted.json_ is not None:
        found.append(_schema(wanted.json_, before + "json"))
    if wanted.regex is not None:
        found.append(Asked(Constraint("regex", wanted.regex), before + "regex"))
    if wanted.choice is not None:
        grammar = choice_grammar(wanted.choice)
        found.append(Asked(Constraint("grammar", grammar), before + "choice"))
    if wanted.grammar is not None:
        found.append(Asked(Constraint("grammar", wanted.grammar), before + "grammar"))
    if wanted.json_object:
        found.append(Asked(Constraint("json_object"), before + "json_object"))
    return found


def _schema(schema: object, place: str) -> Asked:
    """The constraint of a schema, given as a value or, as vLLM allows, as JSON in a string."""
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise InvalidRequestError(
                f"{place}: is not JSON: {error}; send the schema as an object", param=place
            ) from error
    try:
        source = json.dumps(schema, separators=(",", ":"))
    except RecursionError as error:
        raise InvalidRequestError(
            f"{place}: has too many levels; simplify it", param=place
        ) from error
    return Asked(Constraint("json_schema", source), place)
