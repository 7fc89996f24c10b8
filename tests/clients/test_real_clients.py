"""Clients of other makers, unmodified, against a server with a real model.

Each script in `scripts/` names what it requires in its first line, and asserts what the client
gives it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from client_environments import run_client
from tool_templates import MARKED

from quickchange_bench.load.own_server import BASE_NAME, OwnServer, register
from quickchange_bench.models.random_adapters import AdapterSpec, write_adapters
from quickchange_training.demo.demo_base import ensure_demo_base

pytestmark = pytest.mark.slow

SCRIPTS = sorted((Path(__file__).parent / "scripts").glob("client_*"))
ADAPTER = "tuned"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of the demo's base model, with a chat template that takes tools, and an adapter."""
    folder = tmp_path_factory.mktemp("clients")
    base, model = ensure_demo_base(), folder / "model"
    model.mkdir()
    for file in base.iterdir():
        (model / file.name).symlink_to(file)
    template = model / "chat_template.jinja"
    template.unlink(missing_ok=True)
    template.write_text(MARKED)
    write_adapters(base, folder, [ADAPTER], AdapterSpec(rank=4))
    stored = {"QUICKCHANGE_STORE_RESPONSES": "true"}  # for what clients refer to by its id
    own = OwnServer(model=str(model), store=folder / "store", environment=stored)
    with own.running(folder / "server.log") as server:
        register(server.url, {ADAPTER: folder / ADAPTER})
        yield server.url


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_a_client_gets_what_it_asks_for(script: Path, url: str, tmp_path: Path) -> None:
    run_client(script, tmp_path, URL=url, MODEL=BASE_NAME, ADAPTER=ADAPTER)
