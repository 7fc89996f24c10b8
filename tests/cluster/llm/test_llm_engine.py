"""The engine that Ray Serve LLM asks, over the fake engine: answers, events, errors, adapters."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("pyarrow", reason="ray.serve.llm needs pyarrow")

from fake_engine import Behaviour, entries, token_at
from http_support import write_peft
from pydantic import BaseModel, Field
from ray.llm._internal.serve.core.configs.openai_api_models import (
    ChatCompletionRequest,
    ChatCompletionResponse,
    CompletionRequest,
    CompletionResponse,
    DetokenizeRequest,
    EmbeddingCompletionRequest,
    ErrorResponse,
    ScoreRequest,
    TokenizeCompletionRequest,
)
from ray.llm._internal.serve.core.ingress.builder import LLMServingArgs
from ray.llm._internal.serve.core.protocol import RawRequestInfo
from ray_llm import BASE, fake_llm_engine, llm_config

from quickchange_server.cluster.llm.llm_engine import (
    QuickchangeEngine,
    body_of,
    check_config,
    resources_of,
)
from quickchange_server.cluster.llm.llm_server import QuickchangeServer
from quickchange_server.errors import EngineFailedError, SettingError

ROOT = Path(__file__).parents[3]


async def whole(parts: Any) -> Any:
    collected = [part async for part in parts]
    assert len(collected) == 1, collected
    return collected[0]


def completion(**changes: Any) -> CompletionRequest:
    return CompletionRequest(
        **{"model": BASE, "prompt": "ab", "max_tokens": 4, "seed": 1, **changes}
    )


async def text_of(engine: QuickchangeEngine, model: str) -> str:
    answer = await whole(engine.completions(completion(model=model)))
    assert isinstance(answer, CompletionResponse), answer
    return str(answer.choices[0].text)


def test_a_completion_is_answered_by_rays_response_model() -> None:
    async def scenario() -> None:
        async with fake_llm_engine() as engine:
            answer = await whole(engine.completions(completion()))
            assert isinstance(answer, CompletionResponse)
            assert answer.model == BASE
            assert answer.choices[0].text == bytes(token_at(1, 2 + i) for i in range(4)).decode()
            assert answer.usage.completion_tokens == 4

    asyncio.run(scenario())


def test_a_chat_is_answered_by_rays_response_model() -> None:
    async def scenario() -> None:
        async with fake_llm_engine() as engine:
            messages = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
            request = ChatCompletionRequest(model=BASE, messages=messages, max_tokens=3)
            answer = await whole(engine.chat(request))
            assert isinstance(answer, ChatCompletionResponse)
            assert answer.choices[0].message["role"] == "assistant"
            assert answer.usage.completion_tokens == 3

    asyncio.run(scenario())


def test_a_stream_is_the_routes_own_events() -> None:
    async def scenario() -> None:
        async with fake_llm_engine() as engine:
            request = completion(stream=True, stream_options={"include_usage": True})
            events = [part async for part in engine.completions(request)]
            assert all(e.startswith("data: ") and e.endswith("\n\n") for e in events)
            assert events[-1] == "data: [DONE]\n\n"
            bodies = [json.loads(event.removeprefix("data: ")) for event in events[:-1]]
            text = "".join(c["text"] for body in bodies for c in body["choices"])
            assert text == bytes(token_at(1, 2 + i) for i in range(4)).decode()
            assert bodies[-1]["usage"]["completion_tokens"] == 4

    asyncio.run(scenario())


def test_a_refused_field_is_an_error_response_with_its_status() -> None:
    async def scenario() -> None:
        async with fake_llm_engine() as engine:
            answer = await whole(engine.completions(completion(suffix="x")))
            assert isinstance(answer, ErrorResponse)
            assert answer.error.code == 400
            assert answer.error.param == "suffix"

    asyncio.run(scenario())


def test_fields_that_the_client_did_not_send_are_not_sent_on() -> None:
    async def scenario() -> None:
        async with fake_llm_engine() as engine:
            request = completion(temperature=None, best_of=None)
            request.request_id = "from-serve"  # as Ray's server does
            answer = await whole(engine.completions(request))
            assert isinstance(answer, CompletionResponse)

    asyncio.run(scenario())


class Schema(BaseModel):
    schema_: dict[str, Any] | None = Field(None, alias="schema")


class Typed(BaseModel):
    """Fields as vLLM's models have them: aliases, iterables, a dataclass of a constraint."""

    messages: list[dict[str, Iterable[dict[str, Any]]]]
    json_schema: Schema | None = None
    structured_outputs: dict[str, Any] | None = None
    temperature: float | None = 0.5
    seed: int | None = None


