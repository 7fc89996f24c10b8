"""A tokenizer that only transformers can compute, behind the interface of plain ones.

Slow tokenizers, and classes with methods of their own. It brings transformers, and torch with it,
into the process. Knows nothing of files, models or requests.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from quickchange_server.frontend.encoding.model_tokenizer import ModelTokenizer
from quickchange_server.frontend.encoding.plain_tokenizer import PlainTokenizer, with_tokens
from quickchange_store.base_model.tokenizer_data import (
    Template,
    TokenizerTraits,
    tokenizer_data,
)
from quickchange_store.canonical.tokenizer_part import TokenizerChanges


def model_tokenizer(tokenizer: Any) -> ModelTokenizer:
    """A tokenizer of transformers as plain data, or where that is not the same, itself."""
    data = tokenizer_data(tokenizer)
    return ForeignTokenizer(tokenizer) if data is None else PlainTokenizer.of(data)


class ForeignTokenizer:
    """`ModelTokenizer` of transformers' own object."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        self.template: Template = tokenizer.chat_template
        self.marks: Mapping[str, str] = dict(tokenizer.special_tokens_map)

    @property
    def special_ids(self) -> frozenset[int]:
        if self.backend is None:
            return frozenset(self._tokenizer.all_special_ids)
        added = self.backend.get_added_tokens_decoder()
        return frozenset(token_id for token_id, token in added.items() if token.special)

    def __len__(self) -> int:
        return len(self._tokenizer)

    def entries(self) -> Collection[str]:
        return self._tokenizer.get_vocab().keys()  # type: ignore[no-any-return]

    def added(self) -> Collection[str]:
        return self._tokenizer.get_added_vocab().keys()  # type: ignore[no-any-return]

    def name(self, token_id: int) -> str:
        return str(self._tokenizer.convert_ids_to_tokens(token_id))

    def encode(self, text: str, second: str | None = None, *, special: bool) -> list[int]:
        encoded = self._tokenizer(
            text,
            second,
            add_special_tokens=special,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # no warning about long prompts, which admission refuses
        )
        return list(encoded["input_ids"])

    def spans(self, text: str, *, special: bool) -> list[tuple[int, int, int]] | None:
        if not self._tokenizer.is_fast:
            return None
        found = self._tokenizer(
            text,
            add_special_tokens=special,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        pairs = zip(found["input_ids"], found["offset_mapping"], strict=True)
        return [(token_id, start, stop) for token_id, (start, stop) in pairs]

    def decode(self, ids: Sequence[int]) -> str:
        return str(
            self._tokenizer.decode(
                list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
        **rest: Any,
    ) -> str:
        return str(
            self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=None if tools is None else [dict(tool) for tool in tools],
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **rest,
            )
        )

    def configuration(self) -> dict[str, Any]:
        added = self._tokenizer.added_tokens_decoder
        texts = {id_: str(token) for id_, token in added.items()}
        return TokenizerTraits.of(self._tokenizer).configuration(texts)

    def changed(self, changes: TokenizerChanges) -> ForeignTokenizer:
        made = self.backend
        if changes.tokens:
            if made is None:
                raise ValueError("tokens can be added to a fast tokenizer alone")
            made = with_tokens(made, changes.tokens)
        tokenizer = copy.deepcopy(self._tokenizer, {id(self.backend): made})
        for name, mark in changes.marks.items():
            setattr(tokenizer, name, mark)
        if changes.template is not None:
            tokenizer.chat_template = changes.template
        return ForeignTokenizer(tokenizer)
