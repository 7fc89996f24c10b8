"""The calls of the inference extension's LoRA syncer, in its order and with its fields."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from http_support import BASE, Live, live_server, make_adapter, write_peft

from quickchange_store.store import Store


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Live]:
    Store(tmp_path / "store").add("old", make_adapter(1.0))
    with live_server(tmp_path / "store") as served:
        yield served


def registered(live: Live) -> set[str]:
    """What the syncer finds: it asks for health, then for the models' ids."""
    assert live.http.get("/health").status_code == 200
    return {model.get("id", "") for model in live.http.get("/v1/models").json()["data"]}


@pytest.mark.parametrize("base", [BASE, "meta-llama/Llama-3.1-8B", ""])
def test_adapters_are_loaded_and_unloaded_until_the_server_has_what_is_wanted(
    live: Live, tmp_path: Path, base: str
) -> None:
    source = str(write_peft(tmp_path / "sql", 2.0))
    for _ in range(2):  # it reconciles again and again
        if "team/sql" not in registered(live):
            body = {"lora_name": "team/sql", "lora_path": source, "base_model_name": base}
            assert live.post("/v1/load_lora_adapter", body).status_code == 200
        if "old" in registered(live):
            answer = live.post("/v1/unload_lora_adapter", {"lora_name": "old"})
            assert answer.status_code == 200
        assert registered(live) & {"team/sql", "old"} == {"team/sql"}


def test_an_adapters_base_is_its_parent(live: Live) -> None:
    models = live.http.get("/v1/models").json()["data"]
    assert {m["id"]: m["parent"] for m in models if "@" not in m["id"]} == {BASE: None, "old": BASE}


def test_a_source_that_is_not_there_is_an_error_and_the_others_go_on(
    live: Live, tmp_path: Path
) -> None:
    for source, status in ((tmp_path / "typo", 404), (write_peft(tmp_path / "good", 3.0), 200)):
        body = {"lora_name": source.name, "lora_path": str(source), "base_model_name": BASE}
        assert live.post("/v1/load_lora_adapter", body).status_code == status
    assert "good" in registered(live)
    assert "typo" not in registered(live)