def test_the_body_is_what_the_client_sent() -> None:
    sent = {
        "messages": [{"content": [{"type": "text", "text": "a"}]}],
        "json_schema": {"schema": {"enum": [None]}},
        "structured_outputs": {"regex": "a", "json": None},
        "seed": None,
    }
    assert body_of(Typed.model_validate(sent)) == {
        "messages": [{"content": [{"type": "text", "text": "a"}]}],
        "json_schema": {"schema": {"enum": [None]}},
        "structured_outputs": {"regex": "a"},
    }


def test_an_engine_that_cannot_start_says_why_and_leaves_nothing() -> None:
    async def scenario() -> None:
        with pytest.raises(EngineFailedError, match="no such model"):
            async with fake_llm_engine(behaviour=Behaviour(refusal="no such model")):
                pass

    asyncio.run(scenario())
    assert multiprocessing.active_children() == []


def test_a_reader_that_stops_cancels_the_sequence(tmp_path: Path) -> None:
    journal = tmp_path / "journal"

    async def scenario() -> None:
        slow = Behaviour(step_seconds=0.02, journal=journal)
        async with fake_llm_engine(behaviour=slow) as engine:
            stream = engine.completions(completion(stream=True, max_tokens=1000))
            assert (await anext(stream)).startswith("data: ")
            await stream.aclose()
            assert await _eventually(lambda: engine.routing_stats() == {"in_flight": 0})
        assert len(entries(journal, "Cancel")) == 1

    asyncio.run(scenario())


def test_a_cancelled_task_cancels_the_sequence_of_a_whole_answer(tmp_path: Path) -> None:
    journal = tmp_path / "journal"

    async def scenario() -> None:
        slow = Behaviour(step_seconds=0.02, journal=journal)
        async with fake_llm_engine(behaviour=slow) as engine:
            task = asyncio.create_task(whole(engine.completions(completion(max_tokens=1000))))
            assert await _eventually(lambda: bool(entries(journal, "Submit")))
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await _eventually(lambda: engine.routing_stats() == {"in_flight": 0})
        assert len(entries(journal, "Cancel")) == 1

    asyncio.run(scenario())


def test_lora_modules_are_served_by_their_ids(tmp_path: Path) -> None:
    folder = write_peft(tmp_path / "peft", 2.0)
    modules = [{"name": "sql", "path": str(folder)}, {"name": "my:odd id", "path": str(folder)}]

    async def scenario() -> None:
        async with fake_llm_engine(llm_config(engine_kwargs={"lora_modules": modules})) as engine:
            answer = await whole(engine.completions(completion(model=f"{BASE}:sql")))
            assert answer.model == f"{BASE}:sql"
            assert answer.choices[0].text == await text_of(engine, f"{BASE}:my:odd id")
            assert answer.choices[0].text != await text_of(engine, BASE)

    asyncio.run(scenario())


def test_an_adapter_that_nobody_has_is_not_found() -> None:
    async def scenario() -> None:
        async with fake_llm_engine() as engine:
            for model in (f"{BASE}:none", f"{BASE}:", "other"):
                answer = await whole(engine.completions(completion(model=model)))
                assert isinstance(answer, ErrorResponse)
                assert answer.error.code == 404
                assert repr(model) in answer.error.message

    asyncio.run(scenario())


def test_a_composition_may_name_adapters_by_their_ids(tmp_path: Path) -> None:
    modules = {"a": str(write_peft(tmp_path / "a", 1.0)), "b": str(write_peft(tmp_path / "b", 2.0))}

    async def scenario() -> None:
        async with fake_llm_engine(llm_config(engine_kwargs={"lora_modules": modules})) as engine:
            mixes = [
                [{"id": f"{BASE}:a", "weight": 0.5}, {"id": "b", "weight": 0.5}],
                [{"id": "a", "weight": 0.5}, {"id": f"{BASE}:b", "weight": 0.5}],
            ]
            texts = {
                (await whole(engine.completions(completion(adapters=mix)))).choices[0].text
                for mix in mixes
            }
            assert len(texts) == 1

    asyncio.run(scenario())


