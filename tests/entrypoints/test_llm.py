"""The public Python API: outputs are transformers' and PEFT's own, whatever shares the call."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from classifier_models import classifier
from llm_models import END, LlmModels, ids_of, make_llm_models, piece_tokenizer, text_of
from text_of_pieces import tokenizer_of_pieces
from turbo_models import VOCABULARY as TURBO_VOCABULARY
from turbo_models import make_turbo_models

from quickchange_server import LLM, SamplingParams
from quickchange_server.errors import (
    AdapterFailedError,
    ConflictError,
    ContextLengthError,
    ForbiddenError,
    InvalidRequestError,
    SettingError,
    UnknownModelError,
)
from quickchange_store.base_model.base_spec import base_spec
from quickchange_store.errors import StoreError
from quickchange_store.importing import read_adapter
from quickchange_store.store import Store

MIX = {"sql": 0.75, "orders": -0.5}
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
SMALL: dict[str, Any] = {"kv_cache_bytes": 1 << 20, "max_model_len": 96, "block_size": 4}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> LlmModels:
    made = make_llm_models(tmp_path_factory.mktemp("llm"))
    made.reference.add_weighted_adapter(
        list(MIX), list(MIX.values()), "mix", combination_type="cat"
    )
    return made


@pytest.fixture(scope="module")
def llm(models: LlmModels) -> Iterator[LLM]:
    with LLM(models.path, adapters=models.adapters, **SMALL) as llm:
        yield llm


# --- generation ---------------------------------------------------------------------------------


def test_texts_and_ids_with_an_adapter_each_are_pefts_own_tokens(
    llm: LLM, models: LlmModels
) -> None:
    prompts = ["List all users.", ids_of("Two pumps"), "x", ids_of("Hello there"), "a" * 40]
    names = ["sql", None, "mix", "orders", "mix"]
    adapters = [MIX if name == "mix" else name for name in names]
    found = llm.generate(prompts, GREEDY, adapter=adapters)
    for prompt, name, result in zip(prompts, names, found, strict=True):
        ids = ids_of(prompt) if isinstance(prompt, str) else prompt
        expected = models.greedy(name, ids, 12)
        assert result.prompt_token_ids == ids
        assert result.prompt == (prompt if isinstance(prompt, str) else None)
        (output,) = result.outputs
        assert output.token_ids == expected, (prompt, name)
        assert output.text == text_of(expected)
        assert output.finish_reason == "length"
        assert output.logprobs is None
    assert [result.request_id for result in found] == ["0", "1", "2", "3", "4"]


def test_a_weight_may_hold_for_a_span_or_change_along_the_text(llm: LLM) -> None:
    prompt = ids_of("List all users.")
    ways: list[Any] = [
        "sql",
        {"sql": (1.0, 0, None)},
        {"sql": [(1.0, 0, 5), (1.0, 5, None)]},
        None,
        {"sql": (1.0, len(prompt) + 40, None)},
        {"sql": (1.0, 4, None)},
    ]
    whole, span, cut, base, behind, later = (
        result.outputs[0].token_ids for result in llm.generate([prompt] * 6, GREEDY, adapter=ways)
    )
    assert whole == span == cut
    assert base == behind
    assert later not in (whole, base)


@pytest.mark.parametrize(
    "span", [(1.0, 0), (1.0, -1, None), (1.0, 3, 3), ("x", 0, None), [(1.0, 0, True)], [1.0]]
)
def test_a_span_that_is_none_is_refused(llm: LLM, span: Any) -> None:
    with pytest.raises(InvalidRequestError, match="sql"):
        llm.generate("Hello", GREEDY, adapter={"sql": span})


def test_an_adapter_that_classifies_generates_nothing_and_is_embedded(
    models: LlmModels, tmp_path: Path
) -> None:
    sql = read_adapter(models.adapters["sql"], base_spec(str(models.path))).adapter
    Store(tmp_path).add("kinds", classifier(sql, 3, hidden=48))
    with LLM(models.path, store=tmp_path, **SMALL) as llm:
        with pytest.raises(InvalidRequestError, match="classifies"):
            llm.generate("Hello", GREEDY, adapter="kinds")
        with pytest.raises(InvalidRequestError, match="classifies"):
            llm.generate(["Hello"] * 2, GREEDY, adapter=[None, {"kinds": 0.5}])
        (vector,) = llm.embed("Hello", adapter="kinds")
        assert len(vector.outputs.embedding) == 48


def test_one_prompt_and_one_adapter_for_all(llm: LLM, models: LlmModels) -> None:
    (text,) = llm.generate("Hello", GREEDY, adapter="sql")
    (ids,) = llm.generate(ids_of("Hello"), GREEDY, adapter="sql")
    pair = llm.generate(["Hello", "Bye"], GREEDY, adapter="sql")
    assert text.outputs == ids.outputs == pair[0].outputs
    assert pair[1].outputs[0].token_ids == models.greedy("sql", ids_of("Bye"), 12)
    assert llm.generate([], GREEDY) == []


def test_parameters_may_be_one_for_each_prompt(llm: LLM) -> None:
    each = [SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True) for n in (2, 5)]
    first, second = llm.generate(["Hello", "Hello"], each)
    assert len(first.outputs[0].token_ids) == 2
    assert second.outputs[0].token_ids[:2] == first.outputs[0].token_ids
    (default,) = llm.generate("Hello")
    assert len(default.outputs[0].token_ids) <= 16


def test_a_chat_is_the_templates_text(llm: LLM) -> None:
    chats = [
        [{"role": "user", "content": "Hi"}],
        [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
        ],
    ]
    texts = ["user: Hi\nassistant: ", "system: Be brief.\nuser: Hi\nassistant: "]
    found = llm.chat(chats, GREEDY, adapter=["sql", None])
    expected = llm.generate(texts, GREEDY, adapter=["sql", None])
    assert [one.prompt for one in found] == texts
    assert [one.outputs for one in found] == [one.outputs for one in expected]
    assert llm.chat(chats[0], GREEDY, adapter="sql")[0].outputs == found[0].outputs


def test_a_chat_renders_as_it_is_asked_to(llm: LLM) -> None:
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "We"}]
    one = SamplingParams(max_tokens=1)
    assert llm.chat(chat, one, continue_final_message=True)[0].prompt == "user: Hi\nassistant: We"
    (told,) = llm.chat(chat[:1], one, add_generation_prompt=False, chat_template_kwargs={"a": 1})
    assert told.prompt == "user: Hi\n"
    (told,) = llm.chat([{"role": "king", "content": "Hi"}], one, reasoning_effort="low")
    assert told.prompt == "king: Hi\nassistant: "


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages: is set by"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "Cannot set both"),
        ({"reasoning_effort": "huge"}, "reasoning_effort: "),
        ({"documents": [{"text": "x"}]}, "documents: this model's chat template reads none"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools: this model's"),
        ({"tools": [{"type": "function"}]}, r"tools\.0\.function: "),
    ],
)
def test_a_chats_arguments_are_refused_by_name(
    llm: LLM, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        llm.chat([{"role": "user", "content": "Hi"}], GREEDY, **given)


def test_a_stop_string_ends_its_own_prompt_alone(llm: LLM, models: LlmModels) -> None:
    expected = models.greedy(None, ids_of("Hello"), 12)
    whole = text_of(expected)
    stop = whole[5:7]
    before = whole[: whole.index(stop)]
    params = [
        SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, stop=[stop]),
        SamplingParams(
            temperature=0.0,
            max_tokens=12,
            ignore_eos=True,
            stop=stop,
            include_stop_str_in_output=True,
        ),
        GREEDY,
    ]
    stopped, included, free = (r.outputs[0] for r in llm.generate(["Hello"] * 3, params))
    assert (stopped.text, stopped.finish_reason, stopped.stop_reason) == (before, "stop", stop)
    assert stopped.token_ids == expected[: len(stopped.token_ids)]
    assert text_of(stopped.token_ids).endswith(stop)
    assert included.text == before + stop
    assert (free.text, free.stop_reason) == (whole, None)


def test_stop_tokens_are_told_and_left_out_of_the_text(llm: LLM, models: LlmModels) -> None:
    expected = models.greedy("orders", ids_of("Hello"), 12)
    params = SamplingParams(
        temperature=0.0, max_tokens=12, ignore_eos=True, stop_token_ids=[expected[4]]
    )
    (output,) = llm.generate("Hello", params, adapter="orders")[0].outputs
    length = expected.index(expected[4]) + 1
    assert output.token_ids == expected[:length]
    assert output.text == text_of(expected[: length - 1])
    assert (output.finish_reason, output.stop_reason) == ("stop", expected[4])


def test_the_end_of_the_sequence_ends_it_unless_ignored(llm: LLM) -> None:
    bias = {END: 100.0}
    (ended,) = llm.generate("Hello", SamplingParams(temperature=0.0, logit_bias=bias))[0].outputs
    assert (ended.text, ended.token_ids, ended.stop_reason) == ("", [END], None)
    assert ended.finish_reason == "stop"


def test_no_max_tokens_fills_the_context(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True)
    (output,) = llm.generate("x" * 80, params)[0].outputs
    assert len(output.token_ids) == 96 - 80


def test_choices_differ_and_seeds_repeat_them(llm: LLM) -> None:
    params = SamplingParams(n=4, seed=7, max_tokens=8, ignore_eos=True, temperature=1.5)
    first, again = (llm.generate("Hello", params)[0].outputs for _ in range(2))
    assert [one.index for one in first] == [0, 1, 2, 3]
    assert first == again
    assert len({one.text for one in first}) == 4
    (alone,) = llm.generate("Hello", SamplingParams(**{**_given(params), "n": 1}))[0].outputs
    assert alone == first[0]


def _given(params: SamplingParams) -> dict[str, Any]:
    return {
        name: getattr(params, name) for name in ("seed", "max_tokens", "ignore_eos", "temperature")
    }


def test_drawn_seeds_repeat_with_the_setting(models: LlmModels) -> None:
    params = SamplingParams(max_tokens=10, ignore_eos=True, temperature=1.5)

    def sampled(**settings: Any) -> list[str]:
        with LLM(models.path, **SMALL, **settings) as llm:
            return [result.outputs[0].text for result in llm.generate(["Hello"] * 3, params)]

    first = sampled(seed=3)
    assert sampled(seed=3) == first
    assert len({*first, *sampled()}) == 6


def test_logprobs_are_transformers(llm: LLM, models: LlmModels) -> None:
    params = SamplingParams(
        n=2, temperature=0.0, max_tokens=5, ignore_eos=True, logprobs=3, prompt_logprobs=0
    )
    prompt = ids_of("Hello")
    (result,) = llm.generate("Hello", params, adapter="sql")
    output = result.outputs[0]
    models.reference.set_adapter("sql")
    with torch.inference_mode():
        tokens = torch.tensor([[*prompt, *output.token_ids]])
        table = torch.log_softmax(models.reference(input_ids=tokens).logits[0], dim=-1)
    assert output.logprobs is not None
    for place, (token, told) in enumerate(zip(output.token_ids, output.logprobs, strict=True)):
        row = table[len(prompt) + place - 1]
        best = row.topk(3).indices.tolist()
        assert list(told) == best
        assert best[0] == token
        for rank, token_id in enumerate(best, 1):
            assert told[token_id].logprob == pytest.approx(float(row[token_id]), abs=1e-4)
            assert told[token_id].rank == rank
            assert told[token_id].decoded_token == text_of([token_id]) or token_id == END
    total = sum(
        one[token].logprob for one, token in zip(output.logprobs, output.token_ids, strict=True)
    )
    assert output.cumulative_logprob == pytest.approx(total)
    assert result.prompt_logprobs is not None
    assert result.prompt_logprobs[0] is None
    for place, told in enumerate(result.prompt_logprobs[1:], 1):
        assert told is not None
        assert told[prompt[place]].logprob == pytest.approx(
            float(table[place - 1, prompt[place]]), abs=1e-4
        )


def test_the_whole_vocabularys_log_probabilities_are_told(llm: LLM) -> None:
    """Beside a request that wants few, in the same steps."""
    whole = SamplingParams(temperature=0.0, max_tokens=3, logprobs=-1, prompt_logprobs=-1)
    few = replace(whole, logprobs=2, prompt_logprobs=1)
    for params in ([whole, few], [few, whole, few]):
        for result, asked in zip(
            llm.generate(["Hello"] * len(params), params), params, strict=True
        ):
            told = result.outputs[0].logprobs
            of_prompt = result.prompt_logprobs
            assert told is not None
            assert of_prompt is not None
            assert len(told) == 3
            for place in (*told, *of_prompt[1:]):
                assert place is not None
                total = sum(math.exp(one.logprob) for one in place.values())
                assert (total == pytest.approx(1.0)) == (asked is whole)
                assert (len(place) <= 3) == (asked is few)
        small, large = llm.generate(["Hello"] * 2, [few, whole])
        alone = llm.generate("Hello", few)[0]
        assert small.outputs == alone.outputs
        assert small.prompt_logprobs == alone.prompt_logprobs
        assert large.outputs[0].token_ids == alone.outputs[0].token_ids


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_embeddings_are_transformers_hidden_states(
    llm: LLM, models: LlmModels, pooling: Any, normalize: bool
) -> None:
    prompts = ["Hello", ids_of("List all users."), "x"]
    names = ["sql", None, "mix"]
    found = llm.embed(prompts, adapter=["sql", None, MIX], pooling=pooling, normalize=normalize)
    for prompt, name, result in zip(prompts, names, found, strict=True):
        ids = ids_of(prompt) if isinstance(prompt, str) else prompt
        states = _states(models, name, ids)
        expected = states.mean(dim=0) if pooling == "mean" else states[-1]
        if normalize:
            expected = expected / expected.norm()
        assert result.prompt_token_ids == ids
        torch.testing.assert_close(
            torch.tensor(result.outputs.embedding), expected, rtol=1e-4, atol=1e-4
        )


@torch.inference_mode()
def _states(models: LlmModels, name: str | None, ids: list[int]) -> torch.Tensor:
    """[T, H] that enter the LM head."""

    def run() -> torch.Tensor:
        inner = models.reference.get_base_model().model
        states: torch.Tensor = inner(input_ids=torch.tensor([ids])).last_hidden_state[0]
        return states

    if name is None:
        with models.reference.disable_adapter():
            return run()
    models.reference.set_adapter(name)
    return run()


# --- stores and Turbo ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def turbo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model and a store with heads for it, an alias among its names."""
    folder = tmp_path_factory.mktemp("turbo")
    made = make_turbo_models(folder / "base")
    letters = [chr(97 + i) for i in range(26)]
    end = TURBO_VOCABULARY - 1
    tokenizer_of_pieces([*letters, " ", ".", "<end>"], end).save_pretrained(made.path)
    store = Store(folder / "store")
    for name, adapter in made.adapters.items():
        store.add(name, adapter)
    store.alias("fast", "lora-a", turbo="two")
    return made.path, Path(store.location)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_turbo_changes_no_token(turbo: tuple[Path, Path], temperature: float) -> None:
    model, store = turbo
    params = SamplingParams(temperature=temperature, max_tokens=40, seed=5, ignore_eos=True)
    prompts = ["abc", "hello there", "fast", "mixed", "base model", "abcabcabcabc"]
    adapters = ["five", "five@1", "fast", {"lora-a": 0.5, "lora-b": 0.5}, None, None]
    drafters = ["auto", "auto", "auto", "two", "five", "lookup"]
    with LLM(model, store=store, **SMALL) as llm:
        drafted = llm.generate(prompts, params, adapter=adapters, turbo=drafters)
        plain = llm.generate(prompts, params, adapter=adapters, turbo="off")
    for with_drafts, without in zip(drafted, plain, strict=True):
        assert with_drafts.outputs[0].token_ids == without.outputs[0].token_ids
        assert with_drafts.outputs[0].text == without.outputs[0].text
        assert without.outputs[0].drafted_tokens == 0
    assert sum(result.outputs[0].accepted_tokens for result in drafted) > 0


