"""Virtual tokens that an adapter puts in front of every text: a prompt of trained numbers.

In one of two forms. "embeddings" [P, H] take the place of what the input embedding gives for P
tokens (prompt tuning, P-tuning, CPT). "cache" [layers, 2, KV heads, P, head size] is keys and
values that each layer attends to as if P tokens had left them (prefix tuning, cartridges).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from quickchange_store.errors import InvalidAdapterError

if TYPE_CHECKING:  # names and digests are useful without torch
    import torch

PromptForm = Literal["embeddings", "cache"]
PROMPT_FORMS: tuple[PromptForm, ...] = get_args(PromptForm)
MAX_VIRTUAL_TOKENS = 1 << 17
VALUES = "prompt.values"  # tensor in the canonical bytes
_AXES = {"embeddings": "[tokens, hidden]", "cache": "[layers, 2, KV heads, tokens, head size]"}


@dataclass(frozen=True, eq=False)
class VirtualPrompt:
    """The values of the virtual tokens, in the dtype in which they were trained.

    values: [P, H], or [layers, 2, KV heads, P, head size]: keys, then values, as they stand in a
    cache behind the model's own norms and rotations. Raises InvalidAdapterError.
    """

    form: PromptForm
    values: torch.Tensor

    def __post_init__(self) -> None:
        if self.form not in PROMPT_FORMS:
            raise InvalidAdapterError(
                f"virtual tokens of the form {self.form!r}",
                key="form",
                remedy=f"use one of {', '.join(PROMPT_FORMS)}",
            )
        shape = list(self.values.shape)
        wanted = _AXES[self.form]
        fits = len(shape) == wanted.count(",") + 1 and all(shape)
        if not fits or (self.form == "cache" and shape[1] != 2):
            raise InvalidAdapterError(
                f"virtual tokens of shape {shape}", key=VALUES, remedy=f"they must be {wanted}"
            )
        if self.tokens > MAX_VIRTUAL_TOKENS:
            raise InvalidAdapterError(
                f"{self.tokens} virtual tokens",
                key=VALUES,
                remedy=f"give at most {MAX_VIRTUAL_TOKENS}",
            )

    @property
    def tokens(self) -> int:
        """Number of virtual tokens, P."""
        return int(self.values.shape[0 if self.form == "embeddings" else 3])

    @property
    def kind(self) -> str:
        """The usual name of adapters of this form."""
        return "prompt tuning" if self.form == "embeddings" else "prefix tuning"

    def encode(self) -> dict[str, Any]:
        return {"form": self.form}

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        return {VALUES: self.values}


def assemble_prompt(entry: Any, tensors: Callable[[str], torch.Tensor]) -> VirtualPrompt:
    """The virtual tokens of a header's entry. Raises InvalidAdapterError, KeyError, TypeError."""
    return VirtualPrompt(entry["form"], tensors(VALUES))
