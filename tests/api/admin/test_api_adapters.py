"""Administration of adapters over HTTP, and what must not go wrong with it."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from fake_engine import ADAPTER_BYTES, Behaviour
from http_support import BASE, Live, live_server, make_adapter, wait_until, write_peft
from safetensors.torch import save_file

COMPLETION = {"prompt": "Hello", "seed": 1, "max_tokens": 4}
LiveMaker = Callable[..., Live]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with live_server(tmp_path_factory.mktemp("adapters")) as live:
        yield live


@pytest.fixture
def live(shared: Live) -> Live:
    """The shared server with an empty store."""
    for alias in shared.store.aliases():
        shared.store.unalias(alias)
    for name in shared.store.names():
        shared.http.delete(f"/v1/adapters/{name}").raise_for_status()
    return shared


def error_of(response: httpx.Response, status: int) -> str:
    assert response.status_code == status, response.text
    return str(response.json()["error"]["message"])


def text_of(live: Live, model: str) -> str:
    response = live.post("/v1/completions", {**COMPLETION, "model": model})
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["text"])


def upload(live: Live, name: str, folder: Path, **others: bytes) -> httpx.Response:
    files = {path.name: path.read_bytes() for path in folder.iterdir()} | others
    return live.http.post(
        "/v1/adapters",
        data={"name": name},
        files={field: (f"../../{field}", content) for field, content in files.items()},
    )


def test_an_adapter_added_from_a_path_is_served_at_once(live: Live, tmp_path: Path) -> None:
    folder = write_peft(tmp_path / "sql")
    response = live.post("/v1/adapters", {"name": "team/sql", "path": str(folder)})
    assert response.status_code == 201, response.text
    body = response.json()
    assert (body["id"], body["version"], body["warnings"]) == ("team/sql", 1, [])
    assert body["digest"] == live.store.resolve("team/sql").digest
    assert text_of(live, "team/sql") != text_of(live, BASE)


def test_an_upload_is_served_at_once(live: Live, tmp_path: Path) -> None:
    response = upload(live, "sql", write_peft(tmp_path / "sql"))
    assert response.status_code == 201, response.text
    assert response.json()["digest"] == live.store.resolve("sql").digest


def test_warnings_of_an_import_are_told(live: Live, tmp_path: Path) -> None:
    folder = write_peft(tmp_path / "sql", base_model_name_or_path="another/name")
    response = live.post("/v1/adapters", {"name": "sql", "path": str(folder)})
    assert response.status_code == 201
    assert "another/name" in " ".join(response.json()["warnings"])


def test_a_missing_path_is_an_error_not_200(live: Live) -> None:
    response = live.post("/v1/adapters", {"name": "sql", "path": "/no/such/folder"})
    assert "/no/such/folder" in error_of(response, 400)
    assert live.store.names() == ()


def _nan(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {
        f"{prefix}.lora_A.weight": torch.full((1, 4), float("nan")),
        f"{prefix}.lora_B.weight": torch.ones(4, 1),
    }
    save_file(tensors, file)


def _pickle(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def _cut(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])


def _config(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (_nan, "adapter_model.safetensors"),
        (_pickle, "adapter_model.bin"),
        (_cut, "adapter_model.safetensors"),
        (_config, "adapter_config.json"),
    ],
)
def test_a_bad_adapter_is_a_clear_error_and_the_server_lives(
    live: Live, tmp_path: Path, damage: Callable[[Path], None], named: str
) -> None:
    folder = write_peft(tmp_path / "bad")
    damage(folder)
    response = live.post("/v1/adapters", {"name": "bad", "path": str(folder)})
    assert named in error_of(response, 400)
    assert live.store.names() == ()
    assert text_of(live, BASE)


@pytest.mark.parametrize("name", ["../../etc/cron", "/abs", "a//b", "a b", "", "off", "x" * 300])
def test_a_name_can_not_leave_the_store(live: Live, tmp_path: Path, name: str) -> None:
    folder = write_peft(tmp_path / "sql")
    response = live.post("/v1/adapters", {"name": name, "path": str(folder)})
    assert "name" in error_of(response, 400)


def test_a_file_name_in_an_upload_is_not_used(live: Live, tmp_path: Path) -> None:
    assert upload(live, "sql", write_peft(tmp_path / "sql")).status_code == 201
    assert not (tmp_path.parent / "adapter_config.json").exists()


def test_an_upload_without_a_file_or_with_another_one_is_refused(
    live: Live, tmp_path: Path
) -> None:
    folder = write_peft(tmp_path / "sql")
    (folder / "adapter_model.safetensors").unlink()
    assert "adapter_model.safetensors" in error_of(upload(live, "sql", folder), 400)
    folder = write_peft(tmp_path / "more")
    for wrong in ("../evil.json", "a/b.json", "..", "x" * 101):
        refused = upload(live, "sql", folder, **{wrong: b"x"})
        assert error_of(refused, 400).startswith(f"{wrong}: can't be taken")


def test_an_upload_may_have_all_that_lies_beside_an_adapter(live: Live, tmp_path: Path) -> None:
    folder = write_peft(tmp_path / "sql")
    beside = ("README.md", ".gitattributes", "LICENSE", "training_args.bin", "optimizer.pt")
    beside += ("chat_template.jinja", "tokenizer.model", "merges.txt", "events.out.tfevents.1")
    files = dict.fromkeys(beside, b"x") | {"tokenizer_config.json": b"{}"}
    assert upload(live, "sql", folder, **files).status_code == 201


def test_an_uploaded_pickle_in_place_of_the_weights_is_refused(live: Live, tmp_path: Path) -> None:
    folder = write_peft(tmp_path / "sql")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    assert "pickle" in error_of(upload(live, "sql", folder), 400)


@pytest.mark.parametrize("failure", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("way", ["upload", "path"])
def test_a_full_disk_is_the_servers_fault(
    live: Live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: int, way: str
) -> None:
    def fail(*_args: Any, **_options: Any) -> None:
        raise OSError(failure, "no space", str(tmp_path / "gone" / "version"))

    monkeypatch.setattr("quickchange_server.adapter_registry.importer.add_adapter", fail)
    folder = write_peft(tmp_path / "sql")
    if way == "upload":
        response = upload(live, "sql", folder)
    else:
        response = live.post("/v1/adapters", {"name": "sql", "path": str(folder)})
    said, error = error_of(response, 507), response.json()["error"]
    assert (error["param"], error["code"]) == (None, "insufficient_storage")
    assert "MiB are free" in said
    assert str(tmp_path) not in said


def test_a_store_that_cant_be_written_is_the_servers_fault(
    live: Live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_args: Any, **_options: Any) -> None:
        raise OSError(errno.EROFS, "read-only", str(tmp_path / "store"))

    monkeypatch.setattr("quickchange_server.adapter_registry.importer.add_adapter", fail)
    body = {"name": "sql", "path": str(write_peft(tmp_path / "sql"))}
    response = live.post("/v1/adapters", body)
    assert "can't write its files" in error_of(response, 500)
    assert response.json()["error"]["param"] is None


def test_a_folder_that_cant_be_read_is_the_clients_fault(
    live: Live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_peft(tmp_path / "sql")

    def fail(*_args: Any, **_options: Any) -> None:
        raise PermissionError(errno.EACCES, "no", str(folder / "adapter_config.json"))

    monkeypatch.setattr("quickchange_server.adapter_registry.importer.add_adapter", fail)
    response = live.post("/v1/adapters", {"name": "sql", "path": str(folder)})
    assert error_of(response, 400).startswith("path: ")


def test_the_base_models_name_is_taken(live: Live, tmp_path: Path) -> None:
    folder = write_peft(tmp_path / "sql")
    response = live.post("/v1/adapters", {"name": BASE, "path": str(folder)})
    assert "base model" in error_of(response, 409)
    live.store.add("sql", make_adapter(1.0))
    assert "base model" in error_of(
        live.http.put(f"/v1/aliases/{BASE}", json={"target": "sql"}), 409
    )


def test_a_body_of_another_kind_says_what_to_send(live: Live) -> None:
    response = live.http.post("/v1/adapters", content="name=sql")
    assert "multipart/form-data" in error_of(response, 400)
    assert "name" in error_of(live.post("/v1/adapters", {"path": "x"}), 400)


def test_the_list_has_versions_aliases_and_residency(live: Live) -> None:
    live.store.add("sql", make_adapter(1.0))
    live.store.add("sql", make_adapter(2.0))
    live.store.alias("prod", "sql@1")
    text_of(live, "sql")
    (entry,) = live.http.get("/v1/adapters").json()["data"]
    assert (entry["id"], entry["version"], entry["versions"]) == ("sql", 2, [1, 2])
    assert entry["aliases"] == ["prod"]
    assert entry["residency"] == {"tier": "device", "bytes": ADAPTER_BYTES, "pinned": False}


def test_one_adapter_shows_each_version_and_its_figures(live: Live) -> None:
    live.store.add("team/sql", make_adapter(1.0))
    live.store.add("team/sql", make_adapter(2.0))
    body = live.http.get("/v1/adapters/team/sql@1").json()
    assert (body["id"], body["version"], body["current"]) == ("team/sql", 1, 2)
    assert [v["version"] for v in body["versions"]] == [1, 2]
    assert body["info"]["ranks"] == [1]
    assert body["info"]["parameters"] == 8
    assert "nobody" in error_of(live.http.get("/v1/adapters/nobody"), 404)


def test_the_same_name_added_again_serves_the_new_version(live: Live, tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        folder = write_peft(tmp_path / str(value), value)
        body = live.post("/v1/adapters", {"name": "sql", "path": str(folder)}).json()
        assert live.store.resolve("sql").digest == body["digest"]
    assert text_of(live, "sql") == text_of(live, "sql@2") != text_of(live, "sql@1")


def test_rollback_serves_the_version_before(live: Live) -> None:
    live.store.add("sql", make_adapter(1.0))
    live.store.add("sql", make_adapter(2.0))
    assert live.http.post("/v1/adapters/sql/rollback").json()["version"] == 1
    assert text_of(live, "sql") == text_of(live, "sql@1")
    assert live.post("/v1/adapters/sql/rollback", {"version": 2}).json()["version"] == 2
    assert "9" in error_of(live.post("/v1/adapters/sql/rollback", {"version": 9}), 404)


def test_an_alias_is_served_repointed_and_removed(live: Live) -> None:
    live.store.add("sql", make_adapter(1.0))
    live.store.add("sql", make_adapter(2.0))
    pointed = live.http.put("/v1/aliases/team/prod", json={"target": "sql@1"})
    alias = {"id": "team/prod", "object": "alias", "target": "sql@1", "turbo": None}
    assert pointed.json() == alias
    assert text_of(live, "team/prod") == text_of(live, "sql@1")
    live.http.put("/v1/aliases/team/prod", json={"target": "sql"})
    assert text_of(live, "team/prod") == text_of(live, "sql@2")
    assert live.http.get("/v1/aliases").json()["data"][0]["target"] == "sql"
    assert live.http.delete("/v1/aliases/team/prod").json()["deleted"]
    assert "team/prod" in error_of(live.http.delete("/v1/aliases/team/prod"), 404)


def test_what_an_alias_points_at_is_not_removed(live: Live) -> None:
    live.store.add("sql", make_adapter(1.0))
    live.store.alias("prod", "sql")
    assert "prod" in error_of(live.http.delete("/v1/adapters/sql"), 409)


def test_a_removed_adapter_is_forgotten_by_the_engine(live: Live) -> None:
    live.store.add("sql", make_adapter(1.0))
    digest = live.store.resolve("sql").digest
    text_of(live, "sql")
    body = live.http.delete("/v1/adapters/sql").json()
    assert body["versions"] == ["sql@1"]
    wait_until(lambda: digest not in live.services.client.residency)
    response = live.post("/v1/completions", {**COMPLETION, "model": "sql"})
    assert error_of(response, 404)


def test_content_under_another_name_stays_in_the_engine(live: Live) -> None:
    live.store.add("sql", make_adapter(1.0))
    live.store.add("copy", make_adapter(1.0))
    digest = live.store.resolve("sql").digest
    text_of(live, "sql")
    live.http.delete("/v1/adapters/sql").raise_for_status()
    text_of(live, BASE)
    assert digest in live.services.client.residency


def test_pin_loads_and_unpin_lets_go(live: Live) -> None:
    live.store.add("sql", make_adapter(1.0))
    assert live.http.post("/v1/adapters/sql/pin").status_code == 202

    def residency() -> Any:
        return live.http.get("/v1/adapters/sql").json()["residency"]

    wait_until(lambda: residency() == {"tier": "device", "bytes": ADAPTER_BYTES, "pinned": True})
    live.http.post("/v1/adapters/sql@1/unpin")
    assert residency()["pinned"] is False


def test_prefetch_loads(live: Live) -> None:
    live.store.add("team/sql", make_adapter(1.0))
    response = live.post("/v1/adapters/team/sql/prefetch", {"tier": "device"})
    assert response.status_code == 202
    digest = response.json()["digest"]
    wait_until(lambda: digest in live.services.client.residency)
    error_of(live.post("/v1/adapters/team/sql/prefetch", {"tier": "moon"}), 400)
    error_of(live.http.post("/v1/adapters/nobody/prefetch"), 404)


def test_models_lists_base_adapters_versions_and_aliases(live: Live) -> None:
    live.store.add("team/sql", make_adapter(1.0))
    live.store.alias("prod", "team/sql")
    cards = {card["id"]: card for card in live.http.get("/v1/models").json()["data"]}
    kinds = {name: card["quickchange"]["kind"] for name, card in cards.items()}
    assert kinds == {BASE: "base", "team/sql": "adapter", "team/sql@1": "version", "prod": "alias"}
    assert (cards[BASE]["parent"], cards["prod"]["parent"]) == (None, BASE)
    assert cards["prod"]["root"] == "team/sql@1"
    for name, card in cards.items():
        assert live.http.get(f"/v1/models/{name}").json() == card
    assert error_of(live.http.get("/v1/models/nobody/at/all"), 404)


# --- vLLM's routes ------------------------------------------------------------------------------


def test_vllm_load_and_unload(live: Live, tmp_path: Path) -> None:
    folder = write_peft(tmp_path / "sql")
    body = {"lora_name": "sql", "lora_path": str(folder)}
    loaded = live.post("/v1/load_lora_adapter", body)
    assert loaded.status_code == 200, loaded.text
    assert loaded.text == "Success: LoRA adapter 'sql' added successfully."
    digest = live.store.resolve("sql").digest
    wait_until(lambda: digest in live.services.client.residency)
    unloaded = live.post("/v1/unload_lora_adapter", {"lora_name": "sql"})
    assert unloaded.text == "Success: LoRA adapter 'sql' removed successfully."
    assert "cannot be found" in error_of(
        live.post("/v1/unload_lora_adapter", {"lora_name": "sql"}), 404
    )


def test_vllm_loading_a_loaded_name_needs_load_inplace(live: Live, tmp_path: Path) -> None:
    first, second = write_peft(tmp_path / "1", 1.0), write_peft(tmp_path / "2", 2.0)
    body = {"lora_name": "sql", "lora_path": str(first)}
    assert live.post("/v1/load_lora_adapter", body).status_code == 200
    again = {**body, "lora_path": str(second)}
    assert "load_inplace" in error_of(live.post("/v1/load_lora_adapter", again), 400)
    before = text_of(live, "sql")
    assert live.post("/v1/load_lora_adapter", {**again, "load_inplace": True}).status_code == 200
    assert text_of(live, "sql") != before


def test_vllm_loading_from_a_missing_path_is_an_error(live: Live) -> None:
    body = {"lora_name": "sql", "lora_path": "/no/such/folder"}
    assert "/no/such/folder" in error_of(live.post("/v1/load_lora_adapter", body), 404)
    assert "lora_path" in error_of(live.post("/v1/load_lora_adapter", {"lora_name": "x"}), 400)


def test_tokenize_and_detokenize_are_inverse(live: Live) -> None:
    request = {"model": BASE, "prompt": "Hé", "return_token_strs": True}
    body = live.post("/tokenize", request).json()
    assert body == {
        "count": 3,
        "max_model_len": 2048,
        "tokens": list("Hé".encode()),
        "token_strs": ["H", "Ã", "©"],
    }
    assert live.post("/detokenize", {"tokens": body["tokens"]}).json() == {"prompt": "Hé"}


def test_tokenize_renders_a_chat(live: Live) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    with_prompt = live.post("/tokenize", {"messages": messages}).json()
    without = live.post("/tokenize", {"messages": messages, "add_generation_prompt": False}).json()
    assert live.post("/detokenize", {"tokens": with_prompt["tokens"]}).json()["prompt"] == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert with_prompt["count"] > without["count"]


def test_tokenize_refuses_both_or_neither_and_unknown_models(live: Live) -> None:
    error_of(live.post("/tokenize", {}), 400)
    error_of(live.post("/tokenize", {"prompt": "a", "messages": []}), 400)
    error_of(live.post("/tokenize", {"prompt": "a", "model": "nobody"}), 404)
    error_of(live.post("/detokenize", {"tokens": [9999]}), 400)


def test_version_and_ping(live: Live) -> None:
    assert live.http.get("/version").json()["version"]
    assert live.http.get("/ping").status_code == live.http.post("/ping").status_code == 200


def test_metrics_and_health_answer(live: Live) -> None:
    assert live.http.get("/metrics").headers["content-type"].startswith("text/plain")
    assert "quickchange_" in live.http.get("/metrics").text
    assert live.http.get("/health").json() == {"state": "ready"}


# --- settings -----------------------------------------------------------------------------------


def test_paths_are_refused_by_setting_and_uploads_work(tmp_path: Path) -> None:
    folder = write_peft(tmp_path / "sql")
    with live_server(tmp_path / "store", adapter_paths=False) as live:
        response = live.post("/v1/adapters", {"name": "sql", "path": str(folder)})
        assert "QUICKCHANGE_ADAPTER_PATHS" in error_of(response, 403)
        body = {"lora_name": "sql", "lora_path": str(folder)}
        assert error_of(live.post("/v1/load_lora_adapter", body), 403)
        assert upload(live, "sql", folder).status_code == 201


def test_with_adapters_off_the_base_is_served_alone(tmp_path: Path) -> None:
    with live_server(tmp_path, adapters=False) as live:
        assert "QUICKCHANGE_ADAPTERS" in error_of(live.http.get("/v1/adapters"), 403)
        assert error_of(live.post("/v1/completions", {**COMPLETION, "model": "sql"}), 403)
        assert [card["id"] for card in live.http.get("/v1/models").json()["data"]] == [BASE]
        assert text_of(live, BASE)


def test_an_upload_over_the_bound_is_413(tmp_path: Path) -> None:
    with live_server(tmp_path / "store", max_upload_bytes=1024, max_request_bytes=4096) as live:
        response = upload(live, "sql", write_peft(tmp_path / "sql"), padding=b"x" * 2000)
        assert "max_upload_bytes" in error_of(response, 413)


def test_while_the_engine_starts_requests_get_503_and_live_is_200(tmp_path: Path) -> None:
    with live_server(tmp_path, Behaviour(start_seconds=1.0)) as live:
        assert live.http.get("/health/live").status_code == 200
        assert live.http.get("/health").status_code == 503
        assert live.http.get("/health").json() == {"state": "starting"}
        refused = live.post("/v1/completions", {**COMPLETION, "model": BASE})
        assert error_of(refused, 503)
        assert int(refused.headers["retry-after"]) >= 1
        wait_until(lambda: live.http.get("/health/ready").status_code == 200)
        assert json.loads(live.http.get("/health").text) == {"state": "ready"}
