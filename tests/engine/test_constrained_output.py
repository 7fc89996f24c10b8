"""Constrained output is what the constraint allows, and the same with drafts as without them.

Requests run alone and undrafted on a roomy engine, then together and drafted on one so small that
sequences are preempted, and across a restart. Every draft for which there is room is bought.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from threading import Event
from typing import Any

import hypothesis.strategies as st
import jsonschema
import numpy as np
import numpy.typing as npt
import pytest
from bought_drafts import every_draft_bought
from constraint_tokens import END, PIECES, tiny_grammars, tiny_text, written
from engine_driver import make_engine
from hypothesis import HealthCheck, given, settings
from turbo_models import KV_BYTES, VOCABULARY, TurboModels, make_turbo_models

from quickchange_server.api.openai.chat.tool_grammars import call_grammar
from quickchange_server.api.openai.chat.tool_requests import Tool
from quickchange_server.engine.engine import Engine
from quickchange_server.frontend.parsing.tool_forms import (
    JsonCall,
    NamedCall,
    ParameterMarks,
    ToolForm,
)
from quickchange_server.frontend.parsing.tool_parser import ToolReader
from quickchange_server.protocol import Component, Constraint, Delta, Drafting, Submit
from quickchange_server.protocol import SamplingParams as Params
from quickchange_server.structured_output.compiler import Masked, Matcher
from quickchange_server.structured_output.grammar import TokenGrammars

MAX_LEN = 72
SMALL_CACHE = MAX_LEN * KV_BYTES * 5 // 4


@dataclass
class Said:
    tokens: list[int] = field(default_factory=list)
    last: Delta | None = None
    drafted: int = 0
    accepted: int = 0

    def add(self, delta: Delta) -> None:
        self.tokens += delta.token_ids
        self.drafted += delta.drafted
        self.accepted += delta.accepted
        self.last = delta if delta.finish_reason else None

    @property
    def end(self) -> tuple[str | None, str | None]:
        return (None, None) if self.last is None else (self.last.finish_reason, self.last.error)


def drive(engine: Engine, said: dict[str, Said], steps: int | None = None) -> None:
    deadline = time.monotonic() + 60
    while any(one.last is None for one in said.values()) and steps != 0:
        assert time.monotonic() < deadline, "not ended"
        engine.poll_adapters()
        report = engine.step()
        engine.check_integrity()
        if report is None:
            time.sleep(0.001)  # a grammar or an adapter is on its way
            continue
        steps = None if steps is None else steps - 1
        for delta in report.deltas:
            said[delta.request_id].add(delta)


def run(engine: Engine, submits: Sequence[Submit]) -> dict[str, Said]:
    said = {submit.request_id: Said() for submit in submits}
    for submit in submits:
        engine.submit(submit)
    drive(engine, said)
    return said


@pytest.fixture(scope="module", autouse=True)
def _no_draft_is_too_dear() -> Iterator[None]:
    with every_draft_bought():
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> TurboModels:
    return make_turbo_models(tmp_path_factory.mktemp("constrained") / "base")


@pytest.fixture(scope="module")
def grammars() -> TokenGrammars:
    return tiny_grammars()


def engine_of(models: TurboModels, grammars: TokenGrammars, **options: object) -> Engine:
    small = {"max_model_len": MAX_LEN, **options}
    return make_engine(models.path, models.adapters.__getitem__, constraints=grammars, **small)


@pytest.fixture(scope="module")
def roomy(models: TurboModels, grammars: TokenGrammars) -> Iterator[Engine]:
    engine = engine_of(models, grammars)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def cramped(models: TurboModels, grammars: TokenGrammars) -> Iterator[Engine]:
    engine = engine_of(models, grammars, kv_cache_bytes=SMALL_CACHE)
    yield engine
    engine.close()


SCALARS: list[dict[str, Any]] = [
    {"type": "integer", "minimum": -5, "maximum": 25},
    {"type": "boolean"},
    {"enum": ["a", "ab", 12, None]},
    {"type": "string", "pattern": "^a[bc]{0,3}$"},
    {"type": "string", "minLength": 1, "maxLength": 3},
    {"const": {"a": [1, 2]}},
    {"anyOf": [{"type": "null"}, {"type": "number", "minimum": 0, "maximum": 2}]},
    {"$ref": "#/$defs/list"},
]
LIST = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 5}, "maxItems": 2}


def _object(parts: list[dict[str, Any]]) -> dict[str, Any]:
    named = dict(zip("abc", parts, strict=False))
    return {
        "type": "object",
        "properties": named,
        "required": list(named)[:1],
        "additionalProperties": False,
    }


schemas = st.recursive(
    st.sampled_from(SCALARS),
    lambda inner: (
        st.lists(inner, min_size=1, max_size=3).map(_object)
        | st.lists(inner, min_size=1, max_size=2).map(
            lambda parts: {"type": "array", "prefixItems": parts, "items": False}
        )
    ),
    max_leaves=4,
).map(lambda schema: {**schema, "$defs": {"list": LIST}})

drafts = st.sampled_from(
    [None, Drafting(lookup=True), *(Drafting(heads, lookup=True) for heads in ("two", "five"))]
)


@st.composite
def submits(draw: st.DrawFn) -> list[Submit]:
    made = []
    for index in range(draw(st.integers(1, 4))):
        prompt = draw(st.lists(st.integers(0, VOCABULARY - 2), min_size=1, max_size=12))
        schema = draw(st.none() | schemas)
        constraint = None
        if schema is not None:
            constraint = Constraint("json_schema", json.dumps(schema))
        params = Params(
            max_tokens=draw(st.integers(1, MAX_LEN - 12)),
            temperature=draw(st.sampled_from([0.0, 1.0, 1.7])),
            top_k=draw(st.sampled_from([0, 3])),
            top_p=draw(st.sampled_from([1.0, 0.8])),
            repetition_penalty=draw(st.sampled_from([1.0, 1.3])),
            frequency_penalty=draw(st.sampled_from([0.0, 0.5])),
            min_tokens=draw(st.sampled_from([0, 1])),
            stop_token_ids=frozenset({END}),
            logprobs=draw(st.sampled_from([None, 1])),
        )
        adapters = draw(st.sampled_from([(), (Component("lora-a"),), (Component("five"),)]))
        made.append(
            Submit(
                str(index),
                tuple(prompt),
                params,
                adapters,
                drafting=draw(drafts),
                constraint=constraint,
                seed=draw(st.integers(0, 2**63)),
            )
        )
    return made


slow = settings(
    deadline=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def check_valid(said: Said, submit: Submit) -> None:
    """An ended text is valid; one that was cut off could have become so."""
    assert said.end[1] is None, said.end
    if submit.constraint is None or said.end[0] != "stop":
        return
    schema = json.loads(submit.constraint.source)
    jsonschema.Draft202012Validator(schema).validate(json.loads(written(said.tokens)))


@slow
@given(wanted=submits())
def test_drafted_and_preempted_output_is_valid_and_as_it_would_be_undrafted(
    roomy: Engine, cramped: Engine, wanted: list[Submit]
) -> None:
    together = run(cramped, wanted)
    for submit in wanted:
        alone = run(roomy, [replace(submit, drafting=None)])[submit.request_id]
        found = together[submit.request_id]
        assert found.tokens == alone.tokens, submit
        assert found.end == alone.end, submit
        check_valid(found, submit)


@slow
@given(wanted=submits(), steps=st.integers(1, 25))
def test_a_restart_replays_the_output_and_goes_on_as_before(
    roomy: Engine,
    models: TurboModels,
    grammars: TokenGrammars,
    wanted: list[Submit],
    steps: int,
) -> None:
    dying = engine_of(models, grammars)
    said = {submit.request_id: Said() for submit in wanted}
    for submit in wanted:
        dying.submit(submit)
    drive(dying, said, steps)
    dying.close()
    reborn = engine_of(models, grammars)
    left = [
        replace(submit, output=tuple(said[submit.request_id].tokens))
        for submit in wanted
        if said[submit.request_id].last is None
    ]
    for submit in left:
        reborn.submit(submit)
    drive(reborn, said)
    reborn.close()
    for submit in wanted:
        alone = run(roomy, [replace(submit, drafting=None)])[submit.request_id]
        assert said[submit.request_id].tokens == alone.tokens, submit
        assert said[submit.request_id].end == alone.end, submit


def constrained(kind: str, source: str, **params: Any) -> Submit:
    given_params = {"max_tokens": 40, "stop_token_ids": frozenset({END}), **params}
    return Submit(
        "r",
        (8, 9, 10),
        Params(**given_params),
        constraint=Constraint(kind, source),  # type: ignore[arg-type]
        seed=0,
    )


def resumed(engine: Engine, submit: Submit, tokens: list[int]) -> Said:
    """What is said of a request whose first tokens another engine has said."""
    said = run(engine, [replace(submit, output=tuple(tokens))])[submit.request_id]
    return replace(said, tokens=tokens + said.tokens)


@slow
@given(wanted=submits(), missing=st.integers(0, 3))
def test_a_text_of_which_only_the_last_words_were_lost_ends_as_before(
    roomy: Engine, wanted: list[Submit], missing: int
) -> None:
    for submit in wanted:
        whole = run(roomy, [submit])[submit.request_id]
        again = resumed(roomy, submit, whole.tokens[: max(0, len(whole.tokens) - missing)])
        assert (again.tokens, again.end) == (whole.tokens, whole.end), submit


@pytest.mark.parametrize(
    ("expression", "params", "reason"),
    [
        ("a{5}", {"max_tokens": 5}, "stop"),  # complete with the last token that it may have
        ("a{5}", {"max_tokens": 9}, "stop"),
        ("a{5}", {"max_tokens": 4}, "length"),
        ("(ab){3,9}", {"logit_bias": ((END, 100.0),)}, "stop"),
        ("(a|b){3,9}", {"logit_bias": ((24, 100.0),), "stop_token_ids": {24}}, "stop"),
        (None, {"max_tokens": 3, "stop_token_ids": set()}, "length"),
        (None, {"logit_bias": ((END, 100.0),)}, "stop"),
        (None, {"logit_bias": ((END, 100.0),), "min_tokens": 3, "max_tokens": 3}, "length"),
        (None, {"max_tokens": MAX_LEN}, "length"),  # the context's end
    ],
)
def test_a_text_whose_end_alone_was_lost_ends_without_another_token(
    roomy: Engine, expression: str | None, params: dict[str, Any], reason: str
) -> None:
    submit = constrained("regex", expression or "", **params)
    if expression is None:
        submit = replace(submit, constraint=None)
    whole = run(roomy, [submit])["r"]
    assert whole.end == (reason, None)
    for kept in range(len(whole.tokens) + 1):
        again = resumed(roomy, submit, whole.tokens[:kept])
        assert (again.tokens, again.end) == (whole.tokens, whole.end), kept


def test_a_complete_text_ends_without_another_token(roomy: Engine) -> None:
    said = run(roomy, [constrained("regex", "a{5}")])["r"]
    assert written(said.tokens) == "aaaaa"
    assert END not in said.tokens
    assert said.end == ("stop", None)


def test_a_complete_text_ends_before_min_tokens(roomy: Engine) -> None:
    said = run(roomy, [constrained("regex", "a{5}", min_tokens=30)])["r"]
    assert (written(said.tokens), said.end) == ("aaaaa", ("stop", None))


def test_the_end_may_not_come_while_the_text_is_not_complete(roomy: Engine) -> None:
    bias = ((END, 100.0),)  # all that the model wants is to end
    said = run(roomy, [constrained("regex", "(ab){3,9}", logit_bias=bias)])["r"]
    assert written(said.tokens) == "ababab"
    assert said.tokens[-1] == END


def test_a_stop_token_of_the_request_ends_only_complete_text(roomy: Engine) -> None:
    stops = frozenset({END, 24})  # "ab", which the expression allows as text
    bias = ((24, 100.0),)
    said = run(roomy, [constrained("regex", "(a|b){3,9}", logit_bias=bias, stop_token_ids=stops)])[
        "r"
    ]
    assert said.tokens[-1] == 24
    assert len(written(said.tokens[:-1])) >= 3


def test_without_the_end_among_the_stops_the_text_goes_on_as_long_as_it_may(
    roomy: Engine,
) -> None:
    said = run(roomy, [constrained("regex", "a{1,7}", stop_token_ids=frozenset())])["r"]
    assert (written(said.tokens), said.end) == ("a" * 7, ("stop", None))


def test_heads_and_lookup_draft_for_constrained_text(cramped: Engine) -> None:
    submit = constrained("regex", "(ab){20}")
    said = run(cramped, [replace(submit, drafting=Drafting("five", lookup=True))])["r"]
    assert written(said.tokens) == "ab" * 20
    assert said.accepted > 0


def test_text_without_a_choice_is_drafted_whole(cramped: Engine) -> None:
    """Nothing in it was there before, and no token spells more than one letter of it."""
    text = "c0.5-e:b 2[aca"
    drafting = Drafting(lookup=True)
    said = run(cramped, [replace(constrained("regex", re.escape(text)), drafting=drafting)])["r"]
    assert (written(said.tokens), said.end) == (text, ("stop", None))
    assert said.accepted == said.drafted == len(text) - 1  # the first comes with the prompt


def test_text_with_two_spellings_is_the_models_own_in_spite_of_drafts(
    roomy: Engine, cramped: Engine
) -> None:
    """`ab` is one token, or two: drafts are always of one spelling, the model is free."""
    for seed in range(6):
        submit = constrained("regex", "(ab){12}", seed=seed, temperature=1.5)
        drafted = run(cramped, [replace(submit, drafting=Drafting("five"))])["r"]
        assert drafted.tokens == run(roomy, [submit])["r"].tokens


def test_log_probabilities_are_the_models_own(roomy: Engine) -> None:
    """The rule holds of a forced token, which had to be sampled, too."""
    submit = constrained("regex", "a", logprobs=1)
    roomy.submit(submit)
    said: dict[str, Said] = {"r": Said()}
    drive(roomy, said)
    last = said["r"].last
    assert last is not None
    assert last.logprobs[0].logprob < -1e-3


def test_a_grammar_that_does_not_compile_fails_its_request_alone(roomy: Engine) -> None:
    bad = replace(constrained("regex", "("), request_id="bad")
    said = run(roomy, [bad, constrained("regex", "a{3}")])
    assert written(said["r"].tokens) == "aaa"
    assert said["bad"].last is not None
    assert said["bad"].last.error_kind == "request"
    assert "unclosed group" in (said["bad"].last.error or "")


def test_an_engine_without_a_tokenizer_refuses_constraints(models: TurboModels) -> None:
    engine = make_engine(models.path, models.adapters.__getitem__)
    said = run(engine, [constrained("regex", "a")])["r"]
    assert said.end[0] == "error"
    assert "constraint" in (said.end[1] or "")


def test_a_cancelled_request_that_waits_for_its_grammar_is_gone(roomy: Engine) -> None:
    roomy.submit(constrained("regex", "a{6}"))
    roomy.cancel("r")
    time.sleep(0.05)
    assert roomy.step() is None


# Of this vocabulary's characters.
FORMS = {
    "json": ToolForm(JsonCall(("a",), ("b",)), open="-a-", close=".b."),
    "named": ToolForm(NamedCall(":", "json"), begin="[", open="-", close=".", end="]"),
    "parameters": ToolForm(
        NamedCall(":", ParameterMarks("[", ((".", "either"),), "]")), open="-a-", close=".b."
    ),
}
TOOLS = [
    Tool.model_validate({"type": "function", "function": {"name": name, "parameters": parameters}})
    for name, parameters in {
        "ab": {
            "properties": {"c": {"type": "integer", "minimum": 0, "maximum": 25}},
            "required": ["c"],
            "additionalProperties": False,
        },
        "ba": {
            "properties": {"e": {"type": "string", "pattern": "^[abc]{1,3}$"}},
            "additionalProperties": False,
        },
    }.items()
]


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_demanded_call_is_read_back_and_the_same_with_drafts_for_every_seed(
    roomy: Engine, cramped: Engine, form: ToolForm
) -> None:
    constraint = Constraint("grammar", call_grammar(tiny_text(), form, TOOLS))
    params = Params(
        max_tokens=60,
        temperature=3.0,
        stop_token_ids=frozenset({END}),
        logit_bias={PIECES.index(" "): -100.0},  # blanks between the keys would fill the context
    )
    wanted = [
        Submit(str(seed), (1, 8, 9), params, constraint=constraint, seed=seed) for seed in range(50)
    ]
    plain = run(roomy, wanted)
    drafted = run(cramped, [replace(submit, drafting=Drafting("two", True)) for submit in wanted])
    assert {key: said.tokens for key, said in drafted.items()} == {
        key: said.tokens for key, said in plain.items()
    }
    assert sum(said.accepted for said in drafted.values()) > 0
    schemas = {tool.function.name: tool.function.parameters for tool in TOOLS}
    called = set()
    for said in plain.values():
        assert said.end == ("stop", None)
        text, calls = ToolReader(form, schemas).push(written(said.tokens), final=True)
        assert text == ""
        (call,) = calls
        jsonschema.Draft202012Validator(schemas[call.name]).validate(json.loads(call.arguments))
        called.add(call.name)
    assert called == set(schemas)


def test_stop_tokens_that_leave_nothing_to_go_on_with_are_the_requests_fault(
    roomy: Engine,
) -> None:
    stops = frozenset({END, 9})  # "b", which is all that may follow
    hopeless = constrained("regex", "b{4}", stop_token_ids=stops)
    last = run(roomy, [replace(hopeless, drafting=Drafting(lookup=True))])["r"].last
    assert last is not None
    assert last.error_kind == "request"
    assert "stop tokens" in (last.error or "")


class Stalled:
    """A compiler that stands still until it is told to go on, and knows what it was asked for."""

    def __init__(self, grammars: TokenGrammars) -> None:
        self._grammars = grammars
        self.ends = grammars.ends
        self.go_on = Event()
        self.begun = Event()
        self.asked: list[str] = []

    def compile(self, constraint: Constraint) -> Matcher:
        self.asked.append(constraint.source)
        self.begun.set()
        assert self.go_on.wait(60)
        return self._grammars.compile(constraint)

    def fill(self, wanted: Sequence[Masked[Matcher]], bits: npt.NDArray[np.int32]) -> None:
        self._grammars.fill(wanted, bits)


@pytest.fixture
def stalled(grammars: TokenGrammars) -> Iterator[Stalled]:
    stalled = Stalled(grammars)
    yield stalled
    stalled.go_on.set()


@pytest.fixture
def waiting(models: TurboModels, stalled: Stalled) -> Iterator[Engine]:
    """An engine whose compiler has stalled over `a{6}`, asked for by `r`."""
    engine = make_engine(models.path, constraints=stalled)
    engine.submit(constrained("regex", "a{6}"))
    assert stalled.begun.wait(60)
    yield engine
    stalled.go_on.set()
    engine.close()


def test_a_stalled_compilation_holds_up_nobody_without_a_constraint(waiting: Engine) -> None:
    plain = replace(constrained("regex", "a"), request_id="plain", constraint=None)
    said = run(waiting, [plain])["plain"]
    assert said.end[0] in ("stop", "length")


def test_a_request_cancelled_while_its_grammar_compiles_is_gone(
    waiting: Engine, stalled: Stalled
) -> None:
    waiting.cancel("r")
    stalled.go_on.set()
    again = replace(constrained("regex", "a{6}"), request_id="again")
    assert set(run(waiting, [again])) == {"again"}  # a delta of the other would be a KeyError
    assert waiting.step() is None
    assert stalled.asked == ["a{6}"], "compiled twice"


def test_what_is_cancelled_before_its_compilation_begins_is_not_compiled(
    waiting: Engine, stalled: Stalled
) -> None:
    waiting.submit(replace(constrained("regex", "b{6}"), request_id="b"))
    waiting.submit(replace(constrained("regex", "c{6}"), request_id="c"))
    waiting.cancel("b")
    said = {"r": Said(), "c": Said()}
    stalled.go_on.set()
    drive(waiting, said)
    assert stalled.asked == ["a{6}", "c{6}"]
