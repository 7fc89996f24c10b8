"""The base model's tokenizer: prompts and chats to token ids, and token ids to text.

Made of the tokenizer's plain data (`encoding/`): this needs neither transformers nor torch. Knows
nothing of HTTP or the engine.
"""

from __future__ import annotations

import asyncio
import copy
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

from quickchange_server.errors import (
    ContextLengthError,
    InvalidRequestError,
    SettingError,
    WorkerFailedError,
)
from quickchange_server.frontend.detokenizer import Decoding, Detokenizer
from quickchange_server.frontend.encoding.model_tokenizer import ModelTokenizer
from quickchange_server.frontend.encoding.plain_tokenizer import PlainTokenizer
from quickchange_server.frontend.parsing.reasoning_parser import ReasoningFormat
from quickchange_server.frontend.parsing.tool_forms import ToolForm
from quickchange_server.frontend.parsing.tool_learning import Messages, with_arguments
from quickchange_server.frontend.templates.chat_template import ChatTemplate, Rendering
from quickchange_server.workers.torch_worker import run_apart
from quickchange_store.base_model.base_tokenizer import read_plain
from quickchange_store.canonical.tokenizer_part import TokenizerChanges
from quickchange_store.errors import BaseModelError

LONG_TEXT = 4_000  # characters: 7 ms of tokenizing (SmolLM2), too long on the event loop
USUAL_LENGTH = 8  # characters of a token that few texts exceed on average
AT_ONCE = 2  # long texts tokenized at once: each takes 300 bytes a token

_USUAL = Rendering()

T = TypeVar("T")


