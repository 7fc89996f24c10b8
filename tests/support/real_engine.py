"""A real engine behind a server of the tests, in the place of the fake one."""

from __future__ import annotations

from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from fake_engine import Behaviour

from quickchange_server.config import Settings
from quickchange_server.entrypoints.engine_start import engine_main, read_text
from quickchange_store.base_model.base_spec import base_spec

START_SECONDS = 300.0


def with_real_engine(model: str, **changes: Any) -> dict[str, Any]:
    """Arguments by which `live_server` serves the model in a folder, as "base"; `changes`: further
    settings."""
    return {
        "text": read_text(model),
        "engine": _engine,
        "start_limit": START_SECONDS,
        "base": partial(base_spec, model),
        "model": model,
        "served_model_name": "base",
        "kv_cache_bytes": 4 << 20,
        "adapter_device_bytes": 16 << 20,
        "threads": 1,
        **changes,
    }


def _engine(connection: Connection, settings: Settings, behaviour: Behaviour) -> None:  # noqa: ARG001
    """The engine process's entry."""
    engine_main(connection, settings)
