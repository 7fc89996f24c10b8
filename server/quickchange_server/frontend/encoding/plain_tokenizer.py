"""A tokenizer of plain data: the `tokenizers` library and Jinja, to the same ids as transformers.

Knows nothing of files, models or requests.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from tokenizers import Tokenizer

from quickchange_server.frontend.encoding.template_rendering import render, template_of
from quickchange_store.base_model.tokenizer_data import (
    Template,
    TokenizerData,
    TokenizerTraits,
)
from quickchange_store.canonical.tokenizer_part import AddedToken, TokenizerChanges


class PlainTokenizer:
    """`ModelTokenizer` of a backend and the traits beside it."""

    def __init__(self, backend: Tokenizer, traits: TokenizerTraits) -> None:
        backend.encode_special_tokens = traits.splits_special
        self.backend: Any = backend
        self._traits = traits
        self.template: Template = traits.template
        self.marks: Mapping[str, str] = traits.set_marks

    @classmethod
    def of(cls, data: TokenizerData) -> PlainTokenizer:
        return cls(Tokenizer.from_str(data.backend), data.traits)

    @property
    def special_ids(self) -> frozenset[int]:
        added = self.backend.get_added_tokens_decoder()
        return frozenset(token_id for token_id, token in added.items() if token.special)

    def __len__(self) -> int:
        return int(self.backend.get_vocab_size(with_added_tokens=True))

    def entries(self) -> Collection[str]:
        return self.backend.get_vocab(with_added_tokens=True).keys()  # type: ignore[no-any-return]

    def added(self) -> Collection[str]:
        return [token.content for token in self.backend.get_added_tokens_decoder().values()]

    def name(self, token_id: int) -> str:
        return str(self.backend.id_to_token(token_id))

    def encode(self, text: str, second: str | None = None, *, special: bool) -> list[int]:
        return list(self._encoded(text, second, special).ids)

    def spans(self, text: str, *, special: bool) -> list[tuple[int, int, int]]:
        found = self._encoded(text, None, special)
        pairs = zip(found.ids, found.offsets, strict=True)
        return [(token_id, start, stop) for token_id, (start, stop) in pairs]

    def _encoded(self, text: str, second: str | None, special: bool) -> Any:
        # As a batch, for which alone the library lets other threads run.
        given = (text, second) if second else text
        return self.backend.encode_batch([given], add_special_tokens=special)[0]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.backend.decode(list(ids), skip_special_tokens=False))

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
        **rest: Any,
    ) -> str:
        return render(
            template_of(self.template, tools=tools is not None),
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            **{**self.marks, **rest},
        )

    def configuration(self) -> dict[str, Any]:
        added = self.backend.get_added_tokens_decoder()
        return self._traits.configuration({id_: token.content for id_, token in added.items()})

    def changed(self, changes: TokenizerChanges) -> PlainTokenizer:
        # The backend is large: it is shared where nothing of it changes.
        backend = with_tokens(self.backend, changes.tokens) if changes.tokens else self.backend
        template = self.template if changes.template is None else changes.template
        marks = {**self._traits.marks, **changes.marks}
        return PlainTokenizer(backend, replace(self._traits, template=template, marks=marks))


def with_tokens(backend: Any, tokens: Iterable[AddedToken]) -> Any:
    """The `tokenizers` library's tokenizer with these tokens, in place of those of their ids.

    Raises ValueError where one gets another id.
    """
    tree = json.loads(backend.to_str())
    added = {entry["id"]: entry for entry in tree["added_tokens"]}
    added |= {token.id: asdict(token) for token in tokens}
    tree["added_tokens"] = [added[token_id] for token_id in sorted(added)]
    made = Tokenizer.from_str(json.dumps(tree))
    for token in tokens:
        if made.token_to_id(token.content) != token.id:
            raise ValueError(
                f"{token.content!r} would be token {made.token_to_id(token.content)}, and the "
                f"adapter has it as {token.id}"
            )
    return made
