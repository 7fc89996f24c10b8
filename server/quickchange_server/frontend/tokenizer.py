"""The base model's tokenizer: prompts and chats to token ids, and token ids to text.

Wraps transformers' tokenizer and chat template, without torch. Knows nothing of HTTP or the engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from quickchange_server.errors import InvalidRequestError, SettingError
from quickchange_server.frontend.detokenizer import Decoding, Detokenizer
from quickchange_server.frontend.tool_parser import (
    Messages,
    ToolFormat,
    tool_format,
    with_text_arguments,
)

LONG_TEXT = 4_000  # characters: 7 ms of tokenizing (SmolLM2), too long on the event loop


class Text:
    """A tokenizer with its model's vocabulary size and end-of-sequence ids.

    `vocab_size` is the number of token ids that the model takes; `eos_ids` end a generation.
    """

    def __init__(self, tokenizer: Any, *, vocab_size: int, eos_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._decoding = Decoding(tokenizer)
        self.vocab_size = vocab_size
        self.eos_ids = frozenset(id_ for id_ in eos_ids if 0 <= id_ < vocab_size)

    @classmethod
    def load(cls, model: str) -> Text:
        """Read the tokenizer of a model folder or hub id.

        Raises SettingError (setting `model`) if there is none.
        """
        _check_folder(model)  # before the imports, which take seconds
        from huggingface_hub.errors import StrictDataclassError
        from transformers import AutoConfig, AutoTokenizer

        try:
            config = AutoConfig.from_pretrained(model, trust_remote_code=False)
            tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
        except (OSError, ValueError, StrictDataclassError) as error:
            raise SettingError(
                f"model: can't read a tokenizer and configuration from {model!r}: {error}",
                param="model",
            ) from error
        vocab_size = int(config.get_text_config().vocab_size)
        return cls(tokenizer, vocab_size=vocab_size, eos_ids=_eos_ids(model, config, tokenizer))

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of special tokens, such as the end of a sequence."""
        return self._decoding.special_ids

    @property
    def has_chat_template(self) -> bool:
        return bool(self._tokenizer.chat_template)

    @cached_property
    def tool_format(self) -> ToolFormat | None:
        """The model's form of tool calls; None if its chat template takes no tools."""
        form = tool_format(self._apply_template) if self.has_chat_template else None
        return None if form is None else replace(form, end=self._before_end(form.end))

    def _before_end(self, text: str) -> str:
        """The text before an end-of-sequence token, which no answer's text contains."""
        ends = {self.token_name(token_id) for token_id in self.eos_ids & self.special_ids}
        cut = min((text.find(end) for end in ends if end in text), default=len(text))
        return text[:cut].rstrip()

    def special_parts(self, text: str) -> list[str | int]:
        """The text split at special tokens: these by id, the text between them as strings."""
        known = {self.token_name(token_id): token_id for token_id in self.special_ids}
        longest_first = sorted(known, key=len, reverse=True)
        parts = re.split(f"({'|'.join(map(re.escape, longest_first))})", text) if known else [text]
        return [known.get(part, part) for part in parts if part]

    def tokenizer_json(self) -> str | None:
        """The tokenizer in the `tokenizers` library's JSON; None for one of another kind."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:
            return None
        plain = copy.copy(backend)
        plain.no_padding()
        plain.no_truncation()
        return str(plain.to_str())

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. A long text is tokenized on a thread, off the event loop."""
        if len(text) < LONG_TEXT:
            return self.encode_now(text, add_special_tokens=add_special_tokens)
        return await asyncio.to_thread(self.encode_now, text, add_special_tokens=add_special_tokens)

    def encode_now(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, tokenized on the calling thread."""
        encoded = self._tokenizer(
            text,
            add_special_tokens=add_special_tokens,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # no warning about long prompts, which admission refuses
        )
        return list(encoded["input_ids"])

    async def spans(
        self, text: str, *, add_special_tokens: bool = True
    ) -> list[tuple[int, int, int]]:
        """Token ids of a text with their character spans: (id, start, stop).

        Raises InvalidRequestError if the model's tokenizer does not provide spans.
        """
        if not self._tokenizer.is_fast:
            raise InvalidRequestError(
                "inputs: this model has no fast tokenizer, which alone tells where tokens begin; "
                "send prompt instead of inputs for the ids alone",
                param="inputs",
            )
        encoded = await asyncio.to_thread(
            self._tokenizer,
            text,
            add_special_tokens=add_special_tokens,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        pairs = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        return [(token_id, start, stop) for token_id, (start, stop) in pairs]

    def render_chat(
        self, messages: Messages, *, tools: Messages = (), add_generation_prompt: bool = True
    ) -> str:
        """The prompt text of a chat, special tokens included.

        Raises InvalidRequestError if the model has no chat template, or the template refuses the
        messages (roles that must alternate, for example).
        """
        if not self.has_chat_template:
            raise InvalidRequestError(
                "this model has no chat template: use /v1/completions with the whole prompt",
                param="messages",
            )
        if any(message.get("tool_calls") for message in messages):
            form = self.tool_format
            if form is not None and form.from_text:
                messages = [with_text_arguments(message) for message in messages]
        try:
            return self._apply_template(messages, tools, add_generation_prompt)
        except TemplateError as error:
            raise InvalidRequestError(
                f"the model's chat template refuses these messages: {error}", param="messages"
            ) from error

    def _apply_template(
        self, messages: Messages, tools: Messages, add_generation_prompt: bool
    ) -> str:
        """The rendered chat template. Raises jinja2.TemplateError for any error in its code."""
        try:
            rendered = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=[dict(tool) for tool in tools] or None,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise TemplateError(str(error)) from error
        return str(rendered)

    async def encode_chat(
        self, messages: Messages, *, tools: Messages = (), add_generation_prompt: bool = True
    ) -> list[int]:
        """Token ids of a chat. The template writes the special tokens, so none are added."""
        rendered = self.render_chat(
            messages, tools=tools, add_generation_prompt=add_generation_prompt
        )
        return await self.encode(rendered, add_special_tokens=False)

    def detokenizer(self, *, skip_special_tokens: bool = True) -> Detokenizer:
        """A new incremental detokenizer for one sequence."""
        return self._decoding.detokenizer(skip_special_tokens=skip_special_tokens)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Text of a whole sequence."""
        detokenizer = self.detokenizer(skip_special_tokens=skip_special_tokens)
        return "".join([*map(detokenizer.push, ids), detokenizer.finish()])

    def token_bytes(self, token_id: int) -> bytes:
        """A token's own bytes, possibly part of a character."""
        return self._decoding.token_bytes(token_id)

    def token_name(self, token_id: int) -> str:
        """The token's entry in the vocabulary, such as "Ġthe"."""
        return str(self._tokenizer.convert_ids_to_tokens(token_id))

    def check_ids(self, ids: Sequence[int], param: str) -> None:
        """Raise InvalidRequestError for an id that the model has no row for.

        A tokenizer may have such tokens: their text in a prompt gives their ids.
        """
        if ids and (min(ids) < 0 or max(ids) >= self.vocab_size):
            wrong = next(i for i in ids if not 0 <= i < self.vocab_size)
            known = self.token_name(wrong) if 0 <= wrong < len(self._tokenizer) else None
            name = "" if known is None else f" ({known!r})"
            remedy = "" if known is None else f", and leave out the text {known!r}"
            raise InvalidRequestError(
                f"{param}: token id {wrong}{name} is not in the model's vocabulary; "
                f"use ids from 0 to {self.vocab_size - 1}{remedy}",
                param=param,
            )


def _check_folder(model: str) -> None:
    looks_like_path = model.startswith((".", "/", "~")) or model.count("/") > 1
    if looks_like_path and not Path(model).is_dir():
        raise SettingError(
            f"model: there is no folder {model!r}; give a folder in transformers' layout "
            "or a hub id such as owner/name",
            param="model",
        )


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
