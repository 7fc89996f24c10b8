"""Translation of LoRAX's bodies into bodies of OpenAI's route for completions."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from quickchange_server.api.app_state import Services
from quickchange_server.api.lorax.requests import (
    AdapterParameters,
    GenerateRequest,
    LoraxResponseFormat,
    MergedAdapters,
    Parameters,
)
from quickchange_server.api.openai import request_selection
from quickchange_server.api.openai.request_selection import Order
from quickchange_server.api.openai.requests import CompletionRequest
from quickchange_server.errors import InvalidRequestError, UnknownModelError
from quickchange_server.frontend.caller import Caller
from quickchange_server.frontend.request_base import SAMPLING, Json
from quickchange_server.protocol import Component
from quickchange_store.combining.merging import Recipe

BASE_ID = "__base_model__"  # LoRAX's adapter id of the plain base model
# Sampling parameters with the same name and meaning. LoRAX's temperature has another meaning, and
# its seed another range.
SHARED = tuple(
    name
    for name in SAMPLING
    if name in Parameters.model_fields and name not in ("temperature", "seed")
)


def completion(services: Services, request: GenerateRequest, *, tokens: bool) -> CompletionRequest:
    """The request as a completion, with a seed drawn if it has none.

    `tokens`: the answer lists its tokens. Raises RequestValidationError and InvalidRequestError for
    what a completion can't express.
    """
    given = request.parameters
    seed = services.seeds.draw() if given.seed is None else given.seed
    body = {
        **{name: getattr(given, name) for name in SHARED},
        **chosen(services, given),
        "prompt": request.inputs,
        "max_tokens": given.max_new_tokens,
        "n": given.candidates,
        "include_stop_str_in_output": True,  # LoRAX leaves it in the text
        "seed": seed if seed < 2**63 else seed - 2**64,  # the same 64 bits
        "ignore_eos": given.ignore_eos_token,
        "logprobs": given.alternatives if tokens else None,
        "response_format": _format(given.response_format),
        **({} if given.grammar is None else given.grammar.fields),
        "turbo": given.turbo,
        "user": given.user,
    }
    try:
        translated = CompletionRequest.model_validate(body)
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from error
    # Set after validation: LoRAX's temperatures have no upper bound, OpenAI's end at 2.
    changes: dict[str, float] = {"temperature": _temperature(given)}
    if given.decoder_input_details:
        changes["prompt_logprobs"] = 0
    return translated.model_copy(update=changes)


def _temperature(given: Parameters) -> float:
    if not given.sampling:
        return 0.0
    return 1.0 if given.temperature is None else given.temperature


def chosen(services: Services, given: AdapterParameters) -> Mapping[str, object]:
    """A completion's fields that name the same adapters."""
    base = services.catalog.base_name
    merged = given.merged_adapters
    if merged is not None:
        terms = zip(merged.ids, merged.weights, strict=True)
        return {"model": base, "adapters": [{"id": id_, "weight": w} for id_, w in terms]}
    return {"model": base if given.adapter_id in (None, "", BASE_ID) else given.adapter_id}


def _format(given: LoraxResponseFormat | None) -> Json | None:
    if given is None:
        return None
    if given.json_schema is None:
        return {"type": "json_object"}
    schema = {"name": "lorax", "schema": given.json_schema}
    return {"type": "json_schema", "json_schema": schema}


