"""What each operation answers, and which errors, where FastAPI can't read it off the route."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from quickchange_server.api.openapi import response_models, response_models_experiments

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
    error: type[response_models.Answer] = response_models.Error

    def also(self, *statuses: int) -> Answers:
        """With more errors."""
        return replace(self, errors=self.errors | set(statuses))


def _json(model: Any, *errors: int, status: int = 200) -> Answers:
    return Answers(model, status=status, errors=_ALWAYS | set(errors))


def _posted(model: Any, *errors: int, status: int = 200) -> Answers:
    """Of a request with a body."""
    return _json(model, 413, *errors, status=status)


def _generated(model: Any, event: Any = None) -> Answers:
    events = None if event is None else event | response_models.Error
    return Answers(model, event=events, last_event="[DONE]", errors=_ALWAYS | _GENERATES)


def _lorax(model: Any, event: Any = None) -> Answers:
    events = None if event is None else event | response_models.LoraxError
    return Answers(model, event=events, errors=_LORAX, error=response_models.LoraxError)


_REFUSED = Answers(status=0, errors=frozenset({401, 422, 403}), error=response_models.LoraxError)
_STATE = Answers(
    response_models.State, errors=frozenset()
)  # a 503 of theirs is a state, not an error
_EXPERIMENT = _json(response_models_experiments.Experiment, 404)

OPERATIONS: Mapping[tuple[str, str], Answers] = {
    ("post", "/v1/completions"): _generated(
        response_models.Completion, response_models.CompletionEvent
    ),
    ("post", "/v1/chat/completions"): _generated(
        response_models.ChatCompletion, response_models.ChatEvent
    ),
    ("post", "/v1/embeddings"): _generated(response_models.Embeddings),
    ("get", "/v1/models"): _json(response_models.Models),
    ("get", "/v1/models/{model}"): _json(response_models.Model, 404),
    ("post", "/generate"): _lorax(response_models.LoraxAnswer),
    ("post", "/generate_stream"): _lorax(None, response_models.LoraxEvent),
    ("post", "/"): _lorax(list[response_models.LoraxAnswer], response_models.LoraxEvent),
    ("post", "/invocations"): _lorax(list[response_models.LoraxAnswer], response_models.LoraxEvent),
    ("get", "/info"): _lorax(response_models.LoraxInfo),
    ("post", "/embed"): _REFUSED,
    ("post", "/classify"): _REFUSED,
    ("post", "/classify_batch"): _REFUSED,
    ("post", "/v1/load_lora_adapter"): replace(_posted(None, 404, 409), content=TEXT),
    ("post", "/v1/unload_lora_adapter"): replace(_posted(None, 404, 409), content=TEXT),
    ("post", "/tokenize"): _posted(response_models.Tokens | list[response_models.TokenSpan], 404),
    ("post", "/detokenize"): _posted(response_models.Detokenized, 404),
    ("get", "/version"): _json(response_models.ServerVersion),
    ("get", "/v1/adapters"): _json(response_models.Adapters),
    ("post", "/v1/adapters"): _posted(response_models.AddedAdapter, 409, status=201),
    ("get", "/v1/adapters/{reference}"): _json(response_models.DescribedAdapter, 404),
    ("delete", "/v1/adapters/{reference}"): _json(response_models.RemovedAdapter, 404, 409),
    ("post", "/v1/adapters/{name}/rollback"): _posted(response_models.Served, 404, 409),
    ("post", "/v1/adapters/{reference}/pin"): _json(response_models.AdapterState, 404, status=202),
    ("post", "/v1/adapters/{reference}/unpin"): _json(
        response_models.AdapterState, 404, status=202
    ),
    ("post", "/v1/adapters/{reference}/prefetch"): _posted(
        response_models.AdapterState, 404, status=202
    ),
    ("get", "/v1/aliases"): _json(response_models.Aliases),
    ("put", "/v1/aliases/{alias}"): _posted(response_models.Alias, 404, 409),
    ("delete", "/v1/aliases/{alias}"): _json(response_models.RemovedAlias, 404, 409),
    ("post", "/v1/experiments"): replace(_EXPERIMENT, status=201).also(409, 413),
    ("get", "/v1/experiments"): _json(response_models_experiments.Experiments),
    ("get", "/v1/experiments/{name}"): _EXPERIMENT,
    ("patch", "/v1/experiments/{name}"): _EXPERIMENT.also(409, 413),
    ("delete", "/v1/experiments/{name}"): _json(response_models_experiments.DeletedExperiment, 404),
    ("get", "/v1/experiments/{name}/results"): _json(response_models_experiments.Results, 404),
    ("get", "/v1/experiments/{name}/audit"): _json(response_models_experiments.AuditTrail, 404),
    ("post", "/v1/experiments/{name}/pause"): _EXPERIMENT.also(409),
    ("post", "/v1/experiments/{name}/resume"): _EXPERIMENT.also(409),
    ("post", "/v1/experiments/{name}/stop"): _EXPERIMENT.also(409, 413),
    ("post", "/v1/experiments/{name}/promote"): _posted(
        response_models_experiments.MovedAlias, 404, 409
    ),
    ("post", "/v1/experiments/{name}/rollback"): _json(
        response_models_experiments.MovedAlias, 404, 409
    ),
    ("post", "/v1/experiments/{name}/outcomes"): _posted(
        response_models_experiments.KeptOutcomes, 404, 409, status=201
    ),
    ("post", "/v1/keys"): _posted(response_models.NewApiKey, status=201),
    ("get", "/v1/keys"): _json(response_models.ApiKeys),
    ("get", "/v1/keys/{id}"): _json(response_models.ApiKey, 404),
    ("patch", "/v1/keys/{id}"): _posted(response_models.ApiKey, 404, 409),
    ("delete", "/v1/keys/{id}"): _json(response_models.ApiKey, 404),
    ("post", "/v1/keys/{id}/rotate"): _posted(response_models.NewApiKey, 404, 409),
    ("get", "/v1/usage"): _json(response_models.UsageReport),
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
