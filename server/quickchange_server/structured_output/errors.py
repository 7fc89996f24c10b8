"""What both sides of the channel raise for a constraint that can't be."""

from __future__ import annotations

NO_TOKENIZER = "the model's tokenizer is none of the `tokenizers` library"


class ConstraintError(ValueError):
    """A schema, a regular expression or a grammar that can't be compiled; the message says why."""
