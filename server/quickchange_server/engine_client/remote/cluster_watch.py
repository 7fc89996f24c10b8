"""What an ingress knows of its cluster, and the commands for adapters that it sends there.

The cluster is looked at twice a second. A look that fails leaves the last view, which after
STALE_SECONDS tells nothing any more.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import replace

from quickchange_server.engine_client.adapter_status import AdapterStatus, Residence
from quickchange_server.engine_client.engines import AdapterCommand, Phase
from quickchange_server.engine_client.remote.cluster_view import ClusterView
from quickchange_server.engine_client.remote.replica_calls import ReplicaCalls
from quickchange_server.errors import UnavailableError
from quickchange_server.protocol import Forget, Pin, Ready

VIEW_SECONDS = 0.5  # between two looks
CALL_SECONDS = 2.0  # that a look, or the sending of a command, may take
STALE_SECONDS = 5.0
PATIENCE_SECONDS = 60.0  # without a replica, after which requests fail and none is admitted
COMMAND_SECONDS = 10.0  # for which a command is sent again that could not be sent
RETRY_SECONDS = 5.0  # told to clients; a guess

logger = logging.getLogger(__name__)


class ClusterStatus(AdapterStatus):
    """The adapter versions on the replicas' tiers.

    One that several hold counts as on the fastest of their tiers, with the bytes that it takes on
    one of them. Merged only where it is read, since few look and a cluster holds many.
    """

    def __init__(self) -> None:
        super().__init__()
        self._view = ClusterView(())
        self._merged: dict[str, Residence] | None = {}

    def see(self, view: ClusterView, pins: Collection[str]) -> None:
        self._view, self._merged = view, None
        self._pins = dict.fromkeys(pins)

    def pin(self, digest: str, pinned: bool) -> None:
        super().pin(digest, pinned)
        self._merged = None

    def _held(self) -> Mapping[str, Residence]:
        merged = self._merged
        if merged is None:
            merged = self._merged = _merged(self._view, self._pins)
        return merged


class ClusterWatch:
    """The cluster's state, from `start` to `stop`."""

    def __init__(self, calls: ReplicaCalls) -> None:
        self._calls = calls
        self.view = ClusterView(())
        self.info: Ready | None = None  # of a replica that serves; its context is the smallest
        self.residency = ClusterStatus()
        self._seen_at = 0.0  # the last look that succeeded; monotonic seconds
        self._served_at = 0.0  # when a replica was last known to serve
        self._serves = False  # one does, by the last view
        self._failing = False  # looks fail at present
        self._looked = asyncio.Event()  # the next look is done
        self._wishes: dict[str, bool] = {}  # pins asked for here that no view has shown yet
        self._commands: asyncio.Queue[AdapterCommand] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def phase(self) -> Phase:
        if self.info is None:
            return "starting"
        now = time.monotonic()
        if now - self._seen_at > STALE_SECONDS:
            return "restarting"  # replicas may serve all the same: each request finds out
        if self._serves:
            return "ready"
        return "failed" if now - self._served_at > PATIENCE_SECONDS else "restarting"

    @property
    def failure(self) -> str | None:
        if self.phase != "failed":
            return None
        return f"no engine replica is known to have taken requests for {PATIENCE_SECONDS:g} seconds"

    async def start(self) -> Ready:
        """Wait, for ever, for the first replica that serves."""
        if self._tasks:
            raise RuntimeError("a cluster's watch is started once")
        self._tasks = [
            asyncio.create_task(self._watch(), name="cluster-watch"),
            asyncio.create_task(self._send_commands(), name="cluster-commands"),
        ]
        while self.info is None:
            await self._looked.wait()
        return self.info

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def until_served(self, since: float) -> None:
        """Wait until a replica may take a request. Raises UnavailableError PATIENCE_SECONDS after
        `since`, in monotonic seconds: since when no replica has had it."""
        while (left := since + PATIENCE_SECONDS - time.monotonic()) > 0:
            if self._serves or time.monotonic() - self._seen_at > STALE_SECONDS:
                return
            with suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self._looked.wait()
        raise UnavailableError(
            f"no engine replica has taken this request within {PATIENCE_SECONDS:g} seconds; send "
            "it again",
            retry_after=RETRY_SECONDS,
        )

    def command(self, command: AdapterCommand) -> None:
        """Queue a command. It is sent again where it can't be sent, and so is a pin until a view
        has it."""
        match command:
            case Pin(digest, pinned):
                self._wishes[digest] = pinned
                self.residency.pin(digest, pinned)
            case Forget(digest):
                self._wishes.pop(digest, None)
                self.residency.forget(digest)
        self._commands.put_nowait(command)

    async def _watch(self) -> None:
        while True:
            try:
                async with asyncio.timeout(CALL_SECONDS):
                    view = await self._calls.view()
                self._take(view)
                self._failing = False
            except Exception as error:
                if not self._failing:
                    logger.warning("the cluster's view can't be had, as of now: %r", error)
                self._failing = True
            self._looked.set()
            self._looked = asyncio.Event()
            await asyncio.sleep(VIEW_SECONDS)

    def _take(self, view: ClusterView) -> None:
        now = time.monotonic()
        ready = [r.info for r in view.replicas if r.serves and r.info is not None]
        self._seen_at, self._serves = now, bool(ready)
        if ready:
            self._served_at = now
            shortest = min(info.max_model_len for info in ready)
            self.info = replace(ready[0], max_model_len=shortest)
        self._compare_pins(view)
        self.view = view

    def _compare_pins(self, view: ClusterView) -> None:
        """Send pins again that the view should have and has not."""
        pins = set(view.pins)
        if self.view.board not in ("", view.board):  # a new board, which knows no pins
            self._wishes = dict.fromkeys(self.residency.pins, True) | self._wishes
        self._wishes = {d: pinned for d, pinned in self._wishes.items() if (d in pins) != pinned}
        for digest, pinned in self._wishes.items():
            self._commands.put_nowait(Pin(digest, pinned))
            if pinned:
                pins.add(digest)
            else:
                pins.discard(digest)
        self.residency.see(view, sorted(pins))

    async def _send_commands(self) -> None:
        while True:
            await self._send(await self._commands.get())

    async def _send(self, command: AdapterCommand) -> None:
        deadline = time.monotonic() + COMMAND_SECONDS
        while True:
            try:
                async with asyncio.timeout(CALL_SECONDS):
                    return await self._calls.command(command)
            except Exception as error:
                if time.monotonic() > deadline:
                    logger.error("%s could not be sent: %r", command, error)
                    return None
            await asyncio.sleep(VIEW_SECONDS)


def _merged(view: ClusterView, pins: Collection[str]) -> dict[str, Residence]:
    held: dict[str, Residence] = {}
    for report in view.replicas:
        for digest, residence in report.residency.items():
            known = held.get(digest)
            if known is None or _rank(known) < _rank(residence):
                held[digest] = residence
    return {digest: replace(r, pinned=digest in pins) for digest, r in held.items()}


def _rank(residence: Residence) -> tuple[bool, int]:
    return residence.tier == "device", residence.bytes
