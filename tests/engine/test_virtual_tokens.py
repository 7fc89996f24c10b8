"""Virtual tokens in the engine: found again, preempted, resumed, read behind, counted and refused.

That their answers are PEFT's is in tests/reference; here they hold against the same prompt's answer
by an engine that nothing disturbs.
"""

from __future__ import annotations

import random
from dataclasses import replace

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from bought_drafts import every_draft_bought
from engine_driver import Driver, engine_of, make_settings, request
from hypothesis import given, settings
from prompt_adapters import LORA, Prompts, learn
from repeating_capture import RepeatingCapture
from tiny_models import VOCABULARY, make_model
from turbo_adapters import make_turbo, turbo_adapter

from quickchange_server.adapters.manager import Residency
from quickchange_server.engine import model_runner
from quickchange_server.engine.engine import Engine
from quickchange_server.model.loading.model_loader import LoadedModel, load_model
from quickchange_server.protocol import Drafting
from quickchange_store.canonical.canonical_adapter import CanonicalAdapter
from quickchange_store.canonical.prompt_part import VirtualPrompt

KINDS = ("prompt tuning", "prefix tuning")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Prompts:
    return learn("llama", tmp_path_factory.mktemp("prompts"), KINDS)


@pytest.fixture(scope="module")
def loaded(made: Prompts) -> LoadedModel:
    return load_model(
        str(made.path), dtype=torch.float32, device=torch.device("cpu"), adapters=True
    )


def engine(made: Prompts, loaded: LoadedModel, **options: object) -> Engine:
    depth = options.pop("depth", None)
    return engine_of(
        loaded,
        make_settings(made.path, options),
        made.adapters.__getitem__,
        depth=depth,  # type: ignore[arg-type]
    )


def text(length: int, seed: int = 0) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(VOCABULARY) for _ in range(length)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("depth", [1, 2])
def test_the_answer_is_peft_s_however_the_prompt_is_cut(
    made: Prompts, loaded: LoadedModel, kind: str, depth: int
) -> None:
    for block_size, batch in ((1, 16), (4, 16), (8, 40), (16, 17)):
        running = engine(made, loaded, block_size=block_size, max_batch_tokens=batch, depth=depth)
        drive = Driver(running)
        for name in (kind, f"{kind} again"):
            running.submit(made.submit(name, [kind], made.texts[kind]))
            drive.finish(name)
            assert drive.tokens[name] == made.alone[kind], (block_size, batch)
        found = drive.first[f"{kind} again"].cached_tokens
        whole = (made.virtual_tokens(kind) + len(made.texts[kind]) - 1) // block_size * block_size
        assert found == max(whole - made.virtual_tokens(kind), 0)
        running.close()