def test_a_stop_string_among_accepted_drafts_cuts_the_tokens(turbo: tuple[Path, Path]) -> None:
    model, store = turbo
    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    with LLM(model, store=store, **SMALL) as llm:
        whole = llm.generate("abc", params, adapter="five", turbo="off")[0].outputs[0].text
        for length in range(1, 30):
            stop = whole[: length + 1]
            stopping = SamplingParams(
                temperature=0.0, max_tokens=40, ignore_eos=True, stop=stop, logprobs=0
            )
            (output,) = llm.generate("abc", stopping, adapter="five")[0].outputs
            assert (output.text, output.finish_reason) == ("", "stop")
            assert len(output.token_ids) == len(stop)
            assert output.logprobs is not None
            assert len(output.logprobs) == len(stop)


def test_folders_are_imported_into_a_store_that_is_given(models: LlmModels, tmp_path: Path) -> None:
    store = tmp_path / "store"
    for _ in range(2):  # the second time they are there already
        with LLM(models.path, adapters=models.adapters, store=store, **SMALL) as llm:
            (output,) = llm.generate("Hello", GREEDY, adapter="sql@1")[0].outputs
    assert output.token_ids == models.greedy("sql", ids_of("Hello"), 12)
    assert Store(store).names() == ("orders", "sql")
    assert len(Store(store).versions("sql")) == 1
    with pytest.raises(ConflictError, match="another 'sql'"):
        LLM(models.path, adapters={"sql": models.adapters["orders"]}, store=store, **SMALL)