class Text:
    """A tokenizer with its model's vocabulary size and end-of-sequence ids.

    `vocab_size` is the number of token ids that the model takes; `eos_ids` end a generation.
    """

    def __init__(
        self,
        tokenizer: ModelTokenizer,
        *,
        vocab_size: int,
        eos_ids: frozenset[int],
        threads: ThreadPoolExecutor | None = None,
    ) -> None:
        """threads: on which long texts are tokenized; None: new ones."""
        self._tokenizer = tokenizer
        self._decoding = Decoding(tokenizer)
        self._threads = threads or ThreadPoolExecutor(AT_ONCE, "tokenizer")
        self.vocab_size = vocab_size
        self.eos_ids = frozenset(id_ for id_ in eos_ids if 0 <= id_ < vocab_size)

    @classmethod
    def load(cls, model: str) -> Text:
        """Read the tokenizer of a model folder or hub id, with transformers.

        Raises SettingError (setting `model`) if there is none.
        """
        with _reading(model):
            from quickchange_server.frontend.encoding.foreign_tokenizer import model_tokenizer
            from quickchange_store.base_model.base_source import BaseSource
            from quickchange_store.base_model.base_tokenizer import read_tokenizer

            tokenizer, vocab_size, eos_ids = read_tokenizer(BaseSource.of(model))
        return cls._read(model_tokenizer(tokenizer), vocab_size, eos_ids)

    @classmethod
    def load_apart(cls, model: str) -> Text:
        """The same where this process is to have neither transformers nor torch: another reads it.

        A tokenizer that is no plain data is read here all the same. Raises SettingError.
        """
        with _reading(model):
            data, vocab_size, eos_ids = run_apart(read_plain, model)
        if data is None:
            return cls.load(model)
        return cls._read(PlainTokenizer.of(data), vocab_size, eos_ids)

    @classmethod
    def _read(cls, tokenizer: ModelTokenizer, vocab_size: int, eos_ids: frozenset[int]) -> Text:
        text = cls(tokenizer, vocab_size=vocab_size, eos_ids=eos_ids)
        _ = text.longest_token  # read now: it takes some milliseconds
        return text

    def changed(self, changes: TokenizerChanges) -> Text:
        """This text with an adapter's tokens, marks, ends and chat template.

        Takes some tenths of a second. Raises ValueError where the tokenizer can't have them.
        """
        text = Text(
            self._tokenizer.changed(changes),
            vocab_size=changes.rows,
            eos_ids=self.eos_ids | frozenset(changes.ends),
            threads=self._threads,
        )
        _ = text.longest_token
        return text

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of special tokens, such as the end of a sequence."""
        return self._decoding.special_ids

    @cached_property
    def template(self) -> ChatTemplate:
        return ChatTemplate(self._tokenizer)

    @cached_property
    def tool_form(self) -> ToolForm | None:
        """The model's form of tool calls; None if its chat template takes no tools."""
        ends = {self.token_name(token_id) for token_id in self.eos_ids & self.special_ids}
        return self.template.tool_form(ends)

    @cached_property
    def reasoning_format(self) -> ReasoningFormat | None:
        """The model's form of thoughts; None if its chat template knows none."""
        form = self.template.reasoning_format
        return None if form is None else replace(form, last=self._before_end(form.last))

    async def learn_reasoning(self) -> ReasoningFormat | None:
        """`reasoning_format`. The first time what the template says of itself is learned, on a
        thread: it takes some tenths of a second."""
        if "reasoning_format" not in vars(self):
            await self._on_thread(self._learn)
        return self.reasoning_format

    def _learn(self) -> None:
        _ = self.template.takes, self.tool_form, self.reasoning_format

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

    def configuration(self) -> dict[str, Any]:
        """The tokenizer's configuration, in the names of its tokenizer_config.json."""
        return self._tokenizer.configuration()

    def special_of(self, texts: Iterable[str]) -> frozenset[int]:
        """The special tokens in some texts."""
        parts = [part for text in texts for part in self.special_parts(text)]
        return frozenset(part for part in parts if isinstance(part, int))

    def tokenizer_json(self) -> str | None:
        """The tokenizer in the `tokenizers` library's JSON; None for one of another kind."""
        backend = self._tokenizer.backend
        if backend is None:
            return None
        plain = copy.copy(backend)
        plain.no_padding()
        plain.no_truncation()
        return str(plain.to_str())

    async def encode(
        self, text: str, *, most: int, param: str, add_special_tokens: bool = True
    ) -> list[int]:
        """Token ids of a text. A long text is tokenized on a thread, off the event loop.

        Raises ContextLengthError, without tokenizing all of it, if they are more than `most`; a
        few more may be returned.
        """
        return (await self.encode_each([text], most, param, special=add_special_tokens))[0]

    async def encode_each(
        self, texts: Sequence[str], most: int, param: str, *, special: bool = True
    ) -> list[list[int]]:
        """Token ids of each text, as `encode` has them."""
        for text in texts:
            self.check_length(text, most, param)
        if sum(map(len, texts)) < LONG_TEXT:
            return [self.encode_now(text, add_special_tokens=special) for text in texts]
        work = partial(self.encode_within, most=most, param=param, add_special_tokens=special)
        return [await self._on_thread(partial(work, text)) for text in texts]

    async def _on_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    @cached_property
    def longest_token(self) -> int:
        """The most bytes of text that one token stands for."""
        added = [len(name.encode()) for name in self._tokenizer.added()]
        # In a byte-level vocabulary each character of an entry stands for a byte.
        length = len if self._decoding.byte_level else _utf8_length
        return max(*map(length, self._tokenizer.entries()), *added, 1)

    def check_length(self, text: str, most: int, param: str) -> None:
        """Raise ContextLengthError if the text has more bytes than `most` tokens can have."""
        bound = most * self.longest_token
        if len(text) * 4 > bound and _utf8_length(text) > bound:
            raise ContextLengthError(
                f"{param}: exceeds this model's maximum context length: {_utf8_length(text)} bytes "
                f"of text are more than {most} tokens; shorten it",
                param=param,
            )

    def encode_within(
        self, text: str, *, most: int, param: str, add_special_tokens: bool = True
    ) -> list[int]:
        """Token ids of a text that fits, else the errors of `encode`; on the calling thread."""
        self.check_length(text, most, param)
        head = text[: most * USUAL_LENGTH]
        if len(head) < len(text):
            # A token that the cut has split may count as many.
            found = len(self.encode_now(head, add_special_tokens=False)) - self.longest_token
            if found > most:
                raise ContextLengthError(
                    f"{param}: exceeds this model's maximum context length: the text has more than "
                    f"{most} tokens; shorten it",
                    param=param,
                )
        return self.encode_now(text, add_special_tokens=add_special_tokens)

    def encode_now(
        self, text: str, *, second: str | None = None, add_special_tokens: bool = True
    ) -> list[int]:
        """Token ids of a text, or of two as the tokenizer joins them, on the calling thread."""
        return self._tokenizer.encode(text, second, special=add_special_tokens)

    def spellings(self, words: Iterable[str]) -> tuple[tuple[int, ...], ...]:
        """Runs of tokens that spell each word, without a space before it and with one.

        As vLLM takes them: the second where it is another token in the first's place.
        """
        runs: list[tuple[int, ...]] = []
        for word in words:
            bare, spaced = (
                tuple(self.encode_now(before + word.lstrip(), add_special_tokens=False))
                for before in ("", " ")
            )
            runs.append(bare)
            if len(spaced) == len(bare) and spaced[:1] != bare[:1]:
                runs.append(spaced)
        return tuple(run for run in runs if run)

    async def spans(
        self, text: str, *, most: int, param: str, add_special_tokens: bool = True
    ) -> list[tuple[int, int, int]]:
        """Token ids of a text with their character spans: (id, start, stop).

        Raises InvalidRequestError if the model's tokenizer does not provide spans, and
        ContextLengthError as `encode` does.
        """
        return await self._on_thread(partial(self._spans, text, most, param, add_special_tokens))

    def _spans(
        self, text: str, most: int, param: str, add_special_tokens: bool
    ) -> list[tuple[int, int, int]]:
        self.encode_within(text, most=most, param=param)
        found = self._tokenizer.spans(text, special=add_special_tokens)
        if found is None:
            raise InvalidRequestError(
                f"{param}: this model has no fast tokenizer, which alone tells where tokens begin; "
                "ask for the ids alone",
                param=param,
            )
        return found

    def render_chat(
        self,
        messages: Messages,
        *,
        tools: Messages = (),
        how: Rendering = _USUAL,
        param: str = "messages",
    ) -> str:
        """The prompt text of a chat, special tokens included. Raises as `ChatTemplate.render`."""
        if any(message.get("tool_calls") for message in messages):
            form = self.tool_form
            as_text = form is not None and form.from_text
            messages = [with_arguments(message, as_text=as_text) for message in messages]
        return self.template.render(messages, tools, how, param=param)

    async def encode_chat(
        self,
        messages: Callable[[], Messages],
        length: int,
        *,
        most: int,
        param: str,
        tools: Callable[[], Messages] = tuple,
        how: Rendering = _USUAL,
        add_special_tokens: bool = False,  # the template writes them
    ) -> list[int]:
        """Token ids of a chat. Raises as `encode` does, and as `chat_text`."""
        text = await self.chat_text(messages, length, most=most, param=param, tools=tools, how=how)
        return await self.encode(
            text, most=most, param=param, add_special_tokens=add_special_tokens
        )

    async def chat_text(
        self,
        messages: Callable[[], Messages],
        length: int,
        *,
        most: int,
        param: str,
        tools: Callable[[], Messages] = tuple,
        how: Rendering = _USUAL,
    ) -> str:
        """The prompt text of a chat of about `length` characters; a long one is made on a thread.

        Raises ContextLengthError for one of surely more than `most` tokens, and as `render_chat`.
        """
        if length > most * self.longest_token:
            raise ContextLengthError(
                f"{param}: exceed this model's maximum context length: {length} characters are "
                f"more than {most} tokens; shorten the chat",
                param=param,
            )

        def rendered() -> str:
            return self.render_chat(messages(), tools=tools(), how=how, param=param)

        return rendered() if length < LONG_TEXT else await self._on_thread(rendered)

    def detokenizer(
        self, *, skip_special_tokens: bool = True, shown: frozenset[int] = frozenset()
    ) -> Detokenizer:
        """A new incremental detokenizer for one sequence. `shown`: special tokens that are never
        skipped."""
        return self._decoding.detokenizer(skip_special_tokens=skip_special_tokens, shown=shown)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Text of a whole sequence."""
        detokenizer = self.detokenizer(skip_special_tokens=skip_special_tokens)
        return "".join([*map(detokenizer.push, ids), detokenizer.finish()])

    def token_bytes(self, token_id: int) -> bytes:
        """A token's own bytes, possibly part of a character."""
        return self._decoding.token_bytes(token_id)

    def token_name(self, token_id: int) -> str:
        """The token's entry in the vocabulary, such as "Ġthe"."""
        return self._tokenizer.name(token_id)

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
                f"{param}: token id {wrong}{name} is out of vocabulary: the model has "
                f"{self.vocab_size} tokens; use ids from 0 to {self.vocab_size - 1}{remedy}",
                param=param,
            )


def _utf8_length(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode(errors="surrogatepass"))


@contextmanager
def _reading(model: str) -> Iterator[None]:
    """Raise what is wrong with a model's tokenizer as SettingError."""
    looks_like_path = model.startswith((".", "/", "~")) or model.count("/") > 1
    gguf = model.lower().endswith(".gguf")  # BaseSource says what is wrong with one
    if looks_like_path and not gguf and not Path(model).is_dir():
        raise SettingError(
            f"model: there is no folder {model!r}; give a folder in transformers' layout, a GGUF "
            "file or a hub id such as owner/name",
            param="model",
        )
    try:
        yield
    except (OSError, ValueError, BaseModelError, WorkerFailedError) as error:
        raise SettingError(
            f"model: can't read a tokenizer and configuration from {model!r}: {error}",
            param="model",
        ) from error
