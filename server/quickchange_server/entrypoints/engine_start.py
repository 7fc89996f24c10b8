"""Entry of the engine process, which gives the engine its tokenizer.

The API process imports this module too, so torch is loaded only when the engine process calls
`engine_main`.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys
from functools import lru_cache
from itertools import takewhile
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from quickchange_server.config import Settings
from quickchange_server.errors import SettingError
from quickchange_server.frontend.tokenizer import Text
from quickchange_server.structured_output.errors import ConstraintError

if TYPE_CHECKING:
    from quickchange_server.spec_decode.prompt_lookup import TokenText
    from quickchange_server.structured_output.compiler import ConstraintCompiler

_PIECES, _PHRASES = 1 << 16, 1 << 14  # entries of the caches

logger = logging.getLogger(__name__)


def engine_main(connection: Connection, settings: Settings) -> None:
    """Main function of a spawned engine process; returns at its shutdown."""
    from quickchange_server.engine.process import main

    main(connection, settings, read_tokenizer)


def preload() -> None:
    """Begin to load the engine's modules, in the process from which CPU engines are forked.

    Called before the first engine is started, from a thread or not; without it, each engine loads
    them itself.
    """
    # OpenMP's threads, which serve PyTorch's own operators, would spin for milliseconds behind each
    # one and hold up the engine's own team: 3 % of a prompt of 512 tokens on two cores.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    if sys.platform == "linux":
        multiprocessing.set_forkserver_preload(["quickchange_server.entrypoints.engine_modules"])
        forkserver.ensure_running()


def read_tokenizer(settings: Settings) -> tuple[TokenText | None, ConstraintCompiler | None]:
    """The token texts for phrase lookup, and the compiler for structured output.

    Either is None if the settings switch it off or the tokenizer can't serve it. Raises
    SettingError if phrase lookup is on and the model has no tokenizer.
    """
    phrases = settings.turbo and settings.prompt_lookup
    try:
        text = Text.load(settings.model)
    except SettingError:
        if phrases:
            raise
        return None, None
    return token_text(text) if phrases else None, _grammars(text, settings.spare_tokens)


def read_text(model: str) -> Text:
    """The tokenizer of a model folder or hub id. Raises SettingError where it has none."""
    return Text.load(model)


def token_text(model: str | Text) -> TokenText:
    """Cached conversions of a model's tokenizer: token to text, and phrase to tokens.

    `model`: its folder or hub id, or its tokenizer. Raises SettingError if it has none.
    """
    from quickchange_server.spec_decode.prompt_lookup import TokenText

    text = Text.load(model) if isinstance(model, str) else model

    @lru_cache(_PIECES)
    def piece(token: int) -> str:
        return text.token_bytes(token).decode(errors="replace")

    @lru_cache(_PHRASES)
    def encode(phrase: str) -> tuple[int, ...]:
        ids = text.encode_now(phrase, add_special_tokens=False)
        return tuple(takewhile(lambda id_: id_ < text.vocab_size, ids))  # those with a row

    return TokenText(piece, encode)


def _grammars(text: Text, spare: int) -> ConstraintCompiler | None:
    """The grammar compiler; None if the tokenizer doesn't allow one (such requests are refused).

    spare: tokens behind the base's own.
    """
    from quickchange_server.structured_output.grammar import TokenGrammars

    try:
        return TokenGrammars.of(text, spare)
    except ConstraintError as error:
        logger.warning("structured output is not served: %s", error)
        return None
