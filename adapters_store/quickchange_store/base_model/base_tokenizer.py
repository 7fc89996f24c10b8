"""The base model's tokenizer: what adapters' own tokenizers are compared with.

Read when it is first asked for, which takes some tenths of a second. Knows nothing of adapters.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from quickchange_store.base_model.base_source import BaseSource
from quickchange_store.base_model.gguf_tokenizer import gguf_tokenizer
from quickchange_store.base_model.tokenizer_data import TokenizerData, tokenizer_data
from quickchange_store.errors import BaseModelError

TOKENIZER_FILE = "tokenizer.json"


def read_tokenizer(source: BaseSource) -> tuple[Any, int, frozenset[int]]:
    """transformers' tokenizer of a base, its model's number of tokens, and the ids that end a text.

    Raises OSError, ValueError or BaseModelError.
    """
    if source.gguf_path is not None:  # its configuration takes seconds to read
        return gguf_tokenizer(source.gguf_path)
    from transformers import AutoTokenizer

    config = source.config()
    tokenizer = AutoTokenizer.from_pretrained(source.where, trust_remote_code=False)
    vocab_size = int(config.get_text_config().vocab_size)
    return tokenizer, vocab_size, _eos_ids(source.where, config, tokenizer)


def read_plain(model: str) -> tuple[TokenizerData | None, int, frozenset[int]]:
    """`read_tokenizer` of what `--model` takes, its tokenizer as plain data.

    None in its place where it has none. Raises as `read_tokenizer`.
    """
    tokenizer, vocab_size, eos_ids = read_tokenizer(BaseSource.of(model))
    return tokenizer_data(tokenizer), vocab_size, eos_ids


def _eos_ids(model: str, config: Any, tokenizer: Any) -> frozenset[int]:
    """End-of-sequence ids from the generation settings, the model and the tokenizer."""
    from transformers import GenerationConfig

    found: set[int] = set()
    sources = [config.get_text_config(), tokenizer]
    with contextlib.suppress(OSError):  # the file is optional
        sources.append(GenerationConfig.from_pretrained(model))
    for source in sources:
        ids = getattr(source, "eos_token_id", None)
        if ids is not None:
            found.update([ids] if isinstance(ids, int) else ids)
    return frozenset(found)


@dataclass(frozen=True)
class CheckpointTokenizer:
    """The tokenizer that lies with a base model."""

    source: BaseSource

    @cached_property
    def _read(self) -> tuple[Any, frozenset[int]] | None:
        """The tokenizer and the ids that end a text; None where the base has none."""
        try:
            tokenizer, _, ends = read_tokenizer(self.source)
        except (
            OSError,
            ValueError,
            BaseModelError,
        ):  # a base may do without, for requests of token ids
            return None
        return tokenizer, ends

    @property
    def backend(self) -> Any:
        """The `tokenizers` library's; None where there is none, or one of another kind."""
        return None if self._read is None else getattr(self._read[0], "backend_tokenizer", None)

    @property
    def template(self) -> Any:
        """The chat template, as text or by name; None where there is none."""
        return None if self._read is None else self._read[0].chat_template

    @property
    def ends(self) -> frozenset[int]:
        return frozenset() if self._read is None else self._read[1]

    def mark(self, name: str) -> str | None:
        """A marking token, by tokenizers' name for it: eos_token, bos_token."""
        mark = None if self._read is None else getattr(self._read[0], name, None)
        return None if mark is None else str(mark)
