"""The API process of a real server: no torch, no transformers, and little memory."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest
from llm_models import LlmModels, ids_of, make_llm_models, text_of

MOST_BYTES = 150 << 20
LIMIT_SECONDS = 300.0
MAIN = "from quickchange_server.cli import main; main()"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> LlmModels:
    return make_llm_models(tmp_path_factory.mktemp("models"))


@contextmanager
def served(*arguments: str) -> Iterator[tuple[psutil.Process, httpx.Client]]:
    """The command `serve` in a process of its own, ended by its id."""
    with subprocess.Popen(
        [sys.executable, "-c", MAIN, "serve", "--port", "0", *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONWARNINGS": "ignore"},
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith("Quickchange is ready on "), line
            url = line.split()[4]
            with httpx.Client(base_url=url, timeout=LIMIT_SECONDS) as client:
                yield psutil.Process(process.pid), client
        finally:
            process.terminate()
            try:
                process.wait(LIMIT_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                raise


def test_the_api_process_imports_serves_and_composes_without_torch(
    models: LlmModels, tmp_path: Path
) -> None:
    settings = [
        "--model",
        str(models.path),
        "--store",
        str(tmp_path),
        "--kv-cache-bytes",
        "4194304",
    ]
    modules = ["--lora-modules", f"first={models.adapters['sql']}"]
    with served(*settings, *modules, "--threads", "1") as (process, client):
        folder = models.adapters["sql"]
        added = client.post("/v1/adapters", json={"name": "sql", "path": str(folder)})
        assert added.status_code == 201, added.text
        files = {
            path.name: (path.name, path.read_bytes())
            for path in models.adapters["orders"].iterdir()
            if path.suffix in (".json", ".safetensors")
        }
        uploaded = client.post("/v1/adapters", data={"name": "orders"}, files=files)
        assert uploaded.status_code == 201, uploaded.text
        terms = [{"id": "sql", "weight": 0.5}, {"id": "orders", "weight": 0.5}]
        composed = client.post("/v1/adapters", json={"name": "both", "adapters": terms})
        assert composed.status_code == 201, composed.text
        refused = client.post("/v1/adapters", json={"name": "no", "path": str(models.path)})
        assert refused.status_code == 400, refused.text
        assert "adapter_config.json" in refused.json()["error"]["message"]

        for name in ("sql", "orders"):
            asked = {"model": name, "prompt": "SELECT ", "max_tokens": 8, "temperature": 0}
            answer = client.post("/v1/completions", json=asked).json()
            expected = models.greedy(name, ids_of("SELECT "), 8)
            assert answer["choices"][0]["text"] == text_of(expected)
        chat = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "temperature": 0}
        for name in ("base", "first", "both"):
            model = models.path.name if name == "base" else name
            assert client.post("/v1/chat/completions", json={**chat, "model": model}).is_success
        schema = {"type": "json_object"}
        formed = {**chat, "model": "sql", "response_format": schema}
        assert client.post("/v1/chat/completions", json=formed).is_success
        vectors = {"model": "orders", "input": ["abc", "d"]}
        assert client.post("/v1/embeddings", json=vectors).is_success

        mapped = {Path(region.path).name for region in process.memory_maps()}
        assert not [name for name in mapped if name.startswith("libtorch")]
        assert process.memory_info().rss <= MOST_BYTES
