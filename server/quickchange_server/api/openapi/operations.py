"""What each operation answers, and which errors, where FastAPI can't read it off the route."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from quickchange_server.api.openapi import answers, answers_experiments

JSON = "application/json"
EVENTS = "text/event-stream"
TEXT = "text/plain"

# What may come of nearly every operation: a wrong field, no key, its scope; the server's own state.
_ALWAYS = frozenset({400, 401, 403, 500, 503})
_LORAX = frozenset({401, 403, 413, 422, 424, 429, 500, 503})
_GENERATES = frozenset({404, 413, 424, 429})


@dataclass(frozen=True, slots=True)
class Answers:
    """One operation's success, and the statuses of its errors."""

    model: Any = None  # a type that pydantic knows; None: not JSON, or events alone
    status: int = 200
    content: str = JSON
    event: Any = None  # a type: of the events that are streamed where the request asks for them
    last_event: str | None = None  # the data of an event that is no JSON
    errors: frozenset[int] = _ALWAYS
    error: type[answers.Answer] = answers.Error

    def also(self, *statuses: int) -> Answers:
        """With more errors."""
        return replace(self, errors=self.errors | set(statuses))


def _json(model: Any, *errors: int, status: int = 200) -> Answers:
    return Answers(model, status=status, errors=_ALWAYS | set(errors))


def _posted(model: Any, *errors: int, status: int = 200) -> Answers:
    """Of a request with a body."""
    return _json(model, 413, *errors, status=status)


def _generated(model: Any, event: Any = None) -> Answers:
    events = None if event is None else event | answers.Error
    return Answers(model, event=events, last_event="[DONE]", errors=_ALWAYS | _GENERATES)


def _lorax(model: Any, event: Any = None) -> Answers:
    events = None if event is None else event | answers.LoraxError
    return Answers(model, event=events, errors=_LORAX, error=answers.LoraxError)


_REFUSED = Answers(status=0, errors=frozenset({401, 422, 403}), error=answers.LoraxError)
_STATE = Answers(answers.State, errors=frozenset())  # a 503 of theirs is a state, not an error
_EXPERIMENT = _json(answers_experiments.Experiment, 404)

