"""A byte-level tokenizer whose vocabulary is just what it is given."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from quickchange_server.frontend.detokenizer import byte_level_alphabet
from quickchange_server.frontend.encoding.foreign_tokenizer import model_tokenizer
from quickchange_server.frontend.tokenizer import Text


def tokenizer_of_pieces(pieces: Sequence[str], end: int) -> PreTrainedTokenizerFast:
    """pieces: in order of their ids; the one at `end` is special. Encodes poorly: has no merges."""
    alphabet = {byte: mark for mark, byte in byte_level_alphabet().items()}
    names = [
        piece if i == end else "".join(alphabet[byte] for byte in piece.encode())
        for i, piece in enumerate(pieces)
    ]
    backend = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(pieces[end], special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=pieces[end])


def text_of_pieces(pieces: Sequence[str], end: int) -> Text:
    """What the server knows of a model with that tokenizer."""
    tokenizer = tokenizer_of_pieces(pieces, end)
    return Text(model_tokenizer(tokenizer), vocab_size=len(pieces), eos_ids=frozenset({end}))
