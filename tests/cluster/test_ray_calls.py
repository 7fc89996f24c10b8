"""Calls by handles: what ends a stream, and what its end means."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

pytest.importorskip("ray", reason="the extra [ray] is not installed")

from ray.exceptions import ActorDiedError
from ray.serve.exceptions import RequestCancelledError

from quickchange_server.cluster import ray_calls
from quickchange_server.cluster.ray_calls import RayCalls
from quickchange_server.engine_client.remote.cluster_view import ClusterView, ReplicaReport
from quickchange_server.engine_client.remote.replica_calls import ReplicaLostError
from quickchange_server.errors import AdapterFailedError
from quickchange_server.protocol import Delta, Forget, Pin, Prefetch, SamplingParams, Submit

SUBMIT = Submit("r", (1, 2), SamplingParams(), seed=1)
MORE, LAST = Delta("r", (1,)), Delta("r", (2,), finish_reason="length")


class Response:
    """A stream of Serve's: items that come, or an exception that is raised instead of one."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items
        self.cancelled = False
        self.ended = asyncio.Event()
        self.cancellation: BaseException = asyncio.CancelledError()

    def cancel(self) -> None:
        self.cancelled = True
        self.ended.set()

    async def __aiter__(self) -> AsyncIterator[Any]:
        for item in self.items:
            if isinstance(item, BaseException) and not isinstance(item, AdapterFailedError):
                raise item
            if item == "wait":
                await self.ended.wait()
                raise self.cancellation
            yield item


class Handle:
    """A deployment's handle, every method of which is noted in `called`."""

    def __init__(self, **answers: Any) -> None:
        self.answers = answers
        self.called: list[tuple[str, tuple[Any, ...]]] = []

    def options(self, **_: Any) -> Handle:
        return self

    def __getattr__(self, name: str) -> Any:
        class Method:
            @staticmethod
            def remote(*args: Any) -> Any:
                self.called.append((name, args))
                return self.answers[name]() if name in self.answers else asyncio.sleep(0)

        return Method


def read(response: Response) -> list[Any]:
    async def scenario() -> list[Any]:
        calls = RayCalls(Handle(generate=lambda: response), Handle())
        return [batch async for batch in calls.generate(SUBMIT)]

    return asyncio.run(scenario())


def test_batches_come_as_they_were_sent_and_a_complete_stream_is_not_cancelled() -> None:
    response = Response([(MORE,), (MORE, LAST)])
    assert read(response) == [(MORE,), (MORE, LAST)]
    assert not response.cancelled


def test_an_error_among_the_batches_is_raised_as_it_is() -> None:
    error = AdapterFailedError("no such version")
    with pytest.raises(AdapterFailedError) as caught:
        read(Response([(MORE,), error]))
    assert caught.value is error


@pytest.mark.parametrize(
    "items",
    [
        [(MORE,), ActorDiedError()],
        [(MORE,)],  # without a last delta
        [],
        [(MORE,), asyncio.CancelledError()],  # that Serve makes of a cancelled task
    ],
)
def test_a_stream_without_its_last_delta_is_a_lost_replica(items: list[Any]) -> None:
    response = Response(items)
    with pytest.raises(ReplicaLostError) as caught:
        read(response)
    assert not caught.value.given_back
    assert response.cancelled


def test_closing_a_stream_cancels_it_at_the_replica() -> None:
    async def scenario() -> None:
        response = Response([(MORE,), "wait"])
        stream = RayCalls(Handle(generate=lambda: response), Handle()).generate(SUBMIT)
        assert await anext(stream) == (MORE,)
        await stream.aclose()
        assert response.cancelled

    asyncio.run(scenario())


def test_cancelling_who_reads_a_stream_cancels_it_and_is_no_loss() -> None:
    async def scenario() -> None:
        response = Response([(MORE,), "wait"])

        async def reader() -> None:
            async for _ in RayCalls(Handle(generate=lambda: response), Handle()).generate(SUBMIT):
                pass

        task = asyncio.create_task(reader())
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert response.cancelled

    asyncio.run(scenario())


def view_of(board: str, *replicas: str) -> ClusterView:
    reports = tuple(ReplicaReport(name, "engine", "node", "ready") for name in replicas)
    return ClusterView(reports, board=board)


@pytest.mark.parametrize("cancellation", [asyncio.CancelledError(), RequestCancelledError("id")])
@pytest.mark.parametrize(
    ("second", "lost"),
    [
        (view_of("b", "engine-1"), True),  # engine-2 has been silent for too long
        (view_of("b", "engine-1", "engine-2"), False),
        (view_of("new", "engine-1"), False),  # a new board, which knows few of them yet
    ],
)
def test_streams_of_a_replica_that_falls_silent_are_given_up(
    second: ClusterView, lost: bool, cancellation: BaseException
) -> None:
    views = [view_of("b", "engine-1", "engine-2"), second]

    async def scenario() -> None:
        async def view() -> ClusterView:
            return views.pop(0)

        response = Response(["engine-2", (MORE,), "wait"])
        response.cancellation = cancellation
        calls = RayCalls(Handle(generate=lambda: response), Handle(view=view))
        stream = calls.generate(SUBMIT)
        assert await anext(stream) == (MORE,)
        rest = asyncio.create_task(anext(stream))  # type: ignore[arg-type]
        await calls.view()
        await calls.view()
        await asyncio.sleep(0.01)
        if not lost:
            assert not rest.done()
            rest.cancel()
            return
        with pytest.raises(ReplicaLostError) as caught:
            await rest
        assert caught.value.given_back  # it is not the sequence's fault

    asyncio.run(scenario())


def test_a_prefetch_goes_where_routing_sends_it_and_other_commands_to_the_board() -> None:
    engines, board = Handle(), Handle()

    async def scenario() -> None:
        calls = RayCalls(engines, board)
        for command in (Prefetch("a"), Pin("a", True), Forget("a")):
            await calls.command(command)

    asyncio.run(scenario())
    assert engines.called == [("command", (Prefetch("a"),))]
    assert board.called == [("command", (Pin("a", True),)), ("command", (Forget("a"),))]


def test_a_board_that_says_nothing_is_not_waited_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_calls, "ANSWER_SECONDS", 0.01)
    board = Handle(view=lambda: asyncio.sleep(60))
    with pytest.raises(ReplicaLostError, match="no answer"):
        asyncio.run(RayCalls(Handle(), board).view())