OPERATIONS: Mapping[tuple[str, str], Answers] = {
    ("post", "/v1/completions"): _generated(answers.Completion, answers.CompletionEvent),
    ("post", "/v1/chat/completions"): _generated(answers.ChatCompletion, answers.ChatEvent),
    ("post", "/v1/embeddings"): _generated(answers.Embeddings),
    ("get", "/v1/models"): _json(answers.Models),
    ("get", "/v1/models/{model}"): _json(answers.Model, 404),
    ("post", "/generate"): _lorax(answers.LoraxAnswer),
    ("post", "/generate_stream"): _lorax(None, answers.LoraxEvent),
    ("post", "/"): _lorax(list[answers.LoraxAnswer], answers.LoraxEvent),
    ("post", "/invocations"): _lorax(list[answers.LoraxAnswer], answers.LoraxEvent),
    ("get", "/info"): _lorax(answers.LoraxInfo),
    ("post", "/embed"): _REFUSED,
    ("post", "/classify"): _REFUSED,
    ("post", "/classify_batch"): _REFUSED,
    ("post", "/v1/load_lora_adapter"): replace(_posted(None, 404, 409), content=TEXT),
    ("post", "/v1/unload_lora_adapter"): replace(_posted(None, 404, 409), content=TEXT),
    ("post", "/tokenize"): _posted(answers.Tokens | list[answers.TokenSpan], 404),
    ("post", "/detokenize"): _posted(answers.Detokenized, 404),
    ("get", "/version"): _json(answers.ServerVersion),
    ("get", "/v1/adapters"): _json(answers.Adapters),
    ("post", "/v1/adapters"): _posted(answers.AddedAdapter, 409, status=201),
    ("get", "/v1/adapters/{reference}"): _json(answers.DescribedAdapter, 404),
    ("delete", "/v1/adapters/{reference}"): _json(answers.RemovedAdapter, 404, 409),
    ("post", "/v1/adapters/{name}/rollback"): _posted(answers.Served, 404, 409),
    ("post", "/v1/adapters/{reference}/pin"): _json(answers.AdapterState, 404, status=202),
    ("post", "/v1/adapters/{reference}/unpin"): _json(answers.AdapterState, 404, status=202),
    ("post", "/v1/adapters/{reference}/prefetch"): _posted(answers.AdapterState, 404, status=202),
    ("get", "/v1/aliases"): _json(answers.Aliases),
    ("put", "/v1/aliases/{alias}"): _posted(answers.Alias, 404, 409),
    ("delete", "/v1/aliases/{alias}"): _json(answers.RemovedAlias, 404, 409),
    ("post", "/v1/experiments"): replace(_EXPERIMENT, status=201).also(409, 413),
    ("get", "/v1/experiments"): _json(answers_experiments.Experiments),
    ("get", "/v1/experiments/{name}"): _EXPERIMENT,
    ("patch", "/v1/experiments/{name}"): _EXPERIMENT.also(409, 413),
    ("delete", "/v1/experiments/{name}"): _json(answers_experiments.DeletedExperiment, 404),
    ("get", "/v1/experiments/{name}/results"): _json(answers_experiments.Results, 404),
    ("get", "/v1/experiments/{name}/audit"): _json(answers_experiments.AuditTrail, 404),
    ("post", "/v1/experiments/{name}/pause"): _EXPERIMENT.also(409),
    ("post", "/v1/experiments/{name}/resume"): _EXPERIMENT.also(409),
    ("post", "/v1/experiments/{name}/stop"): _EXPERIMENT.also(409, 413),
    ("post", "/v1/experiments/{name}/promote"): _posted(answers_experiments.MovedAlias, 404, 409),
    ("post", "/v1/experiments/{name}/rollback"): _json(answers_experiments.MovedAlias, 404, 409),
    ("post", "/v1/experiments/{name}/outcomes"): _posted(
        answers_experiments.KeptOutcomes, 404, 409, status=201
    ),
    ("post", "/v1/keys"): _posted(answers.NewApiKey, status=201),
    ("get", "/v1/keys"): _json(answers.ApiKeys),
    ("get", "/v1/keys/{id}"): _json(answers.ApiKey, 404),
    ("patch", "/v1/keys/{id}"): _posted(answers.ApiKey, 404, 409),
    ("delete", "/v1/keys/{id}"): _json(answers.ApiKey, 404),
    ("post", "/v1/keys/{id}/rotate"): _posted(answers.NewApiKey, 404, 409),
    ("get", "/v1/usage"): _json(answers.UsageReport),
    ("get", "/health"): _STATE,
    ("get", "/health/ready"): _STATE,
    ("get", "/health/live"): _STATE,
    ("get", "/ping"): _STATE,
    ("post", "/ping"): _STATE,
    ("get", "/metrics"): Answers(content=TEXT),
}

MEANINGS: Mapping[int, str] = {
    200: "As asked",
    201: "Made",
    202: "Asked of the engine; the answer does not wait for it",
    400: "A field is wrong: `param` is its place",
    401: "The server asks for API keys, and there is none or it is not valid",
    403: "Switched off by a setting, or outside the API key's scope or names",
    404: "There is no such name, or the API key does not see it",
    409: "The name is taken, or what is to be changed is in use or in another state",
    413: "The body is too large",
    422: "A field is wrong, or the route is not supported",
    424: "The adapter could not be loaded, or the request ended the engine repeatedly",
    429: "No room, in the queue or in a limit of the API key; see `Retry-After`",
    500: "The engine failed inside the request, or an error that nobody foresaw",
    503: "The server starts, drains or has failed, or its database is away; see `Retry-After`",
}
