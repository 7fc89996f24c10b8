"""Parts of an adapter beside its updates and heads, each with an entry in the canonical bytes.

A part's entry is plain JSON, its tensors are named after it. A reader that does not know a part
refuses the whole file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from quickchange_store.canonical.composition_part import Composition, Term
from quickchange_store.canonical.prompt_part import assemble_prompt
from quickchange_store.canonical.tokenizer_part import TokenizerChanges
from quickchange_store.errors import InvalidAdapterError

if TYPE_CHECKING:  # names and digests are useful without torch
    import torch

MAX_INVOCATION = 4096  # tokens


class StoredPart(Protocol):
    """What the canonical bytes ask of a part."""

    def encode(self) -> Any:
        """The part's entry in the header: plain JSON, a pure function of what it computes."""
        ...

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        """Its tensors by their stored names, which begin with the part's name and a dot."""
        ...


@dataclass(frozen=True)
class Invocation:
    """The tokens behind which an activated LoRA begins: aLoRA, Greenewald et al. 2025.

    The adapter serves the text from the first of these tokens on, where they stand last in the
    prompt; a prompt without them is served by the base. Raises InvalidAdapterError.
    """

    tokens: tuple[int, ...]

    def __post_init__(self) -> None:
        whole = all(isinstance(t, int) and 0 <= t < 2**31 for t in self.tokens)
        if not whole or not 1 <= len(self.tokens) <= MAX_INVOCATION:
            raise InvalidAdapterError(
                f"{len(self.tokens)} invocation tokens, or one that is no token id",
                key="alora_invocation_tokens",
                remedy=f"give 1 to {MAX_INVOCATION} token ids",
            )

    def encode(self) -> list[int]:
        return list(self.tokens)

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        return {}


Tensors = Callable[[str], "torch.Tensor"]


def _invocation(entry: Any, _tensors: Tensors) -> Invocation:
    return Invocation(tuple(entry))


def _composition(entry: Any, _tensors: Tensors) -> Composition:
    return Composition(tuple(Term(*term) for term in entry))


def _tokenizer(entry: Any, _tensors: Tensors) -> TokenizerChanges:
    return TokenizerChanges.decode(entry)


_READERS: Mapping[str, Callable[[Any, Tensors], StoredPart]] = {
    "composition": _composition,
    "invocation": _invocation,
    "prompt": assemble_prompt,
    "tokenizer": _tokenizer,
}


def assemble(entries: Mapping[str, Any], tensors: Tensors) -> dict[str, Any]:
    """The parts of a file's entries, by name; `tensors` reads the file's tensors.

    Raises InvalidAdapterError for parts that are not known or not whole, and KeyError, TypeError
    or ValueError where an entry is damaged.
    """
    unknown = sorted(entries.keys() - _READERS.keys())
    if unknown:
        raise InvalidAdapterError(
            "this release knows no such part of an adapter",
            key=unknown[0],
            remedy="read it with the release that wrote it, or a later one",
        )
    return {name: _READERS[name](entry, tensors) for name, entry in entries.items()}
