"""Rules of a grammar in llguidance's Lark: literal text with special tokens, JSON, names."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from quickchange_server.frontend.parsing.tool_forms import OWN
from quickchange_server.frontend.tokenizer import Text
from quickchange_server.structured_output.grammar import JSON_FORM

BLANKS = "BLANKS: /[ \\n]{1,2}/\n"
_OWN = "/[a-zA-Z0-9_-]{1,24}/"  # an id of a call


class LarkRules:
    """The rules that a grammar consists of, as they are added."""

    def __init__(self, text: Text) -> None:
        self._text = text
        self._rules: dict[str, str] = {}

    def add(self, body: str, *, terminal: bool = False) -> str:
        """Add a rule, or a terminal, and return its name."""
        name = f"{'T' if terminal else 'r'}{len(self._rules)}"
        self._rules[name] = body
        return name

    def source(self, start: str, *more: str) -> str:
        """The grammar's source."""
        rules = [f"{name}: {body}" for name, body in self._rules.items()]
        return "\n".join([f"start: {start}", *more, *rules, BLANKS])

    def literal(self, text: str) -> str:
        """A literal text: special tokens by their ids, and ids of calls as any."""
        pieces: list[str] = []
        for index, part in enumerate(text.split(OWN)):
            if index:
                pieces.append(_OWN)
            pieces.append(lark_marks(self._text.special_parts(part)))
        return " ".join(piece for piece in pieces if piece)

    def begins_special(self, text: str) -> bool:
        """True if a text begins with a special token."""
        parts = self._text.special_parts(text)
        return bool(parts) and isinstance(parts[0], int)


def lark_marks(parts: Sequence[str | int]) -> str:
    """Parts of a text in Lark's syntax, special tokens by their ids."""
    return " ".join(
        f"<[{part}]>" if isinstance(part, int) else json.dumps(part, ensure_ascii=False)
        for part in parts
    )


def lark_mark(text: Text, mark: str) -> str:
    """A mark in Lark's syntax."""
    return lark_marks(text.special_parts(mark))


def json_rule(schema: Mapping[str, Any]) -> str:
    """JSON of a schema, in Lark's syntax."""
    return f"%json {json.dumps({**schema, 'x-guidance': JSON_FORM})}"


def pattern(regex: str) -> str:
    """A regular expression in Lark's syntax."""
    return "/" + re.sub(r"(?<!\\)((?:\\\\)*)/", r"\1\\/", regex) + "/"
