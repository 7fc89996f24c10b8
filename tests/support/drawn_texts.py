"""Texts drawn at random from a grammar's masks, byte by byte, as a model without sense would."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
from text_support import END, byte_tokenizer

from quickchange_server.errors import InvalidRequestError
from quickchange_server.frontend.encoding.foreign_tokenizer import model_tokenizer
from quickchange_server.frontend.tokenizer import Text
from quickchange_server.protocol import Constraint
from quickchange_server.structured_output.compiler import Masked
from quickchange_server.structured_output.errors import ConstraintError
from quickchange_server.structured_output.grammar import LibraryMatcher, TokenGrammars
from quickchange_server.structured_output.schema_keywords import check_schema

LONGEST = 400  # tokens of a drawn text
PADDED = 300  # the model's vocabulary: the tokenizer has 258
GRAMMARS = TokenGrammars.of(
    Text(model_tokenizer(byte_tokenizer()), vocab_size=PADDED, eos_ids=frozenset({END}))
)
_CLOSERS = [byte for byte in b'"}],:0' for _ in range(3)]


def compiled(schema: Any) -> LibraryMatcher | None:
    """The matcher of a schema; None if it is refused, at a place inside."""
    try:
        check_schema(schema, "schema")
        return GRAMMARS.compile(Constraint("json_schema", json.dumps(schema)))
    except InvalidRequestError as error:
        if not (error.param or "").startswith("schema"):
            raise AssertionError("the refusal names no place in the schema") from error
    except ConstraintError:
        pass
    return None


def allowed(matcher: LibraryMatcher) -> list[int]:
    """Token ids that may follow."""
    bits = np.zeros((1, -(-PADDED // 32)), dtype=np.int32)
    GRAMMARS.fill([Masked(matcher, 0, ())], bits)
    return np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little")).tolist()


def drawn(matcher: LibraryMatcher, seed: int) -> bytes | None:
    """A random text that the grammar accepts; None where it does not end in time."""
    dice = random.Random(seed)
    written = bytearray()
    while len(written) < LONGEST:
        if matcher.complete:
            return bytes(written)
        can = allowed(matcher)
        assert can, "nothing may follow"
        assert max(can) <= END, "a token that the tokenizer lacks"
        closing = [token for token in _CLOSERS if token in can]
        token = dice.choice(closing if closing and dice.random() < 0.5 else can)
        if token == END:
            return bytes(written)
        written.append(token)
        matcher.advance(token)
        assert matcher.error is None
    return None
