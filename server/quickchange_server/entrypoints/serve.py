"""The command `quickchange serve`: its settings, demo, warnings, and the lines it prints."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shlex
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any, NoReturn, TypeVar

from pydantic import ValidationError

from quickchange_server.adapter_registry.resolver import base_names
from quickchange_server.api.app_state import Services
from quickchange_server.config import Settings, is_remote
from quickchange_server.engine_client.local.channel import EngineMain
from quickchange_server.engine_client.local.local_engines import LocalEngines
from quickchange_server.entrypoints.app import create_app
from quickchange_server.entrypoints.engine_start import engine_main, preload
from quickchange_server.entrypoints.flags.lora_modules import (
    LoraModule,
    add_modules,
    lora_modules,
)
from quickchange_server.entrypoints.http_server import bound, run
from quickchange_server.errors import QuickchangeError, SettingError
from quickchange_server.observability.naming.request_ids import log_lines
from quickchange_server.storage import database
from quickchange_server.storage.database import Database
from quickchange_server.storage.database_engines import provisional
from quickchange_server.tenants.key_records import every
from quickchange_server.tenants.tenancy import asks_for_keys
from quickchange_server.workers.torch_worker import run_apart
from quickchange_store.base_model.base_spec import base_spec
from quickchange_store.errors import StoreError
from quickchange_store.hub_access import look_for_hub
from quickchange_store.store import Store


def serve(
    given: Mapping[str, Any],
    *,
    demo: bool,
    modules: Sequence[str] = (),
    engine: EngineMain = engine_main,
) -> None:
    """Serve until a signal ends it, with the settings `given` on the command line.

    `modules`: adapters to add to the store first, as `lora_modules` reads them.

    Exits with status 1 and one line of error if it can't.
    """
    log_lines()
    logging.getLogger("httpx").setLevel(logging.WARNING)
    logging.getLogger("huggingface_hub").propagate = False  # it prints its lines itself
    logging.getLogger("alembic").setLevel(logging.WARNING)  # it logs every migration
    try:
        settings = settings_of(with_demo(given) if demo else given, Settings)
        wanted = lora_modules(modules)
        look_for_hub(settings.model)
        if engine is engine_main and settings.device == "cpu":
            preload()
        with bound(settings) as listener, provisional(settings.database_url) as keep_database:
            if is_remote(settings.store):
                say(f"reading the store at {settings.store}")
                Store(*settings.store_opening).snapshot()
            if is_remote(settings.store) and settings.database is None:
                file = settings.database_url.removeprefix("sqlite:///")
                say(
                    f"keeping keys, experiments and usage in {file}, on this machine alone: "
                    "replicas need a PostgreSQL that they share (--database)"
                )
            say(f"reading {settings.model}")
            database.check(settings.database_url)
            check_access(settings)
            if demo and settings.adapters and _demo_lacks(settings):
                say(f"adding the demo's adapters to {settings.store}, where they are missing")
                run_apart(_publish_demo, settings)
            if wanted:
                _publish_modules(wanted, settings)
            app = create_app(settings, engines=partial(LocalEngines, main=engine))

            def ready(services: Services, url: str) -> None:
                keep_database()
                if settings.adapters:
                    services.store.make()
                _announce(services, url, demo=demo)

            say(
                "starting the engine: it loads the model and measures its steps; the first time on "
                "a machine, it builds kernels for a minute"
            )
            run(app, settings, listener, ready)
    except (QuickchangeError, StoreError) as error:
        fail(str(error))


def say(line: str) -> None:
    """Print what the start is at."""
    print(f"quickchange: {line} …", file=sys.stderr, flush=True)


def fail(message: str) -> NoReturn:
    """Exit with status 1 and the message on one line."""
    sys.exit(f"quickchange: {' '.join(message.split())}")


SettingsType = TypeVar("SettingsType", bound=Settings)


def settings_of(
    given: Mapping[str, Any],
    kind: type[SettingsType],
) -> SettingsType:
    """The settings given on the command line. Exits with status 1 and one line of error."""
    try:
        return kind(**given)
    except ValidationError as error:
        fail("; ".join(_finding(finding) for finding in error.errors()))


def _finding(finding: Any) -> str:
    name = str(finding["loc"][0])
    option = f"--{name.replace('_', '-')} (or QUICKCHANGE_{name.upper()})"
    if finding["type"] == "missing":
        hint = ", or --demo for a model to try" if name == "model" else ""
        return f"{option} is required{hint}"
    return f"{option}: {finding['msg']}"


def check_access(settings: Settings) -> None:
    """Warn if anyone who reaches the server can use it.

    Raises SettingError if requests need an API key and there is none, or if settings contradict
    each other.
    """
    if asks_for_keys(settings):
        if not asyncio.run(_has_key(settings)):
            raise SettingError(
                "api_keys: requests need an API key, and the database has no valid one; create one "
                "with `quickchange keys create`, or let everyone in with --allow-unauthenticated",
                param="api_keys",
            )
    elif settings.reachable:
        logging.getLogger(__name__).warning(
            "listening on %s without asking for API keys: anyone who reaches it can use it and "
            "change its adapters",
            settings.host,
        )


async def _has_key(settings: Settings) -> bool:
    database = await asyncio.to_thread(Database.open, settings.database_url)
    try:
        keys = await database.read(every)
    finally:
        await database.close()
    now = time.time()
    return any(key.state(now) == "valid" for key in keys)


def _announce(services: Services, url: str, *, demo: bool) -> None:
    names = services.store.names() if services.settings.adapters else ()
    base = services.catalog.base_name
    count = f"{len(names)} adapter{'' if len(names) == 1 else 's'}"
    logging.getLogger(__name__).info("memory:\n%s", services.engine.memory)
    print(f"Quickchange is ready on {url} (model {base}, {count})", flush=True)
    if demo:
        _suggest({*names, *services.store.aliases()}, url, services.settings)


def _publish_modules(modules: Sequence[LoraModule], settings: Settings) -> None:
    if not settings.adapters:
        raise SettingError(
            "lora_modules: adapters are switched off by --no-adapters; leave one of the two out",
            param="lora_modules",
        )
    names = ", ".join(module.name for module in modules)
    say(f"adding {names} to {settings.store}, where they are missing")
    run_apart(_add_modules, modules, settings)


def _add_modules(modules: Sequence[LoraModule], settings: Settings) -> None:
    store, base = Store(*settings.store_opening), base_spec(settings.model)
    add_modules(modules, store, base, base_names(settings))


# --- the demo -----------------------------------------------------------------------------------


def with_demo(given: Mapping[str, Any]) -> dict[str, Any]:
    """The given settings with the demo's base model, and its store if none is given."""
    from quickchange_training.demo import DemoBaseError, demo_store_folder, ensure_demo_base

    if "model" in given:
        fail("--demo brings its own model: leave out --model, or --demo")
    try:
        settings = {**given, "model": str(ensure_demo_base())}
    except DemoBaseError as error:
        fail(str(error))
    if "store" not in given and "QUICKCHANGE_STORE" not in os.environ:
        settings["store"] = demo_store_folder()
    return settings


