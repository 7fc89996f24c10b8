"""A live server on a free port over the fake engine, with a byte tokenizer and small adapters."""

from __future__ import annotations

import asyncio
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import fake_engine
import httpx
import torch
import uvicorn
from fake_engine import Behaviour, token_at
from safetensors.torch import save_file
from text_support import byte_text

from quickchange_server.api.app_state import Services
from quickchange_server.config import Settings
from quickchange_server.engine_client.engines import EnginesMaker
from quickchange_server.engine_client.local.local_engines import LocalEngines
from quickchange_server.entrypoints.app import create_app
from quickchange_server.entrypoints.http_server import DrainingServer, bind, url_of
from quickchange_server.frontend.tokenizer import Text
from quickchange_server.observability.cluster_metrics import Cluster
from quickchange_server.protocol import Component
from quickchange_server.tenants.shared_limits import CounterCalls
from quickchange_store.canonical.canonical_adapter import (
    BaseSpec,
    CanonicalAdapter,
    LowRankUpdate,
    ModuleShape,
)
from quickchange_store.canonical.turbo_part import DraftBlock, TurboHeads
from quickchange_store.store import Store

BASE = "tiny/base"
MODULE = "model.layers.0.self_attn.q_proj"
BASE_SPEC = BaseSpec(
    architecture="LlamaForCausalLM",
    name=BASE,
    modules={MODULE: ModuleShape("linear", 4, 4), "lm_head": ModuleShape("linear", 4, 258)},
    model_type="llama",
    output_head="lm_head",
)
LIMIT_SECONDS = 180.0  # for what takes a second on a machine that is not busy


def make_adapter(value: float) -> CanonicalAdapter:
    """A rank-1 adapter whose content follows from `value`."""
    update = LowRankUpdate(torch.full((1, 4), value), torch.ones(4, 1), 1.0)
    return CanonicalAdapter("LlamaForCausalLM", BASE, {MODULE: update})


def make_turbo(value: float, *, lora: bool = False, depth: int = 2) -> CanonicalAdapter:
    """Turbo heads whose content follows from `value`, alone or beside `make_adapter(value)`."""
    blocks = tuple(DraftBlock(torch.full((4, 4), value), torch.zeros(4)) for _ in range(depth))
    heads = TurboHeads(blocks, tuple((index,) for index in range(depth)))
    updates = make_adapter(value).updates if lora else {}
    return CanonicalAdapter("LlamaForCausalLM", BASE, updates, turbo=heads)


def write_medusa(folder: Path, value: float = 1.0) -> Path:
    """Two Medusa heads in LoRAX's layout."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"base_model_name_or_path": BASE, "medusa_num_heads": 2, "medusa_num_layers": 1}
    (folder / "config.json").write_text(json.dumps({**config, "version": "2"}))
    weights = {f"{head}.0.linear.weight": torch.full((4, 4), value + head) for head in range(2)}
    biases = {f"{head}.0.linear.bias": torch.zeros(4) for head in range(2)}
    save_file(weights | biases, folder / "medusa_lm_head.safetensors", metadata={"format": "pt"})
    return folder


def write_peft(folder: Path, value: float = 1.0, **config: Any) -> Path:
    """The same as a PEFT directory."""
    folder.mkdir(parents=True)
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": BASE,
        "r": 1,
        "lora_alpha": 1,
        "target_modules": ["q_proj"],
        "bias": "none",
        **config,
    }
    (folder / "adapter_config.json").write_text(json.dumps(content))
    prefix = f"base_model.model.{MODULE}"
    tensors = {
        f"{prefix}.lora_A.weight": torch.full((1, 4), value),
        f"{prefix}.lora_B.weight": torch.ones(4, 1),
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


@dataclass
class Live:
    """A running server: its address, its parts, and a client."""

    url: str
    services: Services
    http: httpx.Client
    store: Store
    thread: threading.Thread
    end: Callable[[], None]  # what SIGTERM does

    def post(self, path: str, body: Any) -> httpx.Response:
        content = json.dumps(body)  # ASCII: httpx's own can't send half a surrogate pair
        return self.http.post(path, content=content, headers={"Content-Type": "application/json"})

    def events(self, path: str, body: dict[str, Any]) -> list[Any]:
        """The stream's events, parsed; the last "[DONE]" as it is."""
        with self.http.stream("POST", path, json={**body, "stream": True}) as response:
            assert response.status_code == 200, response.read()
            assert response.headers["content-type"].startswith("text/event-stream")
            lines = [line for line in response.iter_lines() if line]
        assert all(line.startswith("data: ") for line in lines)
        data = [line.removeprefix("data: ") for line in lines]
        return [d if d == "[DONE]" else json.loads(d) for d in data]


@contextmanager
def live_server(
    store: Path,
    behaviour: Behaviour | None = None,
    text: Text | None = None,
    engine: Callable[..., None] = fake_engine.main,
    base: Callable[[], BaseSpec] = lambda: BASE_SPEC,
    start_limit: float = LIMIT_SECONDS,
    limit_counter: CounterCalls | None = None,
    cluster: Cluster | None = None,
    engines: EnginesMaker | None = None,
    **changes: Any,
) -> Iterator[Live]:
    """A server in a thread of this process. Its engine is in a process of its own, unless `engines`
    are given."""
    given = {"model": "unused", "served_model_name": BASE, "drain_seconds": 0, **changes}
    settings = Settings(store=store, port=0, **given)
    main = partial(engine, behaviour=behaviour or Behaviour())
    app = create_app(
        settings,
        text=text or byte_text(eos=frozenset()),
        engines=engines or partial(LocalEngines, main=main),
        base=base,
        limit_counter=limit_counter,
        cluster=cluster,
    )
    listener = bind(settings)
    config = uvicorn.Config(
        app,
        http="h11",  # as the server's own
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=1,
    )
    server = DrainingServer(config, app, settings)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])), daemon=True)
    url = url_of(settings, listener)
    thread.start()
    try:
        wait_until(lambda: server.started)
        way = None if settings.uds is None else httpx.HTTPTransport(uds=str(settings.uds))
        place = url if settings.uds is None else "http://localhost"
        with httpx.Client(base_url=place, transport=way, timeout=LIMIT_SECONDS) as http:
            if settings.drain_seconds == 0 and (behaviour is None or behaviour.start_seconds == 0):
                wait_until(lambda: http.get("/health").status_code == 200, start_limit)
            end = partial(server.handle_exit, signal.SIGTERM, None)
            yield Live(url, server.services, http, Store(store), thread, end)
    finally:
        server.should_exit = True
        thread.join(LIMIT_SECONDS)
        listener.close()


def wait_until(condition: Callable[[], bool], seconds: float = LIMIT_SECONDS) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError("the condition did not come about")
        time.sleep(0.01)


def expected_text(seed: int, prompt_tokens: int, count: int, *components: Component) -> str:
    """What the fake engine writes."""
    tokens = [token_at(seed, prompt_tokens + i, tuple(components)) for i in range(count)]
    return bytes(tokens).decode()
