"""Prompts' log-probabilities and embeddings equal transformers + PEFT's, whatever shares the batch.

Chunked prefill, preemption, prefix hits and cancellation are forced in between.
"""

from __future__ import annotations

import dataclasses
import random
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_driver import Driver, make_engine, request
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import VOCABULARY, make_model, save_model

from quickchange_server.config import Settings
from quickchange_server.engine.engine import Engine
from quickchange_server.engine.scheduling.scheduler import Scheduled
from quickchange_server.model.loading.model_loader import load_model
from quickchange_server.protocol import Delta
from quickchange_store.base_model.base_spec import base_spec
from quickchange_store.canonical.canonical_adapter import CanonicalAdapter
from quickchange_store.formats.peft.lora import read_peft

TARGETS = [["q_proj", "v_proj", "lm_head"], ["q_proj", "k_proj", "down_proj"]]


@dataclass
class Reference:
    path: Path
    model: PeftModel
    adapters: dict[str, CanonicalAdapter]

    @torch.inference_mode()
    def rows(self, adapter: str | None, prompt: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """(log-probabilities [T, V], hidden states behind the final norm [T, H])."""
        seen: list[torch.Tensor] = []
        head = self.model.get_base_model().lm_head
        hook = head.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
        ids = torch.tensor([prompt])
        try:
            if adapter is None:
                with self.model.disable_adapter():
                    out = self.model(input_ids=ids, output_hidden_states=True)
            else:
                self.model.set_adapter(adapter)
                out = self.model(input_ids=ids, output_hidden_states=True)
        finally:
            hook.remove()
        # transformers' own name for the same: its last hidden states are behind the norm
        torch.testing.assert_close(seen[0], out.hidden_states[-1][0])
        return torch.log_softmax(out.logits[0].float(), dim=-1), seen[0]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    folder = tmp_path_factory.mktemp("reading")
    path = save_model("llama", folder / "base")
    spec = base_spec(str(path))
    model: PeftModel | None = None
    for index, targets in enumerate(TARGETS):
        torch.manual_seed(index)
        config = LoraConfig(r=8, lora_alpha=12, task_type="CAUSAL_LM", target_modules=targets)
        name = f"adapter-{index}"
        if model is None:
            model = get_peft_model(make_model("llama"), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        for key, parameter in model.named_parameters():
            if f".{name}" in key:
                torch.nn.init.normal_(parameter, std=0.25)
    assert model is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT adds the base's own LM head to adapters of it
        model.eval().save_pretrained(folder)
    names = [f"adapter-{index}" for index in range(len(TARGETS))]
    return Reference(path, model, {name: read_peft(folder / name, spec).adapter for name in names})


def prompts(count: int, seed: int) -> list[list[int]]:
    generator = random.Random(seed)
    return [
        [generator.randrange(VOCABULARY) for _ in range(generator.randint(1, 45))]
        for _ in range(count)
    ]


def check_logprobs(
    reference: Reference, adapter: str | None, prompt: list[int], first: Delta, top: int
) -> None:
    expected, _ = reference.rows(adapter, prompt)
    told = first.prompt_logprobs
    assert [one.token_id for one in told] == prompt[1:]
    for row, (one, token) in enumerate(zip(told, prompt[1:], strict=True)):
        assert one.logprob == pytest.approx(float(expected[row, token]), abs=2e-4)
        best = expected[row].topk(top)
        assert [token for token, _ in one.top] == best.indices.tolist()
        np.testing.assert_allclose([p for _, p in one.top], best.values.numpy(), atol=2e-4)


def check_embedding(
    reference: Reference, adapter: str | None, prompt: list[int], last: Delta, pooling: str
) -> None:
    _, states = reference.rows(adapter, prompt)
    expected = states.double().mean(0) if pooling == "mean" else states[-1].double()
    assert last.finish_reason == "stop"
    assert last.token_ids == ()
    assert last.embedding is not None
    found = np.frombuffer(last.embedding, dtype="<f4")
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-4)


@dataclass(frozen=True)
class Asked:
    adapter: str | None
    prompt: list[int]
    kind: str  # mean, last, scores or plain
    new: int = 4  # tokens generated

    def submit(self, engine: Engine, key: str) -> None:
        adapters = [(self.adapter, 1.0)] if self.adapter else []
        if self.kind in ("mean", "last"):
            sent = request(key, self.prompt, adapters, pooling=self.kind)  # type: ignore[arg-type]
        else:
            top = 3 if self.kind == "scores" else None
            sent = request(key, self.prompt, adapters, prompt_logprobs=top, max_tokens=self.new)
        engine.submit(sent)

    def check(self, reference: Reference, drive: Driver, key: str) -> None:
        if self.kind in ("mean", "last"):
            check_embedding(reference, self.adapter, self.prompt, drive.last[key], self.kind)
        elif self.kind == "scores":
            check_logprobs(reference, self.adapter, self.prompt, drive.first[key], 3)


def mixed(reference: Reference, count: int, seed: int) -> Iterator[Asked]:
    generator = random.Random(seed)
    names = [*reference.adapters, None]
    kinds = ["mean", "last", "scores", "plain"]
    for index, prompt in enumerate(prompts(count, seed)):
        yield Asked(generator.choice(names), prompt, kinds[index % 4])


def test_all_kinds_with_different_adapters_in_one_batch(reference: Reference) -> None:
    engine = make_engine(reference.path, reference.adapters.__getitem__)
    drive = Driver(engine)
    asked = {str(i): one for i, one in enumerate(mixed(reference, 16, 1))}
    for key, one in asked.items():
        one.submit(engine, key)
    drive.finish(*asked)
    engine.close()
    for key, one in asked.items():
        one.check(reference, drive, key)
    plain = {key: one for key, one in asked.items() if one.kind == "plain"}
    alone = Driver(make_engine(reference.path, reference.adapters.__getitem__))
    for key, one in plain.items():
        one.submit(alone.engine, key)
    alone.finish(*plain)
    alone.engine.close()
    assert {key: drive.tokens[key] for key in plain} == alone.tokens, "others' tokens change"


@pytest.mark.parametrize("kind", ["mean", "last", "scores"])
def test_preemption_halfway_changes_nothing(reference: Reference, kind: str) -> None:
    engine = make_engine(
        reference.path,
        reference.adapters.__getitem__,
        kv_cache_bytes=3 * 2 * 2 * 12 * 4 * 64 * 3 // 2,  # 96 tokens
        max_model_len=96,
    )
    engine.scheduler.max_batch_tokens = 5  # the prompt takes many steps, while the others grow
    drive = Driver(engine)
    for index in range(3):
        engine.submit(request(str(index), [index + 1], max_tokens=40))
    prompt = list(range(1, 61))
    asked = Asked(None, prompt, kind)
    asked.submit(engine, "read")
    halfway = 0
    while "read" not in drive.last:
        before = {s.request_id: s.computed for s in engine.scheduler.running}
        drive.step()
        gone = {s.request_id for s in engine.scheduler.foreground.preempted}
        halfway += 0 < before.get("read", 0) < len(prompt) - 1 and "read" in gone
    engine.close()
    assert halfway
    asked.check(reference, drive, "read")


def test_a_crowded_cache_with_shared_prefixes_changes_nothing(reference: Reference) -> None:
    engine = make_engine(
        reference.path,
        reference.adapters.__getitem__,
        kv_cache_bytes=3 * 2 * 2 * 12 * 4 * 64 * 3 // 2,  # 96 tokens for up to eight sequences
        max_model_len=96,
    )
    drive = Driver(engine)
    generator = random.Random(2)
    asked: dict[str, Asked] = {}
    stem = prompts(1, 5)[0]
    for index, one in enumerate(mixed(reference, 40, 3)):
        own = [*stem[: 4 * (index % 3)], *one.prompt]
        asked[str(index)] = dataclasses.replace(one, prompt=own, new=30)
        asked[str(index)].submit(engine, str(index))
        for _ in range(generator.randint(0, 3)):
            drive.step()
    drive.finish(*asked)
    engine.close()
    assert engine.scheduler.preemptions > 0
    assert engine.scheduler.prefix_hit_tokens > 0
    for key, one in asked.items():
        one.check(reference, drive, key)


def test_only_the_last_tokens_state_uses_the_prefix_cache(reference: Reference) -> None:
    engine = make_engine(reference.path)
    drive = Driver(engine)
    prompt = list(range(1, 30))
    found = {}
    for kind in ("plain", "last", "mean", "scores", "plain again"):
        Asked(None, prompt, kind).submit(engine, kind)
        drive.finish(kind)
        found[kind] = drive.first[kind].cached_tokens
    assert found == {"plain": 0, "last": 28, "mean": 0, "scores": 0, "plain again": 28}


def test_a_prompt_that_was_read_is_published_to_the_prefix_cache(reference: Reference) -> None:
    engine = make_engine(reference.path)
    drive = Driver(engine)
    Asked(None, list(range(1, 30)), "mean").submit(engine, "mean")
    drive.finish("mean")
    assert engine.scheduler.blocks.used == 0
    Asked(None, list(range(1, 30)), "plain").submit(engine, "plain")
    drive.finish("plain")
    assert drive.first["plain"].cached_tokens == 28


def test_no_new_token_where_only_the_prompts_are_asked_for(reference: Reference) -> None:
    engine = make_engine(reference.path)
    drive = Driver(engine)
    engine.submit(request("r", [5, 6, 7, 8], prompt_logprobs=2, max_tokens=0))
    drive.finish("r")
    assert drive.last["r"].finish_reason == "length"
    assert drive.tokens["r"] == []
    check_logprobs(reference, None, [5, 6, 7, 8], drive.last["r"], 2)


def test_a_single_token_has_no_log_probability_before_it(reference: Reference) -> None:
    engine = make_engine(reference.path)
    drive = Driver(engine)
    engine.submit(request("r", [5], prompt_logprobs=2, max_tokens=2))
    drive.finish("r")
    assert drive.first["r"].prompt_logprobs == ()
    assert len(drive.tokens["r"]) == 2


def test_a_resubmission_with_output_does_not_tell_them_again(reference: Reference) -> None:
    engine = make_engine(reference.path)
    drive = Driver(engine)
    engine.submit(request("whole", [5, 6, 7, 8], prompt_logprobs=0, max_tokens=6))
    drive.finish("whole")
    tokens = drive.tokens["whole"]
    engine.submit(request("rest", [5, 6, 7, 8], output=tokens[:2], prompt_logprobs=0, max_tokens=6))
    drive.finish("rest")
    assert drive.tokens["rest"] == tokens[2:]
    assert drive.first["rest"].prompt_logprobs == ()


@pytest.mark.parametrize("kind", ["mean", "last", "scores"])
def test_what_is_not_finite_fails_its_request_alone(reference: Reference, kind: str) -> None:
    """An adapter whose values are numbers, and whose product is none."""
    whole = reference.adapters["adapter-1"]
    huge = {
        path: replace(update, a=update.a * 1e30, b=update.b * 1e30)
        for path, update in whole.updates.items()
    }
    adapters = {**reference.adapters, "huge": replace(whole, updates=huge)}
    engine = make_engine(reference.path, adapters.__getitem__)
    drive = Driver(engine)
    prompt = prompts(1, 9)[0]
    Asked("huge", prompt, kind).submit(engine, "huge")
    sound = Asked("adapter-1", prompt, kind)
    sound.submit(engine, "sound")
    drive.finish("huge", "sound")
    engine.close()
    assert drive.last["huge"].error_kind == "weights"
    assert "not finite with huge" in (drive.last["huge"].error or "")
    sound.check(reference, drive, "sound")


def test_an_embedding_may_fill_the_context(reference: Reference) -> None:
    engine = make_engine(reference.path, kv_cache_bytes=3 * 2 * 2 * 12 * 4 * 32, max_model_len=32)
    drive = Driver(engine)
    prompt = list(range(1, 33))
    engine.submit(request("fits", prompt, pooling="mean"))
    engine.submit(request("too long", [*prompt, 1], pooling="mean"))
    drive.finish("fits", "too long")
    check_embedding(reference, None, prompt, drive.last["fits"], "mean")
    assert drive.last["too long"].error_kind == "request"


def test_a_step_holds_a_bounded_number_of_rows_logits(
    reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quickchange_server.engine.scheduling.scheduler._MOST_SCORED", 5)
    engine = make_engine(reference.path)
    drive = Driver(engine)
    asked = {str(i): Asked(None, prompt, "scores") for i, prompt in enumerate(prompts(3, 7))}
    for key, one in asked.items():
        one.submit(engine, key)
    counts: list[int] = []
    schedule = engine.scheduler.schedule

    def watched(now: float) -> list[Scheduled]:
        plan = schedule(now)
        counts.append(sum(len(item.scored) for item in plan))
        return plan

    monkeypatch.setattr(engine.scheduler, "schedule", watched)
    drive.finish(*asked)
    assert max(counts) == 5
    for key, one in asked.items():
        one.check(reference, drive, key)


def test_the_lm_head_sees_no_row_of_an_embedding(reference: Reference) -> None:
    model = load_model(
        str(reference.path), dtype=torch.float32, device=torch.device("cpu"), adapters=True
    )
    seen: list[int] = []
    model.head.register_forward_hook(lambda _, __, out: seen.append(out.shape[-2]))
    settings = Settings(model=str(reference.path), store=reference.path, kv_cache_bytes=1 << 20)
    engine = Engine(
        model,
        settings,
        load_adapter=lambda digest, _: reference.adapters[digest],
        on_wake=lambda: None,
    )
    drive = Driver(engine)
    del seen[:]
    engine.submit(request("mean", list(range(1, 30)), pooling="mean"))
    engine.submit(request("plain", [1, 2, 3], max_tokens=1))
    drive.finish("mean", "plain")
    assert seen == [1]
