"""A tokenizer as plain data: the `tokenizers` library's JSON and what transformers keeps beside it.

Whoever has it makes texts of token ids and back, and renders chats, without transformers and torch.
It is made of transformers' tokenizer, which alone reads every form that a tokenizer is stored in.
Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Template = str | Mapping[str, str] | None  # a chat template, several by name, or none

# What transformers' tokenizer makes texts, ids and prompts by: a class with one of its own may do
# anything there, so it is no plain data.
_METHODS = (
    *("__call__", "__len__", "encode", "decode", "_encode_plus", "_batch_encode_plus", "_decode"),
    *("set_truncation_and_padding", "_get_padding_truncation_strategies", "_convert_encoding"),
    *("_switch_to_input_mode", "convert_ids_to_tokens", "get_vocab", "get_added_vocab"),
    *("apply_chat_template", "get_chat_template", "special_tokens_map", "all_special_tokens"),
    *("added_tokens_decoder", "backend_tokenizer"),
)
_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")
_SETTINGS = ("add_bos_token", "add_eos_token", "add_prefix_space", "clean_up_tokenization_spaces")


@dataclass(frozen=True)
class TokenizerTraits:
    """What transformers keeps beside the `tokenizers` library's tokenizer."""

    splits_special: bool  # the texts of special tokens are read as any other
    template: Template
    marks: Mapping[str, str | None]  # marking tokens by transformers' names, in its order
    further: tuple[str, ...]  # special tokens beside the marks
    settings: Mapping[str, Any]  # others, by their names in tokenizer_config.json

    @classmethod
    def of(cls, tokenizer: Any) -> TokenizerTraits:
        """Those of transformers' tokenizer."""
        known, kept = tokenizer.special_tokens_map, tokenizer.init_kwargs
        return cls(
            splits_special=bool(tokenizer.split_special_tokens),
            template=tokenizer.chat_template,
            marks={name: known.get(name) for name in tokenizer.SPECIAL_TOKENS_ATTRIBUTES},
            further=tuple(t for t in tokenizer.all_special_tokens if t not in known.values()),
            settings={
                "tokenizer_class": type(tokenizer).__name__,
                "model_max_length": int(tokenizer.model_max_length),
                **{name: kept.get(name) for name in _SETTINGS},
                "padding_side": str(tokenizer.padding_side),
                "truncation_side": str(tokenizer.truncation_side),
            },
        )

    @property
    def set_marks(self) -> dict[str, str]:
        """The marking tokens that there are."""
        return {name: mark for name, mark in self.marks.items() if mark is not None}

    def configuration(self, added: Mapping[int, str]) -> dict[str, Any]:
        """The tokenizer's configuration, in the names of its tokenizer_config.json.

        added: texts of the added tokens by their ids.
        """
        named = {name: self.marks.get(name) for name in _NAMED}
        special = dict.fromkeys([*self.set_marks.values(), *self.further])
        return {
            **self.settings,
            **named,
            "additional_special_tokens": [t for t in special if t not in named.values()],
            "added_tokens_decoder": {str(id_): text for id_, text in added.items()},
            "chat_template": self.template if isinstance(self.template, str) else None,
        }


@dataclass(frozen=True)
class TokenizerData:
    """A fast tokenizer, complete: the same ids, texts and prompts as transformers' own."""

    backend: str  # JSON of the `tokenizers` library
    traits: TokenizerTraits


def tokenizer_data(tokenizer: Any) -> TokenizerData | None:
    """A tokenizer of transformers as plain data.

    None where it computes what its data doesn't say: a slow one, one with methods of its own, or a
    backend that can't be written or comes back as another.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not _usual(type(tokenizer)) or vars(tokenizer).keys() & set(_METHODS):
        return None
    written = _written(backend)
    return None if written is None else TokenizerData(written, TokenizerTraits.of(tokenizer))


def _usual(kind: type) -> bool:
    from transformers import PreTrainedTokenizerFast

    return issubclass(kind, PreTrainedTokenizerFast) and all(
        getattr(kind, name, None) is getattr(PreTrainedTokenizerFast, name, None)
        for name in _METHODS
    )


def _written(backend: Any) -> str | None:
    """The backend's JSON without padding and truncation, which transformers sets for each call;
    None where another tokenizer is read from it."""
    from tokenizers import Tokenizer

    try:
        text = str(backend.to_str())
        read = Tokenizer.from_str(text)
    except Exception:  # the library raises Exception itself: for a part that is Python code
        return None
    same = read.to_str() == text and read.get_vocab(True) == backend.get_vocab(True)
    if not same or _added(read) != _added(backend):
        return None
    read.no_padding()
    read.no_truncation()
    return str(read.to_str())


def _added(backend: Any) -> dict[int, str]:
    return {id_: repr(token) for id_, token in backend.get_added_tokens_decoder().items()}
