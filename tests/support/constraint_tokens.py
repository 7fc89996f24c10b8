"""The tiny turbo model's 29 tokens as text, so that small schemas can be written with them."""

from __future__ import annotations

from text_of_pieces import text_of_pieces

from quickchange_server.frontend.tokenizer import Text
from quickchange_server.structured_output.grammar import TokenGrammars

END = 28
PIECES = (
    '{', '}', '[', ']', ':', ',', '"', ' ', 'a', 'b', 'c', '0', '1', '2', '5', '-', '.',
    'true', 'false', 'null', '{"', '":', '",', '"a', 'ab', '12', '"}', 'e', '<end>',
)  # fmt: skip


def tiny_text() -> Text:
    """A byte-level tokenizer of these pieces; ids 0 to 28, the last of them the end."""
    return text_of_pieces(PIECES, END)


def tiny_grammars() -> TokenGrammars:
    return TokenGrammars.of(tiny_text())


def written(tokens: list[int]) -> str:
    """What tokens say, the end left out."""
    return "".join(PIECES[token] for token in tokens if token != END)
