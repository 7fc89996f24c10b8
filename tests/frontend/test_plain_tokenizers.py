"""Tokenizers as plain data against transformers' own: the same ids, texts and prompts."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError
from text_support import byte_tokenizer, metaspace_tokenizer, sentencepiece_tokenizer
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from tool_models import TEMPLATES, history, model_text, tools_for_template
from transformers import (
    ByT5Tokenizer,
    CodeGenTokenizer,
    LlamaTokenizer,
    PreTrainedTokenizerFast,
)

from quickchange_server.frontend.encoding.foreign_tokenizer import (
    ForeignTokenizer,
    model_tokenizer,
)
from quickchange_server.frontend.encoding.model_tokenizer import ModelTokenizer
from quickchange_server.frontend.encoding.plain_tokenizer import PlainTokenizer
from quickchange_store.base_model.tokenizer_data import tokenizer_data
from quickchange_store.canonical import tokenizer_part
from quickchange_store.canonical.tokenizer_part import TokenizerChanges

WORDS = ["a", "b", "ab", " ", "  ", "the", "é", "日", "🙂", "\n", "A", "B", ".", "'s", "0", "12"]
MARKS = ["<|im_start|>", "<|im_end|>", "<s>", "</s>", "[CLS]", "[SEP]", "<tool>", "<br>", "[MASK]"]
_CLASSIFYING = {"single": "[CLS] $A [SEP]", "pair": "[CLS] $A [SEP] $B:1 [SEP]:1"}


def word_pieces() -> PreTrainedTokenizerFast:
    """BERT's: lower case, [CLS] and [SEP] around a text, padded and cut where its file says so."""
    pieces = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "a",
        "b",
        "##b",
        "the",
        "e",
        "##s",
        "12",
    ]
    backend = Tokenizer(models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.post_processor = processors.TemplateProcessing(
        **_CLASSIFYING, special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    named = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, mask_token="[MASK]", **named)


def unigrams() -> PreTrainedTokenizerFast:
    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("▁", -2.0), ("▁the", -3.0), ("a", -2.5), ("b", -2.6)]
    backend = Tokenizer(models.Unigram([*pieces, ("ab", -4.0), ("é", -5.0)], 0, False))
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


def with_added(**options: Any) -> PreTrainedTokenizerFast:
    """Byte-level with added tokens of every kind."""
    tokenizer = byte_tokenizer([("a", "b"), ("Ġ", "Ġ")])
    strips = AddedToken("<tool>", lstrip=True, rstrip=True, special=True)
    inside = AddedToken("<br>", single_word=True, normalized=True, special=False)
    tokenizer.add_tokens([strips, inside, AddedToken("the", normalized=False)])
    for name, value in options.items():
        setattr(tokenizer, name, value)
    return tokenizer


