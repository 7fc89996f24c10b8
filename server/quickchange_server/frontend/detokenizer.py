"""Incremental detokenizing: token ids to text, one token at a time, never half a character.

The pieces of a stream, joined, equal the tokenizer's own decoding of all its tokens. (That of
`tokenizers.decoders.DecodeStream` does not, for SentencePiece with byte fallback.) Three
strategies, chosen once from the tokenizer's decoder:

- byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM): each token is a byte string, decoded as UTF-8;
- SentencePiece (Llama 2, Mistral, Gemma): "▁" is a space, `<0xE2>` a byte, and the text's first
  space may be stripped;
- others: the tokenizer decodes a short window of tokens, and the text that it gained is emitted.

Knows nothing of requests, stop strings or HTTP.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from quickchange_server.frontend.encoding.model_tokenizer import ModelTokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Detokenizer(Protocol):
    """Incremental decoder of one sequence of tokens."""

    def push(self, token_id: int) -> str:
        """Add a token; returns the text that is now certain, possibly empty."""

    def finish(self) -> str:
        """The text held back so far; half characters become U+FFFD."""


class TokenBytes(Protocol):
    """Function from a token's id to its own bytes, whatever its neighbours."""

    def __call__(self, token_id: int) -> bytes: ...


def byte_level_alphabet() -> dict[str, int]:
    """GPT-2's byte alphabet, inverted: from printable character to byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in table.values())
    table.update({chr(256 + index): byte for index, byte in enumerate(others)})
    return table


class ByteLevelPieces:
    """Bytes of byte-level BPE tokens. `piece_of` gives a token's vocabulary entry, or None."""

    def __init__(self, piece_of: Callable[[int], str | None]) -> None:
        self._piece_of = piece_of
        self._alphabet = byte_level_alphabet()
        self._known: dict[int, bytes] = {}

    def __call__(self, token_id: int) -> bytes:
        known = self._known.get(token_id)
        if known is None:
            known = self._known[token_id] = self._bytes(self._piece_of(token_id) or "")
        return known

    def _bytes(self, piece: str) -> bytes:
        try:
            return bytes([self._alphabet[character] for character in piece])
        except KeyError:  # an added token stands for itself
            return piece.encode()


class ByteLevelDetokenizer:
    """Detokenizer of byte-level BPE: an incremental UTF-8 decoder over the tokens' bytes."""

    def __init__(self, pieces: TokenBytes, skipped: frozenset[int]) -> None:
        self._pieces = pieces
        self._skipped = skipped
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        return self._utf8.decode(self._pieces(token_id))

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


def byte_of(piece: str) -> int | None:
    """The byte that a SentencePiece fallback token such as `<0xE2>` stands for."""
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        try:
            return int(piece[3:5], 16)
        except ValueError:
            return None
    return None


class SentencePieceDetokenizer:
    """Detokenizer of SentencePiece with byte fallback.

    A run of byte tokens is text if the whole run is valid UTF-8, else one U+FFFD per byte, so a run
    is held back until another token ends it.
    """

    def __init__(
        self, piece_of: Callable[[int], str | None], skipped: frozenset[int], strip_first: bool
    ) -> None:
        self._piece_of = piece_of
        self._skipped = skipped
        self._strip_next = strip_first
        self._run = bytearray()

    def push(self, token_id: int) -> str:
        piece = None if token_id in self._skipped else self._piece_of(token_id)
        if piece is None:
            return ""
        piece = piece.replace("▁", " ")
        byte = byte_of(piece)
        if byte is not None:
            self._run.append(byte)
            return ""
        return self._stripped(self._end_run() + piece)

    def finish(self) -> str:
        return self._stripped(self._end_run())

    def _end_run(self) -> str:
        if not self._run:
            return ""
        run = bytes(self._run)
        self._run.clear()
        try:
            return run.decode()
        except UnicodeDecodeError:
            return REPLACEMENT * len(run)

    def _stripped(self, text: str) -> str:
        if not (self._strip_next and text):
            return text
        self._strip_next = False
        return text.removeprefix(" ")


