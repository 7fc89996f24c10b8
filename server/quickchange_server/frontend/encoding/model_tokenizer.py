"""What a text is made with: the tokenizer of a model, whoever computes it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

from quickchange_store.base_model.tokenizer_data import Template
from quickchange_store.canonical.tokenizer_part import TokenizerChanges


class ModelTokenizer(Protocol):
    """A tokenizer and its chat template. Its methods may run on several threads at once."""

    @property
    def backend(self) -> Any:
        """The `tokenizers` library's; None for a tokenizer of another kind."""

    @property
    def template(self) -> Template:
        """The chat template, or several by name; None or empty where there is none."""

    @property
    def marks(self) -> Mapping[str, str]:
        """Marking tokens by transformers' names for them: eos_token, bos_token, …"""

    @property
    def special_ids(self) -> frozenset[int]: ...

    def __len__(self) -> int:
        """Number of tokens, added ones included."""

    def entries(self) -> Collection[str]:
        """Entries of the vocabulary, added tokens included."""

    def added(self) -> Collection[str]:
        """Texts of the added tokens."""

    def name(self, token_id: int) -> str:
        """A token's entry in the vocabulary."""

    def encode(self, text: str, second: str | None = None, *, special: bool) -> list[int]:
        """Token ids of a text, or of two as the tokenizer joins them."""

    def spans(self, text: str, *, special: bool) -> list[tuple[int, int, int]] | None:
        """Token ids with their characters: (id, start, stop). None if it can't tell them."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of tokens, special ones included, as its decoder writes it."""

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
        **rest: Any,
    ) -> str:
        """The prompt of a chat. Raises what the template raises."""

    def configuration(self) -> dict[str, Any]:
        """Its configuration, in the names of tokenizer_config.json."""

    def changed(self, changes: TokenizerChanges) -> ModelTokenizer:
        """The tokenizer with an adapter's tokens, marks and template. Raises ValueError."""