def test_the_temporary_store_goes_with_the_engine(
    models: LlmModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    llm = LLM(models.path, adapters=models.adapters, **SMALL)
    assert list(tmp_path.iterdir())
    llm.close()
    llm.close()
    assert not list(tmp_path.iterdir())
    with pytest.raises(RuntimeError, match="closed"):
        llm.generate("Hello")
    with pytest.raises(StoreError, match="no such folder"):
        LLM(models.path, adapters={"sql": tmp_path / "none"}, **SMALL)
    assert not list(tmp_path.iterdir())


# --- what is refused, before anything runs ------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "given", "error", "message"),
    [
        (["a", "b"], {"adapter": ["sql"]}, InvalidRequestError, "adapter: 1 for 2 prompts"),
        (["a"], {"turbo": ["off", "off"]}, InvalidRequestError, "turbo: 2 for 1 prompts"),
        (["a"], {"params": [GREEDY] * 2}, InvalidRequestError, "params: 2 for 1 prompts"),
        (["a"], {"adapter": 3}, InvalidRequestError, "adapter: 3 is no str or Mapping or None"),
        (["a"], {"params": "greedy"}, InvalidRequestError, "params: 'greedy' is no Sampling"),
        (["a", "b"], {"adapter": [None, "sq"]}, UnknownModelError, r"adapter\[1\]: sq: no adapter"),
        (["a"], {"adapter": {"sq": 1.0}}, UnknownModelError, r"adapter\[0\]: sq: no adapter"),
        (["a"], {"adapter": "sql@9"}, UnknownModelError, "its versions are 1"),
        (["a"], {"adapter": {"sql": "1"}}, InvalidRequestError, "weight of 'sql' is '1'"),
        (["a"], {"adapter": {"sql": float("nan")}}, InvalidRequestError, "weight of 'sql' is nan"),
        (["a"], {"turbo": "sq"}, UnknownModelError, r"turbo\[0\]: sq: no adapter"),
        (["a"], {"turbo": "sql"}, InvalidRequestError, "'sql' has no Turbo heads"),
        (["a", "b" * 96], {}, ContextLengthError, r"shorten prompts\[1\]"),
        (["a", "b" * 85], {}, ContextLengthError, r"85 in prompts\[1\], 12 to generate"),
        (["a", ""], {}, InvalidRequestError, r"prompts\[1\]: has no tokens"),
        (["a", []], {}, InvalidRequestError, r"prompts\[1\]: has no tokens"),
        (["a", [5, 97]], {}, InvalidRequestError, r"prompts\[1\]: token id 97"),
        (["a", 5], {}, InvalidRequestError, r"prompts\[1\]: int is no prompt"),
        (["a", [True]], {}, InvalidRequestError, r"prompts\[1\]: list is no prompt"),
        (["a", "\ud800"], {}, InvalidRequestError, r"prompts\[1\]: holds half"),
        (
            ["a"],
            {"params": SamplingParams(stop_token_ids=[97])},
            InvalidRequestError,
            "stop_token_ids: token id 97",
        ),
        (
            ["a"],
            {"params": SamplingParams(logit_bias={97: 1.0})},
            InvalidRequestError,
            "logit_bias: token id 97",
        ),
        (
            ["a"],
            {"params": SamplingParams(max_tokens=None, min_tokens=96)},
            InvalidRequestError,
            "min_tokens: 96 exceeds the 95",
        ),
    ],
)
def test_what_is_wrong_is_named_and_nothing_runs(
    llm: LLM,
    monkeypatch: pytest.MonkeyPatch,
    prompts: Any,
    given: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("something ran")

    with monkeypatch.context() as patched:
        patched.setattr(
            "quickchange_server.entrypoints.in_process_engine.InProcessEngine.run", fail
        )
        with pytest.raises(error, match=message):
            llm.generate(prompts, **{"params": GREEDY, **given})
    assert llm.generate("a", GREEDY)[0].outputs[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "user"}], r"messages\[0\]\[0\]"),
        ([[{"role": "user", "content": "a"}], []], r"messages\[1\]: is empty"),
        ([[{"role": "", "content": "a"}]], r"messages\[0\]\[0\].role"),
        ([["hello"]], r"messages\[0\]\[0\]"),
    ],
)
def test_bad_messages_are_named(llm: LLM, messages: Any, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        llm.chat(messages, GREEDY)


def test_embeddings_are_refused_as_prompts_are(llm: LLM) -> None:
    with pytest.raises(ContextLengthError, match=r"prompts\[0\] has 97"):
        llm.embed("a" * 97)
    assert len(llm.embed("a" * 96)[0].outputs.embedding) == 48
    with pytest.raises(InvalidRequestError, match="pooling: 'max'"):
        llm.embed("a", pooling="max")  # type: ignore[arg-type]
    with pytest.raises(UnknownModelError, match="no adapter"):
        llm.embed("a", adapter="nobody")


def test_a_model_without_a_template_has_no_chat(models: LlmModels, tmp_path: Path) -> None:
    for file in models.path.iterdir():
        if "template" not in file.name and "token" not in file.name:
            (tmp_path / file.name).symlink_to(file)
    piece_tokenizer(template=None).save_pretrained(tmp_path)
    with (
        LLM(tmp_path, **SMALL) as plain,
        pytest.raises(InvalidRequestError, match="no chat template"),
    ):
        plain.chat([{"role": "user", "content": "Hi"}])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_modl_len": 5}, "max_modl_len: .*docs/settings.md"),
        ({"device": "tpu"}, "device: "),
        ({"block_size": 0}, "block_size: "),
    ],
)
def test_a_bad_setting_is_named(models: LlmModels, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        LLM(models.path, **settings)


def test_the_bases_own_name_is_taken(models: LlmModels) -> None:
    with pytest.raises(ConflictError, match="'base' is the base model"):
        LLM(models.path, adapters={"base": models.adapters["sql"]}, **SMALL)


def test_switched_off_turbo_is_refused(models: LlmModels) -> None:
    with (
        LLM(models.path, turbo=False, **SMALL) as llm,
        pytest.raises(ForbiddenError, match=r"adapter\[0\]: turbo: switched off"),
    ):
        llm.generate("a", turbo="lookup")


def test_without_adapters_a_name_says_how_to_give_one(models: LlmModels) -> None:
    with (
        LLM(models.path, **SMALL) as llm,
        pytest.raises(UnknownModelError, match=r"adapters={'sql': folder}"),
    ):
        llm.generate("a", adapter="sql")


def test_an_adapter_whose_file_is_gone_fails_and_the_engine_goes_on(
    models: LlmModels, tmp_path: Path
) -> None:
    store = Store(tmp_path)
    with LLM(models.path, adapters=models.adapters, store=tmp_path, **SMALL) as llm:
        store.path(store.resolve("sql").digest).unlink()
        with pytest.raises(AdapterFailedError, match="request 1-0"):
            llm.generate(["a", "b"], GREEDY, adapter=["orders", "sql"])
        (output,) = llm.generate("Hello", GREEDY, adapter="orders")[0].outputs
    assert output.token_ids == models.greedy("orders", ids_of("Hello"), 12)


# --- around it ----------------------------------------------------------------------------------


def test_a_bar_is_shown_on_long_lists_or_as_asked(
    llm: LLM, capsys: pytest.CaptureFixture[str]
) -> None:
    short = SamplingParams(max_tokens=1)
    llm.generate(["a"] * 3, short)
    assert capsys.readouterr().err == ""
    llm.generate(["a"] * 3, short, use_tqdm=True)
    assert "3/3" in capsys.readouterr().err
    llm.generate(["a"] * 20, short)
    assert "20/20" in capsys.readouterr().err
    llm.generate(["a"] * 20, short, use_tqdm=False)
    assert capsys.readouterr().err == ""


def test_the_package_brings_in_nothing_by_itself() -> None:
    told = (
        "import sys, quickchange_server.config, quickchange_server as q\n"
        "assert 'torch' not in sys.modules and q.__all__ == ['LLM', 'SamplingParams']\n"
        "from quickchange_server import SamplingParams\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", told], check=True)
    with pytest.raises(ImportError, match="nothing"):
        from quickchange_server import nothing  # noqa: F401