def llama() -> LlamaTokenizer:
    """A class that builds its backend from a vocabulary."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{b:02X}>" for b in range(256)),
        "▁",
        "a",
        "b",
        "ab",
        "▁a",
    ]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    return LlamaTokenizer(vocab=vocabulary, merges=[("a", "b"), ("▁", "a")])


TOKENIZERS = {
    "byte_level": byte_tokenizer([("a", "b"), ("Ã", "©")]),
    "sentencepiece": sentencepiece_tokenizer(strip=False),
    "sentencepiece_strip": sentencepiece_tokenizer(strip=True),
    "window": metaspace_tokenizer(),
    "word_pieces": word_pieces(),
    "unigrams": unigrams(),
    "added": with_added(),
    "splits_special": with_added(split_special_tokens=True),
    "llama": llama(),
}


@cache
def plain(name: str) -> PlainTokenizer:
    """The tokenizer that the API process gets."""
    data = tokenizer_data(TOKENIZERS[name])
    assert data is not None
    return PlainTokenizer.of(pickle.loads(pickle.dumps(data)))


TEXTS = st.one_of(st.text(max_size=40), st.lists(st.sampled_from(WORDS + MARKS)).map("".join))
NAMES = st.sampled_from(sorted(TOKENIZERS))


@settings(max_examples=400)
@given(NAMES, TEXTS, st.none() | TEXTS, st.booleans())
def test_texts_and_pairs_have_the_ids_that_transformers_gives(
    name: str, text: str, second: str | None, special: bool
) -> None:
    expected = TOKENIZERS[name](text, second, add_special_tokens=special)["input_ids"]
    assert plain(name).encode(text, second, special=special) == expected


@given(NAMES, TEXTS, st.booleans())
def test_spans_are_those_of_transformers(name: str, text: str, special: bool) -> None:
    own = TOKENIZERS[name](text, add_special_tokens=special, return_offsets_mapping=True)
    pairs = zip(own["input_ids"], own["offset_mapping"], strict=True)
    assert plain(name).spans(text, special=special) == [(i, a, b) for i, (a, b) in pairs]


@settings(max_examples=200)
@given(NAMES, st.lists(st.integers(0, 280), max_size=30))
def test_tokens_decode_as_transformers_decodes_them(name: str, ids: list[int]) -> None:
    own = TOKENIZERS[name].decode(
        ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    assert plain(name).decode(ids) == own


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_vocabulary_and_the_configuration_are_transformers(name: str) -> None:
    own, made = TOKENIZERS[name], plain(name)
    assert len(made) == len(own)
    assert set(made.entries()) == own.get_vocab().keys()
    assert set(made.added()) == own.get_added_vocab().keys()
    assert made.marks == own.special_tokens_map
    assert [made.name(i) for i in range(len(own) + 2)] == [
        str(own.convert_ids_to_tokens(i)) for i in range(len(own) + 2)
    ]
    told = made.configuration()
    assert told["tokenizer_class"] == type(own).__name__
    assert told["eos_token"] == own.eos_token
    assert told["bos_token"] == own.special_tokens_map.get("bos_token")
    named = {told[mark] for mark in ("bos_token", "eos_token", "unk_token", "pad_token")}
    assert told["additional_special_tokens"] == [
        token for token in own.all_special_tokens if token not in named
    ]
    added = own.added_tokens_decoder.items()
    assert told["added_tokens_decoder"] == {str(i): str(token) for i, token in added}
    assert told == ForeignTokenizer(own).configuration()


@given(st.sampled_from(["byte_level", "added", "llama"]), TEXTS)
def test_an_adapters_changes_make_the_tokenizer_that_transformers_would_have(
    name: str, text: str
) -> None:
    own, made = changed(name)
    assert made.encode(text, special=True) == own.encode(text, special=True)
    ids = own.encode(text, special=False)
    assert made.decode(ids) == own.decode(ids)
    assert made.special_ids == own.special_ids
    assert made.configuration() == own.configuration()
    chat = [{"role": "user", "content": text}]
    assert made.render(chat, None, False) == own.render(chat, None, False)


@cache
def changed(name: str) -> tuple[ModelTokenizer, ModelTokenizer]:
    rows = len(TOKENIZERS[name]) + 1
    call = tokenizer_part.AddedToken(rows - 1, "<call>", special=True, lstrip=True)
    template = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"
    changes = TokenizerChanges(rows, (call,), {"bos_token": "<call>"}, (rows - 1,), template)
    return ForeignTokenizer(TOKENIZERS[name]).changed(changes), plain(name).changed(changes)


def python_pieces() -> PreTrainedTokenizerFast:
    class Halves:
        def pre_tokenize(self, text: Any) -> None:
            text.split(lambda _, piece: [piece[:1], piece[1:]])

    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.PreTokenizer.custom(Halves())
    return tokenizer


def with_own_decoding() -> CodeGenTokenizer:
    return CodeGenTokenizer(vocab={"a": 0, "b": 1, "<|endoftext|>": 2}, merges=[])


@pytest.mark.parametrize("make", [ByT5Tokenizer, with_own_decoding, python_pieces])
def test_what_is_no_plain_data_stays_transformers(make: Any) -> None:
    tokenizer = make()
    assert tokenizer_data(tokenizer) is None
    served = model_tokenizer(tokenizer)
    assert isinstance(served, ForeignTokenizer)
    assert served.encode("ab", special=True) == tokenizer("ab")["input_ids"]
    assert served.decode([0, 1]) == tokenizer.decode([0, 1])


# --- chats --------------------------------------------------------------------------------------

_OWN = Path(__file__).parents[1] / "support" / "chat_templates"
_FILES = {path.stem: path for folder in (TEMPLATES, _OWN) for path in folder.glob("*.jinja")}
_CONTENT = st.text(max_size=12) | st.sampled_from([" a ", "<b>&'\"", "x\n\ny", "</think>z", ""])
_PARTS = st.lists(_CONTENT.map(lambda text: {"type": "text", "text": text}), min_size=1, max_size=2)
_ROLES = st.sampled_from(["system", "user", "assistant", "tool", "developer"])
_MESSAGE = st.fixed_dictionaries(
    {"role": _ROLES, "content": _CONTENT | _PARTS | st.none()},
    optional={
        "reasoning_content": _CONTENT,
        "thinking": st.none() | _CONTENT,
        "reasoning": _CONTENT,
        "tool_calls": st.just(history([("weather", {"city": "Ås", "days": 2})])[1]["tool_calls"]),
        "name": st.just("weather"),
    },
)
_VARIABLES = st.fixed_dictionaries(
    {},
    optional={
        "enable_thinking": st.booleans(),
        "reasoning_effort": st.sampled_from(["low", "high"]),
        "documents": st.just([{"title": "t", "text": "x"}]),
        "continue_final_message": st.sampled_from(
            [True, "content", "thinking", "reasoning_content"]
        ),
        "eos_token": st.just("<other>"),
        "date_string": st.just("today"),
    },
)


@cache
def templated(name: str) -> tuple[ModelTokenizer, ModelTokenizer]:
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = "<s>"
    tokenizer.chat_template = _FILES[name].read_text()
    return ForeignTokenizer(tokenizer), model_tokenizer(tokenizer)


def rendered(tokenizer: ModelTokenizer, *arguments: Any, **rest: Any) -> str | type[Exception]:
    """The prompt, or the kind of the error: a template's own, or Python's in it."""
    try:
        return tokenizer.render(*arguments, **rest)
    except TemplateError as error:
        return type(error)
    except Exception as error:
        return type(error)


@pytest.mark.parametrize("name", _FILES)
@settings(max_examples=40)
@given(st.lists(_MESSAGE, max_size=4), st.booleans(), st.booleans(), _VARIABLES)
def test_chats_render_as_transformers_renders_them(
    name: str,
    messages: Sequence[Mapping[str, Any]],
    tools: bool,
    prompt: bool,
    rest: dict[str, Any],
) -> None:
    own, made = templated(name)
    assert isinstance(made, PlainTokenizer)
    given_tools = tools_for_template() if tools else None
    expected = rendered(own, messages, given_tools, prompt, **rest)
    assert rendered(made, messages, given_tools, prompt, **rest) == expected


@pytest.mark.parametrize(
    "source",
    [
        "{% generation %}{% set x = 1 %}{{ messages|length }}{% endgeneration %}{{ x }}",
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m }}{% endfor %}",
        "{{ dict(a=1, b='<') | tojson }}{{ dict.fromkeys([1]) }}{{ dict.mro }}",
        "{% set ns = namespace(n=0) %}{% set ns.n = 2 %}{{ ns.n }}{{ namespace(self=1).self }}",
        "{% set ns = namespace() %}{% set ns._n = 2 %}",
        "{{ namespace(__class__=1) }}",
        "{{ messages | tojson(indent=2, sort_keys=True) }}{{ 'é<' | tojson(ensure_ascii=True) }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__ }}{{ [].__class__.__mro__ }}",
        "{{ raise_exception('no') }}",
        "{{ strftime_now('%Y') }}{{ flag }}{{ number }}{{ strange }}",
        "  {% if true %}\n  x\n  {% endif %}\n{#- c -#}\n y \n",
        "{{ messages[5].content }}{{ undefined_thing }}",
        "{{ undefined_thing.field }}",
        "{{ (1).bit_length }}{{ messages[0].items() | list }}",
    ],
)
def test_what_templates_may_use_is_what_transformers_gives_them(source: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = source
    chat = [{"role": "user", "content": "a", "none": None}, {"role": "assistant", "content": "b"}]
    rest = {"flag": True, "number": 1.5, "strange": frozenset({1})}
    expected = rendered(ForeignTokenizer(tokenizer), chat, None, False, **rest)
    assert rendered(model_tokenizer(tokenizer), chat, None, False, **rest) == expected


def test_one_of_several_templates_is_taken_as_transformers_takes_it() -> None:
    tokenizer = byte_tokenizer()
    chat = [{"role": "user", "content": "a"}]
    for found in ({"default": "d", "tool_use": "t"}, {"default": "d"}, {"tool_use": "t"}, {}, None):
        tokenizer.chat_template = found
        own, made = ForeignTokenizer(tokenizer), model_tokenizer(tokenizer)
        for tools in (None, tools_for_template()):
            assert rendered(made, chat, tools, False) == rendered(own, chat, tools, False)


def test_texts_of_the_tests_are_plain() -> None:
    assert isinstance(model_text("qwen3")._tokenizer, PlainTokenizer)
