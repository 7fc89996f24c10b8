"""Routes of vLLM that clients use: loading and unloading adapters, tokens, version, ping."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Self

from fastapi import APIRouter, Depends, Response
from fastapi.responses import PlainTextResponse
from pydantic import AfterValidator, ConfigDict, Field, model_validator

from quickchange_server.adapter_registry.adapter_places import allowed_place
from quickchange_server.api.admin.adapters import (
    adapters_on,
    remove_reference,
    uses_hidden,
)
from quickchange_server.api.app_state import VERSION, Injected, Services
from quickchange_server.api.auth import INFER, MANAGE, Calling, Managing, check_own
from quickchange_server.api.json_bodies import JsonRoute
from quickchange_server.api.openai.chat.chat_requests import ChatRendering, Messages, chat_length
from quickchange_server.api.openai.chat.tool_calling import tools_form
from quickchange_server.api.openai.chat.tool_requests import Tools
from quickchange_server.api.openapi.response_models import (
    DetokenizedText,
    ServerLoad,
    ServerVersion,
    TokenizedPrompt,
    TokenizerInfo,
    TokenSpan,
)
from quickchange_server.api.openapi.route_responses import COMMON_ERRORS, PLAIN_TEXT, errors
from quickchange_server.errors import ContextLengthError, InvalidRequestError, UnknownModelError
from quickchange_server.frontend.caller import Caller
from quickchange_server.frontend.context_length import CONTEXTS
from quickchange_server.frontend.request_base import MAX_PATH, Body, Json, Name, check_text

router = APIRouter(route_class=JsonRoute, tags=["vLLM"], responses=COMMON_ERRORS)

ValidText = Annotated[str, AfterValidator(check_text)]


class LoadLora(Body):
    # The LoRA syncer names the base; an adapter is checked against the one served, in any case.
    hints = frozenset({"base_model_name", "is_3d_lora_weight"})

    lora_name: Name = Field(min_length=1)
    lora_path: str = Field(min_length=1, max_length=MAX_PATH)
    load_inplace: bool = False  # true: publish a new version if the name exists


class UnloadLora(Body):
    hints = frozenset({"lora_int_id"})

    lora_name: Name = Field(min_length=1)


_FORMS = {"prompt": "string", "messages": "array", "inputs": "string"}


class Tokenize(ChatRendering):
    """Body of /tokenize: one of `prompt`, `messages` and LoRAX's `inputs`."""

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [
                {"required": [name], "properties": {name: {"type": kind}}}
                for name, kind in _FORMS.items()
            ]
        }
    )

    model: Name | None = None
    prompt: ValidText | None = None
    inputs: ValidText | None = None
    messages: Messages | None = None
    tools: Tools = Field(default=[])
    add_special_tokens: bool | None = None  # default: true for a prompt, false for a chat
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        given = (self.prompt, self.messages, self.inputs)
        if given.count(None) != 2:
            raise InvalidRequestError(
                "prompt: give either prompt or messages, or inputs for LoRAX's answer",
                param="prompt",
            )
        for name in ("tools", "documents", "chat_template_kwargs", "continue_final_message"):
            if getattr(self, name) and self.messages is None:
                raise InvalidRequestError(
                    f"{name}: belongs to a chat's prompt alone; give messages, or remove it",
                    param=name,
                )
        return self


class Detokenize(Body):
    model: Name | None = None
    tokens: list[int]  # no longer than the context


@router.post(
    "/v1/load_lora_adapter",
    dependencies=[Depends(MANAGE), Depends(adapters_on)],
    response_class=Response,
    responses=PLAIN_TEXT | errors(404, 409, 413),
)
async def load_lora_adapter(body: LoadLora, services: Injected, caller: Managing) -> Response:
    """Import an adapter from a folder or a URL and load it to the device."""
    return await load_named(services, caller, body)


async def load_named(services: Services, caller: Caller, body: LoadLora) -> Response:
    """The response to an adapter's load."""
    check_own(caller, body.lora_name, "lora_name")
    name, place = body.lora_name, allowed_place(services.settings, body.lora_path, "lora_path")
    if name in services.store.snapshot().entries and not body.load_inplace:
        raise InvalidRequestError(
            f"lora_name: the lora adapter '{name}' has already been loaded. If you want to load "
            "the adapter in place, set 'load_inplace' to True.",
            param="lora_name",
        )
    if isinstance(place, Path) and not place.is_dir():
        raise UnknownModelError(
            f"lora_path: no adapter found for '{name}': {body.lora_path} is not a folder of the "
            "server's machine",
            param="lora_path",
        )
    with uses_hidden(caller):
        added = await services.imports.add(name, place)
    services.client.prefetch(added.version.digest)
    return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")