# --- tokens that may be chosen ------------------------------------------------------------------


@torch.inference_mode()
def kept_greedy(
    models: LlmModels, prompt: list[int], count: int, bad: list[list[int]], allowed: set[int] | None
) -> list[int]:
    """Greedy tokens by transformers alone, of those that are allowed and complete no bad run."""
    output: list[int] = []
    with models.reference.disable_adapter():
        for _ in range(count):
            ids = torch.tensor([[*prompt, *output]])
            logits = models.reference(input_ids=ids, use_cache=False).logits[0, -1]
            for token in range(len(logits)):
                after = [*output, token]
                complete = any(
                    after[len(after) - len(run) :] == run for run in bad if len(run) <= len(after)
                )
                if complete or (allowed is not None and token not in allowed):
                    logits[token] = float("-inf")
            output.append(int(logits.argmax()))
    return output


def test_only_allowed_tokens_are_chosen(llm: LLM, models: LlmModels) -> None:
    allowed = set(ids_of("abc xyz"))
    params = SamplingParams(
        temperature=0.0, max_tokens=12, ignore_eos=True, allowed_token_ids=allowed
    )
    free, kept = llm.generate(["Hello", "Hello"], [GREEDY, params])
    assert kept.outputs[0].token_ids == kept_greedy(models, ids_of("Hello"), 12, [], allowed)
    assert free.outputs[0].token_ids == kept_greedy(models, ids_of("Hello"), 12, [], None)


def test_bad_words_are_kept_out(llm: LLM, models: LlmModels) -> None:
    plain = llm.generate("Hello", GREEDY)[0].outputs[0].text
    words = [plain[2:4], plain[5]]
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, bad_words=words)
    found = llm.generate("Hello", params)[0].outputs[0]
    runs = [ids_of(before + word) for word in words for before in ("", " ")]
    bare = [ids_of(word.lstrip()) for word in words if word.strip()]
    assert found.token_ids == kept_greedy(models, ids_of("Hello"), 12, bare, None), runs
    assert not any(word.lstrip() in found.text for word in words if word.strip())


def test_listed_tokens_have_their_logprobs_and_no_rank(llm: LLM) -> None:
    listed = ids_of("qz")
    params = SamplingParams(
        temperature=0.0, max_tokens=3, ignore_eos=True, logprobs=0, logprob_token_ids=listed
    )
    found = llm.generate("Hello", params)[0].outputs[0]
    assert found.logprobs is not None
    for token, position in zip(found.token_ids, found.logprobs, strict=True):
        assert set(position) == {token, *listed}
        assert all(one.rank is None for one in position.values())
