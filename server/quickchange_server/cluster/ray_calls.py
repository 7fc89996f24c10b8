"""Calls to engine replicas and to the board, by Ray Serve's handles."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable
from contextvars import Context
from typing import Any

from quickchange_server.cluster.serve_replica import meaning_of
from quickchange_server.engine_client.engines import AdapterCommand
from quickchange_server.engine_client.remote.cluster_view import ClusterView
from quickchange_server.engine_client.remote.replica_calls import ReplicaLostError
from quickchange_server.protocol import Delta, Prefetch, Submit
from quickchange_server.tenants.limit_counter import LimitMessage, Reply

ANSWER_SECONDS = 2.0  # longest wait for the board's answer, and for a prefetch to be taken


class RayCalls:
    """`ReplicaCalls` and `CounterCalls`, by the handles of the deployments `Engine` and `Board`."""

    def __init__(self, engines: Any, board: Any) -> None:
        # Not by reference: over gRPC a token costs a third of what it does as an object of Ray's.
        self._streams = engines.options(stream=True, _by_reference=False)
        self._engines = engines
        self._board = board
        self._seen = ClusterView(())
        self._responses: defaultdict[str, set[Any]] = defaultdict(set)  # by their replica

    async def generate(self, submit: Submit) -> AsyncGenerator[tuple[Delta, ...], None]:
        """Run one sequence on the replica that the router picks."""
        response = _apart(self._streams.generate.remote, submit)
        replica, ended = "", False

        def silent() -> bool:
            """True if `view` has given the stream up."""
            return bool(replica) and response not in self._responses[replica]

        try:
            async for item in response:
                if isinstance(item, str):
                    replica = item
                    self._responses[replica].add(response)
                    continue
                if isinstance(item, Exception):
                    ended = True
                    raise item
                ended = item[-1].finish_reason is not None
                yield item
        except asyncio.CancelledError as error:
            if _is_ours():
                raise
            raise ReplicaLostError("the call was cancelled", given_back=silent()) from error
        except Exception as error:
            meaning = meaning_of(error)
            if isinstance(meaning, ReplicaLostError) and silent():
                meaning.given_back = True
            raise meaning from error
        finally:
            self._responses[replica].discard(response)
            if not self._responses[replica]:
                del self._responses[replica]
            if not ended:
                response.cancel()
        if not ended:
            raise ReplicaLostError("the stream ended before its last delta")

    async def command(self, command: AdapterCommand) -> None:
        """Prefetch on the replica that the router picks; tell all others by the board."""
        handle = self._engines if isinstance(command, Prefetch) else self._board
        await answer(handle.command.remote, command)

    async def view(self) -> ClusterView:
        """The cluster's state. Streams of a replica that it has no longer are taken for lost: a
        machine that falls silent closes no connection."""
        view: ClusterView = await answer(self._board.view.remote)
        there = {report.replica for report in view.replicas}
        if view.board == self._seen.board:  # a new one doesn't know all of them yet
            for gone in {report.replica for report in self._seen.replicas} - there:
                for response in self._responses.pop(gone, ()):
                    response.cancel()
        self._seen = view
        return view

    async def exchange(self, message: LimitMessage) -> Reply:
        """A message to the counter of API keys' limits, which is at the board."""
        reply: Reply = await answer(self._board.exchange.remote, message)
        return reply


async def answer(remote: Callable[..., Any], *args: Any) -> Any:
    """A call's result. Raises what it raised there, and ReplicaLostError if none comes in time."""
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            return await _apart(remote, *args)
    except TimeoutError as error:
        raise ReplicaLostError(f"no answer within {ANSWER_SECONDS:g} seconds") from error
    except asyncio.CancelledError as error:
        if _is_ours():
            raise
        raise ReplicaLostError("the call was cancelled where it ran") from error
    except Exception as error:
        raise meaning_of(error) from error


def _apart(remote: Callable[..., Any], *args: Any) -> Any:
    """Begin a call that is no part of the HTTP request in whose context this may run: Serve would
    cancel it with that request, and take both for one."""
    return Context().run(remote, *args)


def _is_ours() -> bool:
    """True if it is the current task that was cancelled, and not the call."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