@router.post(
    "/v1/unload_lora_adapter",
    dependencies=[Depends(MANAGE), Depends(adapters_on)],
    response_class=Response,
    responses=PLAIN_TEXT | errors(404, 409, 413),
)
async def unload_lora_adapter(body: UnloadLora, services: Injected, caller: Managing) -> Response:
    """Remove an adapter's name with all its versions."""
    return await unload_named(services, caller, body.lora_name)


async def unload_named(services: Services, caller: Caller, name: str) -> Response:
    """The response to the removal of a name."""
    if not caller.sees(name) or name not in services.store.snapshot().entries:
        raise UnknownModelError(
            f"lora_name: the lora adapter '{name}' cannot be found.", param="lora_name"
        )
    await remove_reference(services, caller, name)
    return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")


@router.post(
    "/tokenize", response_model=TokenizedPrompt | list[TokenSpan], responses=errors(404, 413)
)
async def tokenize(body: Tokenize, services: Injected, caller: Calling) -> Json | list[Json]:
    """Token ids of a prompt or a chat, the same as in the generation routes.

    For `inputs` the answer is LoRAX's: a list of tokens, each with its span in the text.
    """
    services = await _of_model(services, caller, body.model)
    if body.inputs is not None:
        return await _spans(services, body.inputs, body.add_special_tokens is not False)
    ids = await _tokens(services, body)
    names = [services.text.token_name(i) for i in ids] if body.return_token_strs else None
    return {
        "count": len(ids),
        "max_model_len": services.engine.max_model_len,
        "tokens": ids,
        "token_strs": names,
    }


async def _spans(services: Services, text: str, special: bool) -> list[Json]:
    return [
        {"id": token_id, "text": services.text.token_name(token_id), "start": start, "stop": stop}
        for token_id, start, stop in await services.text.spans(
            text, most=_most(services), param="inputs", add_special_tokens=special
        )
    ]


async def _tokens(services: Services, body: Tokenize) -> list[int]:
    if body.prompt is not None:
        special = body.add_special_tokens is not False
        return await services.text.encode(
            body.prompt, most=_most(services), param="prompt", add_special_tokens=special
        )
    messages = body.messages or []
    tools_form(services.text, messages, body.tools)
    return await services.text.encode_chat(
        lambda: [message.for_template() for message in messages],
        chat_length(messages, body.tools) + body.rendered_length,
        most=_most(services),
        param="messages",
        tools=lambda: [tool.for_template() for tool in body.tools],
        how=body.how,
        add_special_tokens=bool(body.add_special_tokens),
    )


def _most(services: Services) -> int:
    """The most tokens that are counted or decoded, so that one can see how much is too much."""
    return CONTEXTS * services.engine.max_model_len


@router.post("/detokenize", response_model=DetokenizedText, responses=errors(404, 413))
async def detokenize(body: Detokenize, services: Injected, caller: Calling) -> Json:
    """Text of token ids, special tokens included."""
    services = await _of_model(services, caller, body.model)
    if len(body.tokens) > _most(services):
        raise ContextLengthError(
            f"tokens: has {len(body.tokens)} tokens, of {_most(services)} at most; send fewer",
            param="tokens",
        )
    services.text.check_ids(body.tokens, "tokens")
    return {"prompt": await asyncio.to_thread(services.text.decode, body.tokens)}


async def _of_model(services: Services, caller: Caller, model: str | None) -> Services:
    """The services with the tokenizer of `model`; None: the base's. Raises for an unknown one."""
    if model is None:
        return services
    selection = services.catalog.select(model, sees=caller.sees)
    return replace(services, text=await services.texts.of(selection.tokenizer))


@router.get("/tokenizer_info", dependencies=[Depends(INFER)], response_model=TokenizerInfo)
async def tokenizer_info(services: Injected) -> Json:
    """The tokenizer's configuration and chat template, as in its tokenizer_config.json."""
    return services.text.configuration()


@router.get("/load", dependencies=[Depends(INFER)], response_model=ServerLoad)
async def load(services: Injected) -> Json:
    """The number of sequences in flight."""
    return {"server_load": services.client.in_flight}


@router.get("/version", dependencies=[Depends(INFER)], response_model=ServerVersion)
async def version() -> Json:
    return {"version": VERSION}
