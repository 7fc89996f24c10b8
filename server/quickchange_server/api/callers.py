"""Who calls, as the routes are told it."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request

from quickchange_server.callers import ANYONE, Caller


async def caller_of(_request: Request) -> Caller:
    return ANYONE


Calling = Annotated[Caller, Depends(caller_of)]