class SentencePiecePieces:
    """Bytes of SentencePiece tokens, a leading space included."""

    def __init__(self, piece_of: Callable[[int], str | None]) -> None:
        self._piece_of = piece_of

    def __call__(self, token_id: int) -> bytes:
        piece = (self._piece_of(token_id) or "").replace("▁", " ")
        byte = byte_of(piece)
        return piece.encode() if byte is None else bytes([byte])


class WindowDetokenizer:
    """Detokenizer for any decoder: decodes a window of the last tokens and emits what it gained.

    The window keeps the tokens emitted last, so that a decoder that depends on neighbours (or drops
    the first token's space) sees them.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._emitted = 0  # tokens of the window whose text is emitted

    def push(self, token_id: int) -> str:
        self._window.append(token_id)
        text, gained = self._gained()
        if not gained or text.endswith(REPLACEMENT):
            return ""
        del self._window[: self._emitted]
        self._emitted = len(self._window)
        return gained

    def finish(self) -> str:
        return self._gained()[1]

    def _gained(self) -> tuple[str, str]:
        before = self._decode(self._window[: self._emitted])
        text = self._decode(self._window)
        return text, text[len(before) :]


class WindowPieces:
    """Bytes of a token decoded alone, the best approximation for a decoder with context."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode

    def __call__(self, token_id: int) -> bytes:
        return self._decode([token_id]).encode()


class Decoding:
    """The decoding side of a tokenizer: its detokenizers and each token's bytes."""

    def __init__(self, tokenizer: ModelTokenizer) -> None:
        self._tokenizer = tokenizer
        backend = tokenizer.backend
        rules = _decoder_rules(backend)
        self._kind, self._strip_first = _recognise(rules)
        self._special = tokenizer.special_ids
        self._piece_of: Callable[[int], str | None] = (
            backend.id_to_token if backend is not None else _no_piece
        )
        self.token_bytes: TokenBytes = self._token_bytes()

    @property
    def special_ids(self) -> frozenset[int]:
        return self._special

    @property
    def byte_level(self) -> bool:
        """True if each character of a vocabulary's entry stands for a byte."""
        return self._kind == "byte_level"

    def detokenizer(
        self, *, skip_special_tokens: bool, shown: frozenset[int] = frozenset()
    ) -> Detokenizer:
        """A new detokenizer for one sequence. `shown`: special tokens that are never skipped."""
        skipped = self._special - shown if skip_special_tokens else frozenset()
        if self._kind == "byte_level":
            return ByteLevelDetokenizer(self.token_bytes, skipped)
        if self._kind == "sentencepiece":
            return SentencePieceDetokenizer(self._piece_of, skipped, self._strip_first)
        return WindowDetokenizer(self._window_decode(skipped))

    def _token_bytes(self) -> TokenBytes:
        if self._kind == "byte_level":
            return ByteLevelPieces(self._piece_of)
        if self._kind == "sentencepiece":
            return SentencePiecePieces(self._piece_of)
        return WindowPieces(self._window_decode(frozenset()))

    def _window_decode(self, skipped: frozenset[int]) -> Callable[[Sequence[int]], str]:
        def decode(ids: Sequence[int]) -> str:
            return self._tokenizer.decode([token for token in ids if token not in skipped])

        return decode


def _no_piece(_token_id: int) -> None:
    return None


def _decoder_rules(backend: Any) -> dict[str, Any]:
    decoder = getattr(backend, "decoder", None)
    if decoder is None:
        return {}
    rules = json.loads(decoder.__getstate__())
    return rules if isinstance(rules, dict) else {}


_SPACES = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
_SENTENCEPIECE = [_SPACES, {"type": "ByteFallback"}, {"type": "Fuse"}]
_STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}


def _recognise(rules: dict[str, Any]) -> tuple[str, bool]:
    """The strategy for a decoder, and true if it strips the text's first space."""
    if rules.get("type") == "ByteLevel":
        return "byte_level", False
    steps = rules.get("decoders", [])
    if steps == _SENTENCEPIECE:
        return "sentencepiece", False
    if steps == [*_SENTENCEPIECE, _STRIP]:
        return "sentencepiece", True
    return "window", False
