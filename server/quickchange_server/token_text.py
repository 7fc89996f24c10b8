"""A model's tokenizer as the engine's word lookup needs it: pieces of tokens, tokens of phrases."""

from __future__ import annotations

from functools import lru_cache

from quickchange_server.engine.word_lookup import TokenText
from quickchange_server.text import Text

_PIECES, _PHRASES = 1 << 16, 1 << 14  # remembered: the same few come again and again


def token_text(model: str | Text) -> TokenText:
    """Of a model folder, a hub id or what was loaded from one. Raises SettingError where there is
    no tokenizer."""
    text = Text.load(model) if isinstance(model, str) else model

    @lru_cache(_PIECES)
    def piece(token: int) -> str:
        return text.token_bytes(token).decode(errors="replace")

    @lru_cache(_PHRASES)
    def encode(phrase: str) -> tuple[int, ...]:
        return tuple(text.encode_now(phrase, add_special_tokens=False))

    return TokenText(piece, encode)
