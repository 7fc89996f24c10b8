"""The server's OpenAPI document for schemathesis, and servers with names that requests can hit."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import schemathesis
from http_support import BASE, BASE_SPEC, Live, live_server, make_adapter, make_turbo
from keys_support import created, keyed_server
from schemathesis import Case, HookContext
from schemathesis.config import SchemathesisConfig
from schemathesis.schemas import BaseSchema
from text_support import byte_text

from quickchange_server.config import Settings
from quickchange_server.entrypoints.app import create_app

SEED = 20260101
EXPERIMENT = "trial"
ADAPTERS = ("sql", "team/notes", "turbo")
SERVED = (BASE, *ADAPTERS, "live", EXPERIMENT, "sql@1")
PATH_NAMES = {
    "model": SERVED,
    "reference": (*ADAPTERS, "sql@1"),
    "name": ("sql", "turbo", EXPERIMENT),
    "alias": ("live", "other"),
}
GENERATING = frozenset(
    {
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/messages",
        "/v1/responses",
        "/v1/embeddings",
        "/pooling",
        "/classify",
        "/score",
        "/rerank",
        "/generate",
        "/generate_stream",
        "/invocations",
        "/",
    }
)
SHORT = {
    "prompt": "Hello",
    "input": "Hello",
    "inputs": "Hello",
    "messages": [{"role": "user", "content": "Hello"}],
}
MAX_MODEL_LEN = 64  # tokens: what is fuzzed is requests, so answers are short


def document(**changes: Any) -> dict[str, Any]:
    """/openapi.json of a server with these settings."""
    settings = Settings(model="unused", store=Path("unused"), **changes)
    return create_app(settings, text=byte_text(), base=lambda: BASE_SPEC).openapi()


def schema_of(openapi: dict[str, Any], *, examples: int) -> BaseSchema:
    """The document to be fuzzed: seeded, valid and invalid requests, names that are there."""
    config = SchemathesisConfig.from_dict(
        {
            "seed": SEED,
            "generation": {
                "mode": "all",
                "max-examples": examples,
                "deterministic": True,
                "no-shrink": True,
                "with-security-parameters": False,  # the key is the client's
            },
            "operations": [
                {
                    # a name may have slashes: GET /v1/adapters/sql/pin asks for one "sql/pin"
                    "include-path-regex": "^/v1/(adapters|experiments)/{[a-z]+}/",
                    "checks": {
                        "allow_header_conformance": {"enabled": False},
                        "unsupported_method": {"enabled": False},
                    },
                },
                {
                    # of a query's field that comes twice the last one counts
                    "include-path-regex": "^/v1/(usage|keys)$",
                    "include-method": "GET",
                    "checks": {"negative_data_rejection": {"enabled": False}},
                },
            ],
            # a schema can't say which names exist, nor which fields go together
            "checks": {"positive_data_acceptance": {"enabled": False}},
            "phases": {"stateful": {"enabled": False}},
            "warnings": False,
        }
    )
    schema = schemathesis.openapi.from_dict(openapi, config=config)
    choice = random.Random(SEED)

    @schema.hook
    def map_path_parameters(_context: HookContext, parameters: Any) -> Any:
        for name, known in PATH_NAMES.items():
            if isinstance(parameters, dict) and name in parameters and choice.random() < 0.5:
                parameters[name] = choice.choice(known)
        return parameters

    @schema.hook
    def map_body(_context: HookContext, body: Any) -> Any:
        named = isinstance(body, dict) and isinstance(body.get("model"), str)
        if named and choice.random() < 0.7:
            body["model"] = choice.choice(SERVED)
        return body

    return schema


@contextmanager
def filled_server(store: Path, *, keyed: bool) -> Iterator[Live]:
    """A server with adapters, an alias and an experiment. Where keys are asked for, its client
    brings an admin's."""
    server = keyed_server if keyed else live_server
    with server(store, max_model_len=MAX_MODEL_LEN, max_queue=512) as live:
        fill(live)
        yield live


def fill(live: Live) -> None:
    """Have the adapters, the alias and the experiment there that requests name."""
    live.store.add("sql", make_adapter(1.0))
    live.store.add("team/notes", make_adapter(2.0))
    live.store.add("turbo", make_turbo(3.0, lora=True))
    live.store.alias("live", "sql")
    variants = [{"name": "now", "model": BASE}, {"name": "tuned", "model": "sql"}]
    body = {"name": EXPERIMENT, "variants": variants, "metrics": [{"name": "liked"}]}
    made = live.post("/v1/experiments", {**body, "alias": "winner"})
    assert made.status_code in (201, 409), made.text


class Fuzzer:
    """Sends cases to a server, holds the answers against the document, and counts them."""

    def __init__(self, live: Live) -> None:
        self._live = live
        self._choice = random.Random(SEED)
        self._keys = [created(live, tenant=f"tenant-{k}")[0] for k in range(2)]
        self.counts: Counter[tuple[str, int]] = Counter()  # by operation and status

    def table(self) -> str:
        """What was asked and answered, an operation a line."""
        lines = []
        for label in sorted({label for label, _ in self.counts}):
            told = {status: n for (of, status), n in sorted(self.counts.items()) if of == label}
            lines.append(f"{sum(told.values()):6} {label}: {told}")
        return "\n".join(lines)

    def check(self, case: Case) -> None:
        """Raises schemathesis' failures."""
        if case.meta is not None and case.meta.generation.mode.is_positive:
            self._ease(case)
        if "id" in case.path_parameters and self._choice.random() < 0.5:
            case.path_parameters["id"] = self._choice.choice(self._keys)
        given = {k: v for k, v in self._live.http.headers.items() if k == "authorization"}
        response = case.call(base_url=self._live.url, headers=given)
        self.counts[case.operation.label, response.status_code] += 1
        case.validate_response(response, headers=given)
        if case.method == "DELETE" and response.status_code == 200:
            fill(self._live)

    def _ease(self, case: Case) -> None:
        """Make a valid request to generate more likely to be answered: few of its options at once,
        which may exclude each other, a name that is there, a short text for a prompt."""
        body = case.body
        if case.path in GENERATING and isinstance(body, dict):
            eased = self._some(body, ("model", "prompt", "messages", "inputs", "input", "stream"))
            for name, short in SHORT.items():
                if name in eased and self._choice.random() < 0.8:
                    eased[name] = short
            if isinstance(eased.get("parameters"), dict):
                eased["parameters"] = self._some(eased["parameters"], ())
            if case.path == "/v1/messages":
                eased["max_tokens"] = 2  # it must be given
            if "model" in eased:
                eased["model"] = self._choice.choice(SERVED)
            case.body = eased

    def _some(self, fields: dict[str, Any], kept: tuple[str, ...]) -> dict[str, Any]:
        """At most two of the fields, beside those that are kept."""
        others = [name for name in fields if name not in kept]
        chosen = self._choice.sample(others, min(len(others), self._choice.randrange(3)))
        return {name: value for name, value in fields.items() if name in kept or name in chosen}
