"""Errors of constraints that can't be compiled, for the API and the engine process."""

from __future__ import annotations

NO_TOKENIZER = "the model's tokenizer is none of the `tokenizers` library"


class ConstraintError(ValueError):
    """A schema, regular expression or grammar can't be compiled; the message says why."""
