"""aLoRA through the engine equals PEFT's own token for token, whatever shares the batch.

Prompts with the invocation once, several times, at their very begin and end, and without it; beside
LoRAs and plain rows, in small chunks, with cached prefixes, preemption and two steps in flight.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from engine_driver import Driver, make_engine, request
from peft import LoraConfig, get_peft_model
from tiny_models import make_model, save_model

from quickchange_server.frontend.adapter_spans import activated
from quickchange_server.protocol import Component, Submit
from quickchange_store.base_model.base_spec import base_spec
from quickchange_store.canonical.canonical_adapter import CanonicalAdapter
from quickchange_store.importing import read_adapter

COUNT = 10
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
CALLS = {"judge": [90, 91, 90], "writer": [92], "all": [93, 94]}


def lora(rank: int, targets: object, calls: list[int] | None = None, **more: object) -> LoraConfig:
    return LoraConfig(
        task_type="CAUSAL_LM",
        lora_alpha=12,
        r=rank,
        target_modules=targets,
        alora_invocation_tokens=calls,
        **more,
    )


CONFIGS = {
    "judge": lora(8, ATTENTION, CALLS["judge"]),
    "writer": lora(3, ["v_proj", "down_proj"], CALLS["writer"], lora_bias=True),
    "all": lora(16, "all-linear", CALLS["all"], use_rslora=True),
    "plain": lora(8, ATTENTION),
}


@dataclass(frozen=True)
class Activated:
    """The adapters as they are served, and what PEFT says under each to prompts of many kinds."""

    path: Path
    adapters: dict[str, CanonicalAdapter]
    asked: dict[str, tuple[str | None, list[int]]]  # adapter and prompt
    answers: dict[str, list[int]]

    def submit(self, key: str) -> Submit:
        name, prompt = self.asked[key]
        asking = request(key, prompt, max_tokens=COUNT)
        if name is None:
            return asking
        invocation = self.adapters[name].invocation
        invocations = {} if invocation is None else {name: invocation.tokens}
        components = activated([Component(name)], invocations, prompt)
        return Submit(key, asking.prompt, asking.sampling, components, seed=0)


def prompts(calls: list[int], generator: random.Random) -> Iterator[list[int]]:
    def text(least: int = 1) -> list[int]:
        return [generator.randrange(90) for _ in range(generator.randint(least, 25))]

    stem = text(18)
    yield [*stem, *calls]
    yield [*stem, *calls, *text()]
    yield [*stem, *calls, *text(), *calls, *text()]
    yield [*calls, *text()]
    yield [*calls, *calls[:1], *text()]
    yield [*stem, *text()]  # without
    yield [*stem, *calls[:-1]]  # all but its last token


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Activated:
    folder = tmp_path_factory.mktemp("activated")
    path = save_model("llama", folder / "base")
    spec, generator = base_spec(str(path)), random.Random(1)
    result = Activated(path, {}, {}, {})
    for seed, (name, config) in enumerate(CONFIGS.items()):
        torch.manual_seed(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = get_peft_model(make_model("llama"), config).eval()
            for key, parameter in model.named_parameters():
                if "lora_" in key:
                    torch.nn.init.normal_(parameter, std=0.25)
            model.save_pretrained(folder / name)
            result.adapters[name] = read_adapter(folder / name, spec).adapter
            for index, prompt in enumerate(prompts(CALLS.get(name, [95]), generator)):
                key = f"{name}/{index}"
                result.asked[key] = name, prompt
                result.answers[key] = peft_says(model, prompt)
                with model.disable_adapter():
                    result.asked[f"base/{key}"] = None, prompt
                    result.answers[f"base/{key}"] = peft_says(model, prompt)
    return result


def peft_says(model: torch.nn.Module, prompt: list[int]) -> list[int]:
    """What PEFT generates, which finds the invocation in the prompt."""
    ids = torch.tensor([prompt])
    said = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=COUNT, do_sample=False
    )
    return said[0, len(prompt) :].tolist()


def served(trained: Activated, keys: list[str], **options: object) -> Driver:
    engine = make_engine(trained.path, trained.adapters.__getitem__, **options)
    drive = Driver(engine)
    for place, key in enumerate(keys):
        engine.submit(trained.submit(key))
        if place % 3 == 2:
            drive.step()
    drive.finish(*keys)
    engine.close()
    return drive


def shuffled(trained: Activated) -> list[str]:
    return random.Random(3).sample(sorted(trained.asked), len(trained.asked))


def test_the_reference_activates_at_the_last_invocation_alone(trained: Activated) -> None:
    for name, calls in CALLS.items():
        for index in range(5):
            own, base = (trained.answers[f"{who}{name}/{index}"] for who in ("", "base/"))
            assert own != base, (name, index)
        for index in (5, 6) if len(calls) > 1 else (5,):
            own, base = (trained.answers[f"{who}{name}/{index}"] for who in ("", "base/"))
            assert own == base, (name, index)


@pytest.mark.parametrize(
    "options",
    [
        {"max_sequences": 60, "max_batch_tokens": 256},
        {},  # sixteen rows a step: chunks end within spans, and begin in them
        {"block_size": 16, "max_batch_tokens": 30, "depth": 2},
    ],
)
def test_alora_lora_and_plain_rows_in_one_batch_answer_as_in_peft(
    trained: Activated, options: dict[str, object]
) -> None:
    drive = served(trained, shuffled(trained), **options)
    for key, answer in trained.answers.items():
        assert drive.tokens[key] == answer, (key, trained.asked[key])


def test_preemption_changes_nothing(trained: Activated) -> None:
    small = 3 * 2 * 2 * 12 * 4 * 64 * 3 // 2  # 96 tokens for up to eight sequences
    drive = served(trained, shuffled(trained), kv_cache_bytes=small, max_model_len=96)
    assert drive.engine.scheduler.preemptions > 0
    assert drive.engine.scheduler.prefix_hit_tokens > 0
    for key, answer in trained.answers.items():
        assert drive.tokens[key] == answer, (key, trained.asked[key])


def test_a_prefix_before_the_invocation_is_the_bases_and_every_aloras(trained: Activated) -> None:
    engine = make_engine(trained.path, trained.adapters.__getitem__, max_batch_tokens=64)
    drive = Driver(engine)
    stem = list(range(1, 34))  # eight blocks of four, and one token
    found = {}
    for name in (None, "judge", "all", "plain"):
        prompt = [*stem, *CALLS.get(name or "", [1]), 7, 8]
        key = name or "base"
        trained_key = Activated(trained.path, trained.adapters, {key: (name, prompt)}, {})
        engine.submit(trained_key.submit(key))
        drive.finish(key)
        found[key] = drive.first[key].cached_tokens
    engine.close()
    assert found == {"base": 0, "judge": 32, "all": 32, "plain": 0}


def test_a_chain_of_calls_computes_nothing_twice(trained: Activated) -> None:
    """The base answers, one aLoRA judges it, another writes on: each reads what is before its call
    from the cache. With the first one's span in the composition, the second reads its rows too."""
    engine = make_engine(trained.path, trained.adapters.__getitem__, max_batch_tokens=64)
    drive = Driver(engine)

    def ask(key: str, prompt: list[int], *components: Component) -> tuple[list[int], int]:
        asking = request(key, prompt, max_tokens=COUNT)
        engine.submit(Submit(key, asking.prompt, asking.sampling, components, seed=0))
        drive.finish(key)
        return drive.tokens[key], drive.first[key].cached_tokens or 0

    def cacheable(count: int) -> int:
        return count // 4 * 4  # in blocks of four

    question = list(range(1, 34))
    answer, _ = ask("base", question)
    talk = [*question, *answer]
    known = len(talk) - 1  # the last token was sampled, and not computed
    judged = [*talk, *CALLS["judge"]]
    verdict, found = ask("judge", judged, Component("judge", 1.0, len(talk)))
    assert found == cacheable(known)
    _, found = ask("writer", [*talk, *CALLS["writer"]], Component("writer", 1.0, len(talk)))
    assert found == cacheable(known)
    _, found = ask("again", [*talk, 5, 6, 7])
    assert found == cacheable(known)
    until = len(judged) + len(verdict)
    chain = [*judged, *verdict, *CALLS["all"]]
    both = Component("judge", 1.0, len(talk), until), Component("all", 1.0, until)
    said, found = ask("chain", chain, *both)
    assert found == cacheable(until - 1)
    engine.close()
    fresh = make_engine(
        trained.path, trained.adapters.__getitem__, max_batch_tokens=64, prefix_cache=False
    )
    drive = Driver(fresh)
    asking = request("chain", chain, max_tokens=COUNT)
    fresh.submit(Submit("chain", asking.prompt, asking.sampling, both, seed=0))
    drive.finish("chain")
    fresh.close()
    assert drive.tokens["chain"] == said
