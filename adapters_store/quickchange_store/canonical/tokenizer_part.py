"""What an adapter's tokenizer adds to its base's: tokens, marks and ends of texts, a chat template.

It is part of the adapter and its digest, since it decides what text means under it. Knows nothing
of tokenizers' own files: `formats/tokenizer_files.py` reads those.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from quickchange_store.errors import InvalidAdapterError

if TYPE_CHECKING:
    import torch

MOST_TOKENS = 1 << 16  # that an adapter may add
MOST_ROWS = 1 << 24  # of a model's embedding
MOST_TEMPLATE = 1 << 20  # characters
MOST_CONTENT = 1024  # characters of a token
MARKS = ("bos_token", "eos_token")
_FIELD = "added_tokens"


@dataclass(frozen=True)
class AddedToken:
    """A token that stands for its content, whatever is around it: `tokenizers`' AddedToken."""

    id: int
    content: str
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False

    def __post_init__(self) -> None:
        flags = (self.special, self.lstrip, self.rstrip, self.single_word, self.normalized)
        whole = isinstance(self.content, str) and 0 < len(self.content) <= MOST_CONTENT
        whole = whole and type(self.id) is int and 0 <= self.id < MOST_ROWS
        if not whole or not all(type(flag) is bool for flag in flags):
            raise InvalidAdapterError(
                f"{str(self.content)[:40]!r} is no added token",
                key=_FIELD,
                remedy=f"a token has an id, 1 to {MOST_CONTENT} characters, and flags",
            )


@dataclass(frozen=True)
class TokenizerChanges:
    """What an adapter's tokenizer has that the base's has not.

    Raises InvalidAdapterError for parts that do not go together.
    """

    rows: int  # token ids that its model takes and gives, from 0
    tokens: tuple[AddedToken, ...] = ()  # other than the base's of these ids, ascending
    marks: Mapping[str, str] = field(default_factory=dict)  # by tokenizers' names: eos_token, …
    ends: tuple[int, ...] = ()  # ids that end a text beside the base's, ascending
    template: str | None = None  # of chats; None: the base's

    def __post_init__(self) -> None:
        contents = [token.content for token in self.tokens]
        ids = [token.id for token in self.tokens]
        counts = (self.rows, *self.ends)
        if not all(type(each) is int and 0 <= each <= MOST_ROWS for each in counts):
            raise self._wrong(f"{counts} are not all numbers of tokens", "rows")
        ordered = ids == sorted(set(ids)) and len(set(contents)) == len(contents)
        if not ordered or len(contents) > MOST_TOKENS:
            raise self._wrong(f"{len(contents)} tokens, or one twice", _FIELD)
        if ids and ids[-1] >= self.rows:
            raise self._wrong(f"a token of id {ids[-1]}, and {self.rows} rows", _FIELD)
        if any(end >= self.rows for end in self.ends) or sorted(set(self.ends)) != [*self.ends]:
            raise self._wrong(f"the ends {list(self.ends)} of {self.rows} tokens", "eos_token_id")
        marks = {name: mark for name, mark in self.marks.items() if name in MARKS and mark}
        if marks != self.marks or not all(type(mark) is str for mark in marks.values()):
            raise self._wrong(f"the marks {dict(self.marks)}", "special_tokens_map")
        if self.template is not None and not 0 < len(self.template) <= MOST_TEMPLATE:
            raise self._wrong(f"a template of {len(self.template)} characters", "chat_template")

    def _wrong(self, what: str, key: str) -> InvalidAdapterError:
        return InvalidAdapterError(
            f"its tokenizer does not hold together: {what}",
            key=key,
            remedy="save the adapter again with its tokenizer, as it was trained",
        )

    def encode(self) -> dict[str, Any]:
        """The entry in the header of the canonical bytes."""
        return {
            "rows": self.rows,
            "tokens": [asdict(token) for token in self.tokens],
            "marks": dict(self.marks),
            "ends": list(self.ends),
            "template": self.template,
        }

    @classmethod
    def decode(cls, entry: Mapping[str, Any]) -> TokenizerChanges:
        """Parse the entry. Raises InvalidAdapterError, KeyError or TypeError for a damaged one."""
        return cls(
            rows=entry["rows"],
            tokens=tuple(AddedToken(**token) for token in entry["tokens"]),
            marks=dict(entry["marks"]),
            ends=tuple(entry["ends"]),
            template=entry["template"],
        )

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        return {}
