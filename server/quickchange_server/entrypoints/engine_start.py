"""The engine process's entry: gives the engine, which knows no text, the tokenizer that it needs.

Imported by the API process as well, so nothing here loads torch before the engine's own process
calls `engine_main`.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from quickchange_server.config import Settings
from quickchange_server.errors import SettingError
from quickchange_server.frontend.tokenizer import Text
from quickchange_server.structured_output.errors import ConstraintError

if TYPE_CHECKING:
    from quickchange_server.spec_decode.prompt_lookup import TokenText
    from quickchange_server.structured_output.compiler import ConstraintCompiler

_PIECES, _PHRASES = 1 << 16, 1 << 14  # remembered: the same few come again and again

logger = logging.getLogger(__name__)


def engine_main(connection: Connection, settings: Settings) -> None:
    """What a spawned engine process runs until it is told to end."""
    from quickchange_server.engine.process import main

    main(connection, settings, read_tokenizer)


def read_tokenizer(settings: Settings) -> tuple[TokenText | None, ConstraintCompiler | None]:
    """What phrase lookup and structured output need of the model's tokenizer.

    None where the settings or the tokenizer do without. Raises SettingError where phrase lookup is
    asked for and the model has no tokenizer.
    """
    phrases = settings.turbo and settings.prompt_lookup
    try:
        text = Text.load(settings.model)
    except SettingError:
        if phrases:
            raise
        return None, None
    return token_text(text) if phrases else None, _grammars(text)


def read_text(model: str) -> Text:
    """The tokenizer of a model folder or hub id. Raises SettingError where it has none."""
    return Text.load(model)


def token_text(model: str | Text) -> TokenText:
    """Pieces of tokens and tokens of phrases, by a model's tokenizer.

    `model`: its folder or hub id, or what was loaded from there. Raises SettingError where it has
    no tokenizer.
    """
    from quickchange_server.spec_decode.prompt_lookup import TokenText

    text = Text.load(model) if isinstance(model, str) else model

    @lru_cache(_PIECES)
    def piece(token: int) -> str:
        return text.token_bytes(token).decode(errors="replace")

    @lru_cache(_PHRASES)
    def encode(phrase: str) -> tuple[int, ...]:
        return tuple(text.encode_now(phrase, add_special_tokens=False))

    return TokenText(piece, encode)


def _grammars(text: Text) -> ConstraintCompiler | None:
    """None where text can't be constrained; requests that ask for it are then refused."""
    from quickchange_server.structured_output.grammar import TokenGrammars

    try:
        return TokenGrammars.of(text)
    except ConstraintError as error:
        logger.warning("structured output is not served: %s", error)
        return None
