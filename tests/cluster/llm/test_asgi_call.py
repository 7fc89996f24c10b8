"""Calls of an ASGI application inside the process."""

from __future__ import annotations

import asyncio

import pytest
from starlette.types import Receive, Scope, Send

from quickchange_server.cluster.llm.asgi_call import UNREAD, asgi_call


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    message = await receive()
    kind = dict(scope["headers"])[b"content-type"]
    headers = [(b"content-type", kind), (b"x-sent", dict(scope["headers"])[b"x-sent"])]
    await send({"type": "http.response.start", "status": 201, "headers": headers})
    await send({"type": "http.response.body", "body": message["body"], "more_body": True})
    await send({"type": "http.response.body", "body": b"!"})


def test_the_answer_is_the_applications() -> None:
    async def scenario() -> None:
        async with asgi_call(echo, "/x", b"{}", {"X-Sent": "yes"}) as answer:
            assert (answer.status, answer.headers["x-sent"]) == (201, "yes")
            assert await answer.body() == b"{}!"

    asyncio.run(scenario())


def test_parts_come_while_the_application_still_answers_and_it_is_told_of_the_end() -> None:
    ended = asyncio.Event()

    async def endless(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        try:
            while True:
                await send({"type": "http.response.body", "body": b"x", "more_body": True})
        finally:
            ended.set()

    async def scenario() -> None:
        async with asgi_call(endless, "/x", b"", {}) as answer:
            assert await anext(answer.parts) == b"x"
            assert not ended.is_set()
        assert ended.is_set()

    asyncio.run(scenario())


def test_an_application_waits_for_its_reader() -> None:
    sent = 0

    async def endless(_scope: Scope, _receive: Receive, send: Send) -> None:
        nonlocal sent
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while True:
            await send({"type": "http.response.body", "body": b"x", "more_body": True})
            sent += 1

    async def scenario() -> None:
        async with asgi_call(endless, "/x", b"", {}):
            for _ in range(10 * UNREAD):
                await asyncio.sleep(0)
            assert sent == UNREAD

    asyncio.run(scenario())


def test_an_applications_error_is_raised() -> None:
    async def fails(_scope: Scope, _receive: Receive, _send: Send) -> None:
        raise ValueError("broken")

    async def silent(_scope: Scope, _receive: Receive, _send: Send) -> None:
        return

    async def scenario() -> None:
        with pytest.raises(ValueError, match="broken"):
            async with asgi_call(fails, "/x", b"", {}):
                pass
        with pytest.raises(RuntimeError, match="without an answer"):
            async with asgi_call(silent, "/x", b"", {}):
                pass

    asyncio.run(scenario())
