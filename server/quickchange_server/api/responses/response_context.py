"""What a response answers: its own input behind the conversation that it continues, if any."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass

from quickchange_server.api.openai.chat.chat_requests import MAX_MESSAGES
from quickchange_server.api.responses.response_items import ContextItem, ItemReference, item_of
from quickchange_server.api.responses.response_requests import ResponseRequest
from quickchange_server.errors import (
    InvalidRequestError,
    NotFoundError,
    UnsupportedParameterError,
)
from quickchange_server.frontend.caller import Caller
from quickchange_server.frontend.request_base import Json
from quickchange_server.storage.responses.stored_responses import Kept, StoredResponses
from quickchange_server.storage.responses.tables_responses import Owner

SWITCH = "the setting store_responses, which is off"
_PREFIXES = {"message": "msg", "function_call": "fc", "function_call_output": "fco"}
_ITEM_ID = re.compile(r"[a-z]+_([0-9a-f]{32})i?\d+")
_ANSWERED = ("completed", "incomplete")


def item_id(response_id: str, kind: str, number: int, *, given: bool = False) -> str:
    """The id of an item of a response, from which `_response_of` tells the response. `given`: of
    its input."""
    unique = response_id.partition("_")[2]
    return f"{_PREFIXES.get(kind, 'rs')}_{unique}{'i' if given else ''}{number}"


def _response_of(item: str) -> str | None:
    """The id of the response that has the item; None for an id that no item here has."""
    found = _ITEM_ID.fullmatch(item)
    return None if found is None else f"resp_{found[1]}"


def owner_of(caller: Caller) -> Owner:
    return Owner(caller.tenant, caller.key or "")


@dataclass(frozen=True, slots=True)
class Context:
    """The items that a response answers, in order."""

    items: Sequence[ContextItem]
    places: Sequence[str]  # of each item: the body's field that it came from
    continued: tuple[str, ...] = ()  # ids of the responses before it, the nearest first
    own: int = 0  # items of the body's own input, the last ones

    def stored_input(self, response_id: str) -> list[Json]:
        """The body's own items as they are kept."""
        items = self.items[len(self.items) - self.own :]
        return [
            {"id": item.id or item_id(response_id, item.type, number, given=True), **item.stored()}
            for number, item in enumerate(items)
        ]


async def context_of(store: StoredResponses | None, owner: Owner, body: ResponseRequest) -> Context:
    """The context of a request.

    Raises UnsupportedParameterError where it needs responses to be stored, NotFoundError for one
    that is not there, and InvalidRequestError for a conversation that is too long.
    """
    references = [item for item in body.input if isinstance(item, ItemReference)]
    previous = body.previous_response_id
    if store is None and (references or previous is not None):
        raise _not_stored(body)
    own: list[ContextItem]
    if store is None or not references:
        own = [item for item in body.input if not isinstance(item, ItemReference)]
    else:
        own = await _resolved(store, owner, body)
    turns: list[Kept] = []
    if store is not None and previous is not None:
        turns = await store.conversation(owner, previous, "previous_response_id")
        _check_answered(turns[-1])
    earlier = [item for turn in turns for item in (*turn.input, *turn.response["output"])]
    if len(earlier) + len(own) > MAX_MESSAGES:
        raise InvalidRequestError(
            f"previous_response_id: with it this conversation has more than {MAX_MESSAGES} items; "
            "begin a new one with what is still needed of it in input",
            param="previous_response_id",
        )
    before = await asyncio.to_thread(lambda: [item_of(item) for item in earlier])
    return Context(
        items=[*before, *own],
        places=[
            *("previous_response_id" for _ in before),
            *(f"input[{index}]" for index in range(len(own))),
        ],
        continued=tuple(turn.id for turn in reversed(turns)),
        own=len(own),
    )


def _not_stored(body: ResponseRequest) -> UnsupportedParameterError:
    if body.previous_response_id is not None:
        return UnsupportedParameterError(
            "previous_response_id: this server keeps no responses: send the conversation in input, "
            f"or have its operator switch on {SWITCH}",
            param="previous_response_id",
        )
    place = next(
        f"input[{index}]" for index, item in enumerate(body.input) if item.type == "item_reference"
    )
    return UnsupportedParameterError(
        f"{place}: an item_reference needs stored responses, and this server keeps none: send the "
        f"item itself (store: false makes clients do so), or have its operator switch on {SWITCH}",
        param=place,
    )


async def _resolved(
    store: StoredResponses, owner: Owner, body: ResponseRequest
) -> list[ContextItem]:
    """The body's items, with what is referred to in the references' places."""
    ids = {
        response
        for item in body.input
        if isinstance(item, ItemReference) and (response := _response_of(item.id))
    }
    kept = await store.several(owner, sorted(ids), "input")
    known = {
        item["id"]: item
        for each in kept.values()
        for item in (*each.input, *each.response["output"])
    }
    items: list[ContextItem] = []
    for index, item in enumerate(body.input):
        if not isinstance(item, ItemReference):
            items.append(item)
        elif item.id in known:
            items.append(item_of(known[item.id]))
        else:
            place = f"input[{index}].id"
            raise NotFoundError(
                f"{place}: no stored response has an item {item.id!r}; send the item itself",
                param=place,
            )
    return items


def _check_answered(last: Kept) -> None:
    status = last.response["status"]
    if status not in _ANSWERED:
        raise InvalidRequestError(
            f"previous_response_id: the response {last.id!r} is {status}, and can't be continued; "
            "give the one before it",
            param="previous_response_id",
        )
