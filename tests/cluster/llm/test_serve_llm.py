"""Ray Serve LLM with Quickchange as its server class: a real ingress and replica on a real Ray."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import openai
import pytest

pytest.importorskip("pyarrow", reason="ray.serve.llm needs pyarrow")

import ray
from llm_models import LlmModels, ids_of, make_llm_models, text_of
from moto.server import ThreadedMotoServer
from ray import serve
from ray.serve.llm import LLMConfig, build_openai_app

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.filterwarnings("ignore"),  # Ray's own
]

BASE, BUCKET, PORT, TOKENS = "tiny", "adapters", 8104, 12
STANDINS = Path(__file__).parents[2] / "support" / "vllm_standins"
PROMPTS = ("List all users.", "Two pumps", "x" * 20)


@dataclass
class Cluster:
    client: openai.OpenAI
    models: LlmModels

    def expected(self, adapter: str | None, prompt: str) -> str:
        return text_of(self.models.greedy(adapter, ids_of(prompt), TOKENS))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    models = make_llm_models(tmp_path_factory.mktemp("models"))
    bucket = ThreadedMotoServer("127.0.0.1", port=0)
    bucket.start()
    host, port = bucket.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        path = os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(STANDINS)])
        patch.setenv("PYTHONPATH", path.strip(os.pathsep))
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        patch.delenv("RAY_ADDRESS", raising=False)
        _upload(models)
        try:
            yield from _served(models, tmp_path_factory.mktemp("ray"))
        finally:
            bucket.stop()


def _upload(models: LlmModels) -> None:
    client = boto3.client("s3")
    client.create_bucket(Bucket=BUCKET)
    for name, folder in models.adapters.items():
        for file in folder.iterdir():
            client.upload_file(str(file), BUCKET, f"lora/{name}/{file.name}")


def _served(models: LlmModels, folder: Path) -> Iterator[Cluster]:
    ray.init(
        address="local",
        _node_ip_address="127.0.0.1",
        include_dashboard=False,
        _temp_dir=os.environ.get("QUICKCHANGE_TEST_RAY_DIR", str(folder)),
        num_cpus=6,
    )
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": PORT})
        config = LLMConfig(
            model_loading_config={"model_id": BASE, "model_source": str(models.path)},
            server_cls="quickchange_server.cluster.llm.llm_server:QuickchangeServer",
            accelerator_config={"kind": "cpu"},
            deployment_config={"health_check_timeout_s": 120},
            lora_config={
                "dynamic_lora_loading_path": f"s3://{BUCKET}/lora",
                "max_num_adapters_per_replica": 1,
            },
            engine_kwargs={
                "enable_lora": True,
                "max_model_len": 96,
                "max_lora_rank": 16,
                "dtype": "float32",
                "kv_cache_memory_bytes": 1 << 20,
            },
        )
        serve.run(build_openai_app({"llm_configs": [config]}), name="llm")
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{PORT}/v1", api_key="none", timeout=60)
        yield Cluster(client, models)
    finally:
        serve.shutdown()
        ray.shutdown()


def complete(cluster: Cluster, model: str, prompt: str, **more: Any) -> Any:
    return cluster.client.completions.create(
        model=model,
        prompt=prompt,
        temperature=0,
        max_tokens=TOKENS,
        extra_body={"ignore_eos": True},
        **more,
    )


def test_models_are_the_base_and_the_adapters_of_the_bucket(cluster: Cluster) -> None:
    names = {model.id for model in cluster.client.models.list()}
    assert names == {BASE, f"{BASE}:sql", f"{BASE}:orders"}


def test_each_adapter_answers_as_in_peft_also_beside_others(cluster: Cluster) -> None:
    asked = [(name, prompt) for name in (None, "sql", "orders") for prompt in PROMPTS]

    def answer(item: tuple[str | None, str]) -> Any:
        adapter, prompt = item
        return complete(cluster, BASE if adapter is None else f"{BASE}:{adapter}", prompt)

    with ThreadPoolExecutor(len(asked)) as threads:
        answers = list(threads.map(answer, asked))
    for (adapter, prompt), found in zip(asked, answers, strict=True):
        assert found.choices[0].text == cluster.expected(adapter, prompt)
        assert found.model == (BASE if adapter is None else f"{BASE}:{adapter}")
        assert found.usage.completion_tokens == TOKENS


def test_a_stream_has_the_text_of_the_whole_answer(cluster: Cluster) -> None:
    events = complete(cluster, f"{BASE}:sql", PROMPTS[0], stream=True)
    text = "".join(event.choices[0].text for event in events)
    assert text == cluster.expected("sql", PROMPTS[0])


def test_a_chat_streams_what_it_answers_whole(cluster: Cluster) -> None:
    chat: dict[str, Any] = {
        "model": f"{BASE}:orders",
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}],
        "temperature": 0,
        "max_tokens": TOKENS,
        "extra_body": {"ignore_eos": True},
    }
    whole = cluster.client.chat.completions.create(**chat)
    assert whole.choices[0].message.content == cluster.expected(
        "orders", "user: Hello\nassistant: "
    )
    events = list(
        cluster.client.chat.completions.create(
            **chat, stream=True, stream_options={"include_usage": True}
        )
    )
    text = "".join(e.choices[0].delta.content or "" for e in events if e.choices)
    assert text == whole.choices[0].message.content
    assert events[-1].usage is not None
    assert events[-1].usage.completion_tokens == TOKENS


@pytest.mark.parametrize("model", [f"{BASE}:none", f"{BASE}:", f"{BASE}:../lora/sql", "other"])
def test_an_unknown_model_is_not_found(cluster: Cluster, model: str) -> None:
    with pytest.raises(openai.NotFoundError):
        complete(cluster, model, "x")


def test_a_wrong_field_is_the_clients_error(cluster: Cluster) -> None:
    with pytest.raises(openai.BadRequestError, match="suffix"):
        complete(cluster, BASE, "x", suffix="y")