def test_graphs_serve_the_steps_behind_them(
    made: Prompts, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    repeating = RepeatingCapture()
    monkeypatch.setattr(model_runner, "capture_for", lambda _device: repeating)
    running = engine(made, loaded, max_batch_tokens=24)
    drive = Driver(running)
    submits = made.submits()
    for submit in submits:
        running.submit(submit)
    drive.finish(*(submit.request_id for submit in submits))
    running.close()
    assert {name: drive.tokens[name] for name in made.answers} == made.answers


@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_answers_stand_whatever_is_preempted_and_in_flight(
    made: Prompts, loaded: LoadedModel, data: st.DataObject
) -> None:
    block_size = data.draw(st.sampled_from([1, 2, 4, 16]), "block size")
    submits = made.submits()
    longest = max(len(s.prompt) + s.virtual_tokens for s in submits) + 8
    blocks = data.draw(st.integers(1, 40)) + -(-longest // block_size)
    context = blocks * block_size
    block_bytes = 2 * 3 * 2 * 12 * 4 * block_size  # keys and values, layers, heads, width, float32
    running = engine(
        made,
        loaded,
        block_size=block_size,
        kv_cache_bytes=blocks * block_bytes,
        max_model_len=min(context, 400),
        max_batch_tokens=data.draw(st.integers(16, 48)),
        depth=data.draw(st.sampled_from([1, 2])),
    )
    drive = Driver(running)
    order = data.draw(st.permutations(submits))
    for submit in order:
        running.submit(submit)
        for _ in range(data.draw(st.integers(0, 3))):
            drive.step()
    drive.finish(*(submit.request_id for submit in submits))
    running.close()
    for name, answer in made.answers.items():
        assert drive.tokens[name] == answer, name


@pytest.mark.parametrize("kind", KINDS)
def test_a_request_that_comes_again_after_a_crash_goes_on_where_it_was(
    made: Prompts, loaded: LoadedModel, kind: str
) -> None:
    answer = made.alone[kind]
    for known in (1, 3, len(answer) - 1):
        running = engine(made, loaded)
        drive = Driver(running)
        again = made.submit("again", [kind], made.texts[kind])
        running.submit(replace(again, output=tuple(answer[:known])))
        drive.finish("again")
        assert drive.tokens["again"] == answer[known:]
        running.close()


@pytest.mark.parametrize("kind", KINDS)
def test_drafts_change_no_answer(made: Prompts, loaded: LoadedModel, kind: str) -> None:
    running = engine(made, loaded)
    drive = Driver(running)
    repeating = text(5, seed=3) * 4
    wanted = made.submit("plain", [kind], repeating, max_tokens=12)
    running.submit(wanted)
    running.submit(replace(wanted, request_id="drafted", drafting=Drafting(lookup=True)))
    drive.finish("plain", "drafted")
    assert drive.tokens["drafted"] == drive.tokens["plain"]
    running.close()


@pytest.mark.parametrize("kind", KINDS)
def test_heads_draft_behind_virtual_tokens_and_change_no_answer(
    made: Prompts, loaded: LoadedModel, kind: str
) -> None:
    heads = turbo_adapter(make_turbo(48, 3, sequential=True))
    adapters = {**made.adapters, "heads": heads}
    running = engine_of(loaded, make_settings(made.path, {}), adapters.__getitem__)
    drive = Driver(running)
    sent = made.texts[kind]
    drafting = Drafting(heads="heads")
    for name, used in (("prompt", [kind]), ("with lora", [kind, LORA]), ("plain", [])):
        submit = made.submit(name, used, sent, max_tokens=12)
        running.submit(submit)
        drafted = replace(submit, request_id=f"{name}, drafted", drafting=drafting)
        running.submit(drafted)
    names = ("prompt", "with lora", "plain")
    with every_draft_bought():
        drive.finish(*names, *(f"{name}, drafted" for name in names))
    for name in names:
        assert drive.tokens[f"{name}, drafted"] == drive.tokens[name]
        assert drive.drafted[f"{name}, drafted"] > 0
    running.close()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_of_a_prompt_is_of_the_text_alone(
    made: Prompts, loaded: LoadedModel, kind: str
) -> None:
    from peft import PeftModel

    folder = made.path.parent / kind
    model = PeftModel.from_pretrained(make_model("llama"), folder).eval()
    sent = made.texts[kind] + text(9, seed=7)
    seen: list[torch.Tensor] = []
    model.get_base_model().lm_head.register_forward_pre_hook(
        lambda _, args: seen.append(args[0][0])
    )
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([sent])).logits[0, -len(sent) :]
    scores = torch.log_softmax(logits, -1)
    states = seen[0][-len(sent) :]
    running = engine(made, loaded, max_batch_tokens=16)
    drive = Driver(running)
    wanted = made.submit("scores", [kind], sent, max_tokens=1, prompt_logprobs=1)
    running.submit(wanted)
    for pooling in ("mean", "last"):
        running.submit(made.submit(pooling, [kind], sent, max_tokens=0, pooling=pooling))
    drive.finish("scores", "mean", "last")
    told = [one.logprob for one in drive.first["scores"].prompt_logprobs]
    expected = [float(scores[at, token]) for at, token in enumerate(sent[1:])]
    np.testing.assert_allclose(told, expected, rtol=2e-4, atol=2e-4)
    for pooling, state in (("mean", states.double().mean(0)), ("last", states[-1])):
        found = np.frombuffer(drive.first[pooling].embedding or b"", "<f4")
        np.testing.assert_allclose(found, state.numpy(), rtol=2e-3, atol=2e-3)
    running.close()


@pytest.mark.parametrize("kind", KINDS)
def test_virtual_tokens_take_their_part_of_the_context(
    made: Prompts, loaded: LoadedModel, kind: str
) -> None:
    virtual = made.virtual_tokens(kind)
    running = engine(made, loaded, max_model_len=32)
    drive = Driver(running)
    fits = made.submit("fits", [kind], text(32 - virtual - 1), max_tokens=50)
    too_long = made.submit("too long", [kind], text(32 - virtual), max_tokens=50)
    plain = request("plain", text(31), max_tokens=50)
    for submit in (fits, too_long, plain):
        running.submit(submit)
    drive.finish("fits", "too long", "plain")
    assert len(drive.tokens["fits"]) == len(drive.tokens["plain"]) == 1
    assert drive.last["fits"].finish_reason == drive.last["plain"].finish_reason == "length"
    assert drive.last["too long"].error_kind == "request"
    assert f"behind {virtual} virtual tokens" in str(drive.last["too long"].error)
    running.close()


def test_two_prompts_and_weights_but_1_are_refused_and_harm_nobody(
    made: Prompts, loaded: LoadedModel
) -> None:
    one, other = KINDS
    running = engine(made, loaded)
    drive = Driver(running)
    sent = made.texts[one]
    refused = {
        "two": made.submit("two", KINDS, sent),
        "half": request("half", sent, [(one, 0.5, 0, None, made.virtual_tokens(one))]),
        "span": request("span", sent, [(one, 1.0, 2, None, made.virtual_tokens(one))]),
        "unknown": request("unknown", sent, [(one, 1.0)]),
        "others": request("others", sent, [(other, 1.0, 0, None, made.virtual_tokens(one))]),
    }
    running.submit(made.submit("good", [one], sent))
    for submit in refused.values():
        running.submit(submit)
    drive.finish("good", *refused)
    assert drive.tokens["good"] == made.alone[one]
    words = {
        "two": "one front",
        "half": "0.5",
        "span": "all of the text",
        "unknown": "made for 0",
        "others": "made for 7",
    }
    for name, word in words.items():
        assert drive.last[name].error_kind == "request"
        assert word in str(drive.last[name].error)
    running.close()


def broken(prompt: VirtualPrompt) -> CanonicalAdapter:
    return CanonicalAdapter("LlamaForCausalLM", "", {}, prompt=prompt)


BROKEN = {
    "width": (VirtualPrompt("embeddings", torch.zeros(3, 47)), "each of its virtual tokens has 47"),
    "heads": (VirtualPrompt("cache", torch.zeros(3, 2, 4, 5, 12)), "3 layers of 4 heads"),
    "room": (VirtualPrompt("embeddings", torch.zeros(99, 48)), "no room for a text"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_prompt_that_does_not_fit_fails_as_it_is_loaded(
    made: Prompts, loaded: LoadedModel, case: str
) -> None:
    prompt, words = BROKEN[case]
    running = engine_of(
        loaded,
        make_settings(made.path, {"max_model_len": 100}),
        {**made.adapters, "broken": broken(prompt)}.__getitem__,
    )
    drive = Driver(running)
    running.submit(request("broken", [1, 2], [("broken", 1.0, 0, None, prompt.tokens)]))
    running.submit(made.submit("good", [KINDS[0]], made.texts[KINDS[0]]))
    drive.finish("broken", "good")
    assert drive.last["broken"].error_kind in ("adapter", "request")
    if case != "room":  # there the request itself says so first
        assert words in str(drive.last["broken"].error)
    assert drive.tokens["good"] == made.alone[KINDS[0]]
    running.close()


def test_a_prompt_counts_as_host_memory_until_its_adapter_leaves(
    made: Prompts, loaded: LoadedModel
) -> None:
    room = engine(made, loaded)
    drive = Driver(room)
    name = KINDS[1]
    room.submit(made.submit("first", [name], made.texts[name]))
    drive.finish("first")
    prompt = made.adapters[name].prompt
    assert prompt is not None
    tiers = room._adapters
    assert isinstance(tiers, Residency)
    assert tiers.host_images == {name: prompt.values.numel() * 4}
    room.forget(name)
    drive.step()
    assert tiers.host_images == {}
    room.submit(made.submit("second", [name], made.texts[name]))
    drive.finish("second")
    assert drive.tokens["second"] == made.alone[name]
    room.close()


def test_prompts_that_nobody_uses_leave_a_host_without_room(
    made: Prompts, loaded: LoadedModel
) -> None:
    running = engine(made, loaded, adapter_host_bytes=1024)
    drive = Driver(running)
    tiers = running._adapters
    assert isinstance(tiers, Residency)
    for turn in range(2):
        for name in KINDS:
            running.submit(made.submit(f"{name} {turn}", [name], made.texts[name]))
            drive.finish(f"{name} {turn}")
            assert drive.tokens[f"{name} {turn}"] == made.alone[name]
            drive.step()
            assert tiers.host_images == {}
    running.close()
