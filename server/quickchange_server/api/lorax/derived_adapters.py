"""`merged_adapters` by ties and DARE: an order to serve a derived adapter."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from quickchange_server.api.app_state import Services
from quickchange_server.api.lorax.requests import MergedAdapters
from quickchange_server.api.openai.request_selection import Order
from quickchange_server.api.openai.requests import CompletionRequest
from quickchange_server.errors import InvalidRequestError
from quickchange_server.protocol import Component
from quickchange_store.merging import Recipe

MERGEABLE = ("LoRA", "Turbo LoRA")  # kinds, as `AdapterInfo.kind` tells them


def merged(
    services: Services, order: Order[CompletionRequest], given: MergedAdapters | None
) -> Order[CompletionRequest]:
    """The order with what `given` asks for.

    The order's selection is the linear composition already, whose names have been looked up for
    this caller. Like PEFT, one adapter alone is merged with nothing: it is served at its weight.
    Nothing is made yet. Raises InvalidRequestError.
    """
    if given is None or given.merge_strategy == "linear" or len(given.ids) == 1:
        return order
    components = order.selection.adapters
    if len(components) != len(given.ids):
        raise InvalidRequestError(
            f"merged_adapters: {given.merge_strategy} takes each adapter once and with a weight "
            "other than 0; ids that mean one version, or with weight 0, can't be told apart",
            param="merged_adapters",
        )
    for component in components:
        _check_kind(services, component, given)
    recipe = Recipe(
        given.merge_strategy,
        tuple((component.digest, component.weight) for component in components),
        density=given.density,
        sign_method=given.majority_sign_method,
    )
    return replace(order, derive=partial(services.derived.digest, recipe))


def _check_kind(services: Services, component: Component, given: MergedAdapters) -> None:
    kind = services.catalog.info(component.digest).kind
    if kind and kind not in MERGEABLE:  # unknown where an earlier release added it: found later
        raise InvalidRequestError(
            f"merged_adapters: the version {component.digest[:12]} among {', '.join(given.ids)} is "
            f"of kind {kind}, and {given.merge_strategy} merges LoRAs; take it out, or use the "
            'strategy "linear", which is exact for every kind',
            param="merged_adapters",
        )
