"""The route for models, /v1/models: every name that a request's `model` may hold.

In OpenAI's form, or in Anthropic's for its clients."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime

from fastapi import APIRouter, Request

from quickchange_server.adapter_registry.visibility import seen
from quickchange_server.api.app_state import Injected, Services
from quickchange_server.api.auth import Calling
from quickchange_server.api.openapi.message_models import AnthropicModel, AnthropicModels
from quickchange_server.api.openapi.response_models import ModelCard, ModelList
from quickchange_server.api.openapi.route_responses import COMMON_ERRORS, errors
from quickchange_server.experiments.experiment import Experiment
from quickchange_server.frontend.caller import Caller
from quickchange_server.frontend.request_base import Json
from quickchange_store.index import Index
from quickchange_store.names import Reference, parse_reference

router = APIRouter(tags=["OpenAI"], responses=COMMON_ERRORS)

OWNER = "quickchange"
ANTHROPIC_VERSION = "anthropic-version"  # a header of every request of Anthropic's clients


def _card(services: Services, name: str, created: float, details: Json, root: str) -> Json:
    info = services.client.info
    is_base = details["kind"] == "base"
    return {
        "id": name,
        "object": "model",
        "created": int(created),
        "owned_by": OWNER,
        "root": root,
        "parent": None if is_base else services.catalog.base_name,
        "max_model_len": None if info is None else info.max_model_len,
        "quickchange": details,
    }


def _base_card(services: Services) -> Json:
    name = services.catalog.base_name
    return _card(services, name, services.created, {"kind": "base"}, name)


def _version_card(services: Services, index: Index, reference: Reference, kind: str) -> Json:
    version, drafter = index.find(reference), index.drafting(reference)
    details = {
        "kind": kind,
        "version": version.number,
        "digest": version.digest,
        "turbo": None if drafter is None else str(drafter),
        **({"classifier": True} if version.classifier else {}),
        **({"activated": True} if version.invoked else {}),
    }
    return _card(services, str(reference), version.created, details, str(version))


def _adapter_cards(services: Services, index: Index) -> Iterator[Json]:
    for name, entry in sorted(index.entries.items()):
        yield _version_card(services, index, Reference(name), "adapter")
        for number in sorted(entry.versions):
            yield _version_card(services, index, Reference(name, str(number)), "version")
    for alias in sorted(index.aliases):
        yield _version_card(services, index, Reference(alias), "alias")


def _experiment_card(services: Services, experiment: Experiment) -> Json:
    details = {"kind": "experiment", "state": experiment.state}
    name = experiment.name
    return _card(services, name, experiment.created, details, name)


def _anthropics(card: Json) -> Json:
    """A card in Anthropic's form."""
    return {
        "type": "model",
        "id": card["id"],
        "display_name": card["id"],
        "created_at": datetime.fromtimestamp(card["created"], UTC).isoformat(),
        "lifecycle": "active",
        "max_input_tokens": card["max_model_len"],
        "max_tokens": card["max_model_len"],
    }


@router.get(
    "/v1/models", response_model=ModelList | AnthropicModels, response_model_exclude_unset=True
)
async def models(request: Request, services: Injected, caller: Calling) -> Json:
    """List the base model, adapters, their versions, aliases and experiments."""
    cards = [_base_card(services)]
    if services.settings.adapters:
        cards.extend(_adapter_cards(services, seen(services.store.snapshot(), caller.sees)))
    there = services.experiments.all
    cards.extend(_experiment_card(services, there[n]) for n in sorted(there) if caller.sees(n))
    if ANTHROPIC_VERSION not in request.headers:
        return {"object": "list", "data": cards}
    ids = [card["id"] for card in cards]
    data = [_anthropics(card) for card in cards]
    return {"data": data, "has_more": False, "first_id": ids[0], "last_id": ids[-1]}


@router.get(
    "/v1/models/{model:path}",
    response_model=ModelCard | AnthropicModel,
    response_model_exclude_unset=True,
    responses=errors(404),
)
async def one_model(model: str, request: Request, services: Injected, caller: Calling) -> Json:
    """One entry of the list; a digest prefix works too, as in requests."""
    card = _found(services, caller, model)
    return _anthropics(card) if ANTHROPIC_VERSION in request.headers else card


def _found(services: Services, caller: Caller, model: str) -> Json:
    if services.catalog.is_base(model):
        return _base_card(services)
    experiment = services.experiments.find(model) if caller.sees(model) else None
    if experiment is not None:
        return _experiment_card(services, experiment)
    services.catalog.select(model, sees=caller.sees)  # raises for what no request could name
    index = services.store.snapshot()
    return _version_card(services, index, parse_reference(model), _kind(index, model))


def _kind(index: Index, name: str) -> str:
    if name in index.aliases:
        return "alias"
    return "adapter" if name in index.entries else "version"
