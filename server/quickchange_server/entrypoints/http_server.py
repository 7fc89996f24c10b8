"""The application under uvicorn: a bound port, an announcement when ready, a drain on SIGTERM."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from quickchange_server.api.app_state import Services
from quickchange_server.config import Settings
from quickchange_server.errors import QuickchangeError, SettingError
from quickchange_server.workers.process_memory import release_unused_memory

BACKLOG = 2048  # connections not yet accepted
KEEP_ALIVE_SECONDS = 75  # above the usual 60 s of proxies, so that they close first
LAST_BYTES_SECONDS = 5.0  # after the drain, for complete answers that are not yet read

logger = logging.getLogger(__name__)

Announce = Callable[[Services, str], None]


@contextmanager
def bound(settings: Settings) -> Iterator[socket.socket]:
    """The listener of `bind`, whose Unix socket is gone from its folder at the end."""
    with bind(settings) as listener:
        own = None if settings.uds is None else _file(settings.uds)
        try:
            yield listener
        finally:
            if settings.uds is not None and _file(settings.uds) == own:  # else another's by now
                settings.uds.unlink(missing_ok=True)


def bind(settings: Settings) -> socket.socket:
    """Listen on the settings' address. Raises SettingError if that fails."""
    if settings.uds is not None:
        return _bind_file(settings.uds)
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
        listener.listen(BACKLOG)  # now: another process could still take a port that is only bound
    except OSError as error:
        listener.close()
        raise SettingError(
            f"port: can't listen on {settings.host} port {settings.port}: {error.strerror}; "
            "choose another with --port, or end what listens there",
            param="port",
        ) from error
    return listener


def _bind_file(path: Path) -> socket.socket:
    """Listen on a Unix socket, in the place of one that nobody listens on any more."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if path.is_socket() and not _answered(path):
            path.unlink()
        listener.bind(os.fspath(path))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise SettingError(
            f"uds: can't listen on {path}: {error.strerror or error}; choose a path in a folder "
            "of yours that is not in use, of at most 107 bytes",
            param="uds",
        ) from error
    return listener


def _answered(path: Path) -> bool:
    """True if somebody listens on the Unix socket, so that it can't be taken."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            return False
        return True


def _file(path: Path) -> tuple[int, int] | None:
    """The file that stands at a path, told from others; None if there is none."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def url_of(settings: Settings, listener: socket.socket) -> str:
    """The server's URL, with the port that the listener got."""
    if settings.uds is not None:
        return f"unix:{settings.uds}"
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return f"http://{host}:{listener.getsockname()[1]}"


class DrainingServer(uvicorn.Server):
    """A uvicorn server that drains at the first SIGTERM or SIGINT before it stops listening.

    During the drain /health reports it and new requests get 503, while running streams go on for
    `drain_seconds`. A second signal stops at once.
    """

    def __init__(self, config: uvicorn.Config, app: FastAPI, settings: Settings) -> None:
        super().__init__(config)
        self._app = app
        self.settings = settings
        self._loop: asyncio.AbstractEventLoop | None = None
        self._drain: asyncio.Task[None] | None = None
        self.interrupted: signal.Signals | None = None  # what ended it before it was ready

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        # A signal handler runs between two bytecodes, so the event loop does the work.
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._end, signal.Signals(sig))

    @property
    def draining(self) -> bool:
        return self._drain is not None

    @property
    def services(self) -> Services:
        services: Services = self._app.state.services
        return services

    def _end(self, received: signal.Signals) -> None:
        if not self.started or not self.services.started.done():
            self.force_exit = self.interrupted is not None  # the second one
            self.interrupted = received
            self.should_exit = self.started  # else once the lifespan has begun, so that it ends
            return
        if self._drain is not None:
            logger.warning("%s again: stopping now", received.name)
            self.force_exit = True
            self.should_exit = True
            return
        in_flight = self.services.client.in_flight
        logger.info("%s: draining %d requests", received.name, in_flight)
        self._drain = asyncio.create_task(self._drained(), name="drain")

    async def _drained(self) -> None:
        await self.services.shadows.close()
        await self.services.client.close(self.settings.drain_seconds)
        self.should_exit = True


def run(app: FastAPI, settings: Settings, listener: socket.socket, announce: Announce) -> None:
    """Serve until a signal ends it. `announce` is called once, when the engine is ready.

    Raises QuickchangeError with the engine's reason if the engine can't start, and SystemExit with
    the shell's status for a signal that comes before.
    """
    config = uvicorn.Config(
        app,
        loop="asyncio",  # the same whatever else is installed: Ray brings others
        http="h11",
        log_level="warning",
        access_log=False,  # a line per request takes CPU from the engine; /metrics counts
        timeout_graceful_shutdown=int(LAST_BYTES_SECONDS),
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        backlog=BACKLOG,
    )
    server = DrainingServer(config, app, settings)
    asyncio.run(_run(server, listener, announce))


async def _run(server: DrainingServer, listener: socket.socket, announce: Announce) -> None:
    url = url_of(server.settings, listener)
    serving = asyncio.create_task(server.serve([listener]), name="serve")
    watching = asyncio.create_task(_announce(server, serving, url, announce), name="announce")
    try:
        await serving
    finally:
        await asyncio.wait([watching])
    await watching  # raises the engine's failure to start
    if server.interrupted is not None:
        print(
            f"quickchange: ended by {server.interrupted.name} before it was ready", file=sys.stderr
        )
        raise SystemExit(128 + server.interrupted)


async def _announce(
    server: DrainingServer, serving: asyncio.Task[None], url: str, announce: Announce
) -> None:
    while not (server.started or serving.done()):
        await asyncio.sleep(0.01)
    if serving.done():
        return
    if server.interrupted is not None:
        server.should_exit = True
        return
    services = server.services
    either: list[asyncio.Future[Any]] = [services.started, serving]
    await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
    if server.interrupted is not None or server.draining or not services.started.done():
        return
    error = services.started.exception()
    if error is None:
        gc.collect()
        gc.freeze()  # libraries and vocabulary: a collection takes 0.3 s less without them
        release_unused_memory()
        announce(services, url)
        return
    server.should_exit = True
    if isinstance(error, QuickchangeError):
        raise error
    raise SettingError(f"the engine could not start: {error!r}") from error