def test_tokens_embeddings_and_scores_are_those_of_the_routes() -> None:
    async def scenario() -> None:
        async with fake_llm_engine() as engine:
            tokens = await whole(
                engine.tokenize(TokenizeCompletionRequest(model=BASE, prompt="ab"))
            )
            assert (tokens.tokens, tokens.count) == ([97, 98], 2)
            text = await whole(engine.detokenize(DetokenizeRequest(model=BASE, tokens=[97, 98])))
            assert text.prompt == "ab"
            request = EmbeddingCompletionRequest(model=BASE, input="ab")
            assert len((await whole(engine.embeddings(request))).data[0]["embedding"]) == 4
            pair = ScoreRequest(model=BASE, text_1="ab", text_2=["ab", "c"])
            scores = [item["score"] for item in (await whole(engine.score(pair))).data]
            assert scores[0] == pytest.approx(1)
            assert scores[1] < 1

    asyncio.run(scenario())


def test_what_is_not_served_is_said() -> None:
    async def scenario() -> None:
        async with fake_llm_engine() as engine:
            for call in (engine.sleep, engine.reset_prefix_cache, engine.start_profile):
                with pytest.raises(Exception, match="not served by Quickchange"):
                    await call()

    asyncio.run(scenario())


def test_a_clients_key_and_request_id_reach_the_routes(tmp_path: Path) -> None:
    database = f"sqlite:///{tmp_path / 'keys.sqlite3'}"
    config = llm_config(engine_kwargs={"api_keys": True, "database": database})

    async def scenario() -> None:
        async with fake_llm_engine(config) as engine:
            raw = RawRequestInfo(headers={"Authorization": "Bearer wrong", "Host": "elsewhere"})
            answer = await whole(engine.completions(completion(), raw))
            assert answer.error.code == 401

    asyncio.run(scenario())


def test_the_example_is_a_configuration_that_deploys() -> None:
    example = yaml.safe_load((ROOT / "docker" / "ray" / "serve-llm.yaml").read_text())
    (application,) = example["applications"]
    (config,) = LLMServingArgs.model_validate(application["args"]).llm_configs
    check_config(config)
    assert config.server_cls is QuickchangeServer
    options = resources_of(config).actor_options({})
    assert options == {"num_cpus": 1.0, "num_gpus": 1.0, "accelerator_type": "H100"}


@pytest.mark.parametrize(
    "wrong",
    [
        {"engine_kwargs": {"pipeline_parallel_size": 2}},
        {"engine_kwargs": {"lora_modules": "a"}},
        {"accelerator_config": {"kind": "tpu"}},
        {"callback_config": {"callback_kwargs": {"a": 1}}},
        {"model_loading_config": {"model_id": BASE, "tokenizer_source": "other"}},
    ],
)
def test_a_configuration_that_is_not_served_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(SettingError):
        check_config(llm_config(**wrong))


def test_a_paused_engine_holds_requests_back_until_it_resumes() -> None:
    async def scenario() -> None:
        async with fake_llm_engine() as engine:
            await engine.pause(mode="wait")
            assert await engine.is_paused()
            task = asyncio.create_task(whole(engine.completions(completion())))
            done, _ = await asyncio.wait([task], timeout=0.1)
            assert not done
            await engine.resume()
            assert isinstance(await task, CompletionResponse)

    asyncio.run(scenario())


def test_a_failed_engine_is_told_to_ray(tmp_path: Path) -> None:
    broken = tmp_path / "broken"

    async def scenario() -> None:
        async with fake_llm_engine(behaviour=Behaviour(poison=97, broken=broken)) as engine:
            await engine.check_health()
            broken.touch()
            task = asyncio.create_task(whole(engine.completions(completion())))
            assert await _eventually(lambda: _failed(engine))
            with pytest.raises(RuntimeError, match="the engine has failed"):
                await engine.check_health()
            assert (await task).error.code == 500

    asyncio.run(scenario())


def _failed(engine: QuickchangeEngine) -> bool:
    return engine._services.client.state == "failed"


async def _eventually(condition: Any, seconds: float = 20.0) -> bool:
    for _ in range(int(seconds / 0.02)):
        if condition():
            return True
        await asyncio.sleep(0.02)
    return False