async def prompt(services: Services, request: GenerateRequest) -> list[int]:
    """The prompt's token ids, cut to the last `truncate`.

    Raises InvalidRequestError if they and `max_new_tokens` exceed the context.
    """
    given = request.parameters
    limit = services.engine.max_model_len
    inputs = request.inputs
    if given.truncate is not None:  # what is cut off needs no tokens
        inputs = inputs[-limit * services.text.longest_token :]
    most = limit if given.truncate is None else len(inputs)
    ids = await services.text.encode(inputs, most=most, param="inputs")
    if given.truncate is not None:
        if given.truncate >= limit:
            raise InvalidRequestError(
                f"`truncate` must be strictly positive and less than {limit}. "
                f"Given: {given.truncate}",
                param="truncate",
            )
        if len(ids) > given.truncate:
            ids = await _truncated(services, inputs, ids, given.truncate)
    if len(ids) >= limit:
        raise InvalidRequestError(
            f"`inputs` must have less than {limit} tokens. Given: {len(ids)}", param="inputs"
        )
    if given.max_new_tokens is not None and len(ids) + given.max_new_tokens > limit:
        raise InvalidRequestError(
            f"`inputs` tokens + `max_new_tokens` must be <= {limit}. Given: {len(ids)} `inputs` "
            f"tokens and {given.max_new_tokens} `max_new_tokens`",
            param="max_new_tokens",
        )
    return ids


async def _truncated(services: Services, text: str, ids: list[int], length: int) -> list[int]:
    """The text's last tokens, `length` with the special tokens that the tokenizer put around it."""
    bare = await services.text.encode(
        text, most=len(text), param="inputs", add_special_tokens=False
    )
    around = len(ids) - len(bare)
    starts = range(around + 1) if 0 < around < length else ()
    for start in starts:
        if ids[start : start + len(bare)] == bare:
            return ids[:start] + bare[around - length :] + ids[start + len(bare) :]
    return ids[-length:]


async def selected(
    services: Services,
    caller: Caller,
    headers: Mapping[str, str],
    given: AdapterParameters,
    wanted: CompletionRequest,
) -> Order[CompletionRequest]:
    """The completion with what serves it, merged as asked for.

    Raises what `select` raises, and InvalidRequestError.
    """
    try:
        order = await request_selection.select(services, caller, wanted, headers)
    except UnknownModelError as error:
        fetches = services.on_demand is not None
        remedy = "" if fetches else _remedy(given.adapter_source or "hub", caller)
        raise UnknownModelError(error.message + remedy, param=error.param) from error
    return await _merged(services, order, given.merged_adapters)


def _remedy(source: str, caller: Caller) -> str:
    """Advice for a missing adapter."""
    adding = "have whoever runs it add it"
    if caller.may("admin"):
        adding = "add it once (POST /v1/adapters, or `quickchange adapters add`)"
    elif caller.may("manage"):
        adding = "add it once (POST /v1/adapters)"
    return (
        f". Adapters are served from this server's store, and nothing is fetched from {source!r} "
        f"when a request comes: {adding}"
    )


MERGEABLE = ("LoRA", "Turbo LoRA", "aLoRA", "Turbo aLoRA")  # values of `AdapterInfo.kind`


async def _merged(
    services: Services, order: Order[CompletionRequest], given: MergedAdapters | None
) -> Order[CompletionRequest]:
    """The order with the merge that `given` asks for, which is computed at admission.

    The order's selection is already the linear composition, its names looked up for this caller. A
    single adapter is not merged but served at its weight, as in PEFT. Raises InvalidRequestError.
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
        await _check_kind(services, component, given)
    recipe = Recipe(
        given.merge_strategy,
        tuple((component.digest, component.weight) for component in components),
        density=given.density,
        sign_method=given.majority_sign_method,
    )
    return replace(order, derive=partial(services.derived.digest, recipe))


async def _check_kind(services: Services, component: Component, given: MergedAdapters) -> None:
    kind = (await asyncio.to_thread(services.catalog.info, component.digest)).kind
    if kind and kind not in MERGEABLE:  # "": added by an earlier release, checked at the merge
        raise InvalidRequestError(
            f"merged_adapters: the version {component.digest[:12]} among {', '.join(given.ids)} is "
            f"of kind {kind}, and {given.merge_strategy} merges LoRAs; take it out, or use the "
            'strategy "linear", which is exact for every kind',
            param="merged_adapters",
        )
