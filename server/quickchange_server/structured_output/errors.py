"""Errors of constraints that can't be compiled, for the API and the engine process."""

from __future__ import annotations

NO_TOKENIZER = "the model's tokenizer is none of the `tokenizers` library"


class ConstraintError(ValueError):
    """A schema, regular expression or grammar can't be compiled; the message says why."""


class ImpossibleSchemaError(ConstraintError):
    """No text satisfies a schema; `path` leads to the part that is to blame."""

    def __init__(self, path: list[str | int], reason: str) -> None:
        super().__init__(reason)
        self.path = path