def _demo_lacks(settings: Settings) -> bool:
    """True if the store has not all that the demo shows."""
    from quickchange_training.demo import DEMO_ADAPTERS, DEMO_ALIASES, DEMO_HEADS

    store = Store(*settings.store_opening)
    names = {*store.names(), *store.aliases()}
    return not names >= {*DEMO_ADAPTERS, *DEMO_HEADS, *DEMO_ALIASES}


def _publish_demo(settings: Settings) -> None:
    from quickchange_training.demo import publish_demo_adapters

    publish_demo_adapters(
        Store(*settings.store_opening),
        base_spec(settings.model),
    )


def _suggest(names: Collection[str], url: str, settings: Settings) -> None:
    """Print the adapters' names, those with Turbo last, and a request to try."""
    from quickchange_training.demo import DEMO_ADAPTERS, DEMO_ALIASES, DemoAdapter, DemoAlias

    entries: list[DemoAlias | DemoAdapter] = [*DEMO_ALIASES.values(), *DEMO_ADAPTERS.values()]
    shown = [(e.name, e.description, e.example_prompt) for e in entries if e.name in names]
    for name, description, _ in reversed(shown):
        print(f"  {name}: {description}")
    for name, _, prompt in shown[:1]:
        body = {
            "model": name,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": 96,
            "temperature": 0,
        }
        header = "-H 'Content-Type: application/json'"
        place = f"{url}/v1/chat/completions"
        if settings.uds is not None:
            place = f"--unix-socket {shlex.quote(str(settings.uds))} http://localhost/v1/chat/completions"
        print(f"curl {place} {header} -d {shlex.quote(json.dumps(body))}")
    sys.stdout.flush()
