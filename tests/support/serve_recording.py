"""A server over the fake engine that records each answer: python … STORE DATABASE PORT."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import fake_engine
from fake_engine import Behaviour
from fastapi import FastAPI
from http_support import BASE, BASE_SPEC
from storage_support import NOTES, note
from text_support import byte_text

from quickchange_server.config import Settings
from quickchange_server.engine_client.local.local_engines import LocalEngines
from quickchange_server.entrypoints.app import create_app
from quickchange_server.entrypoints.http_server import bind, run
from quickchange_server.frontend.request_observers import Completed, Opened
from quickchange_server.storage.database import Database


class Recorder:
    """A bookkeeper that notes each request that has ended by its id."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def opened(self, opened: Opened) -> None:
        pass

    def completed(self, completed: Completed) -> Awaitable[None]:
        return self._database.record(note(completed.opened.request_id))


def recording(app: FastAPI) -> None:
    """Let the application's services have the recorder from their start."""
    inner = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with inner(app):
            services = app.state.services
            await services.database.write(NOTES.metadata.create_all)
            app.state.services = replace(services, books=(Recorder(services.database),))
            yield

    app.router.lifespan_context = lifespan


def main(store: str, database: str, port: str) -> None:
    settings = Settings(
        model="unused",
        served_model_name=BASE,
        store=Path(store),
        database=database,
        port=int(port),
    )
    app = create_app(
        settings,
        text=byte_text(eos=frozenset()),
        engines=partial(LocalEngines, main=partial(fake_engine.main, behaviour=Behaviour())),
        base=lambda: BASE_SPEC,
    )
    recording(app)
    with bind(settings) as listener:
        run(app, settings, listener, lambda _services, url: print(url, flush=True))


if __name__ == "__main__":
    main(*sys.argv[1:])
