"""Calls to engine replicas: what a transport has to offer, and the error of a lost replica."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Protocol

from quickchange_server.engine_client.engines import AdapterCommand
from quickchange_server.engine_client.remote.cluster_view import ClusterView
from quickchange_server.protocol import Delta, Submit


class ReplicaLostError(Exception):
    """The replica that had a sequence is gone or gave it back: another may go on with it.

    `given_back`: not for anything that the sequence did, since the replica drains, or never had
    it. Any other loss is counted against it.
    """

    def __init__(self, message: str, *, given_back: bool = False) -> None:
        super().__init__(message)
        self.given_back = given_back


class ReplicaCalls(Protocol):
    """Calls to the replicas of one cluster, from one event loop."""

    def generate(self, submit: Submit) -> AsyncGenerator[tuple[Delta, ...], None]:
        """Run one sequence on the replica that routing picks: batches of its deltas, in order.

        The end of the generator, also by `aclose` and by cancellation of what awaits it, frees the
        replica's work. Raises ReplicaLostError where the replica ends before the last delta, and a
        QuickchangeError where it refuses the sequence.
        """
        ...

    async def command(self, command: AdapterCommand) -> None:
        """Send a command to those replicas that it concerns. One that raises is sent again."""

    async def view(self) -> ClusterView:
        """The cluster as it is now; asked for about twice a second."""
        ...
