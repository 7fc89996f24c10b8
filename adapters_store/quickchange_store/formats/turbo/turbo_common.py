"""Configuration, files and LM head checks that the readers of Turbo heads share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from quickchange_store.canonical.canonical_adapter import BaseSpec
from quickchange_store.errors import BaseMismatchError, InvalidAdapterError
from quickchange_store.formats.config_file import BASE_NAME
from quickchange_store.formats.tensors import AdapterTensors

if TYPE_CHECKING:
    import torch

    from quickchange_store.canonical.turbo_part import TurboHeads

HEADS_CONFIG_FILE = "config.json"
HEADS_FILE = "medusa_lm_head.safetensors"
MAX_HEADS = 64  # heads, and blocks of one; more than five seldom pay


@dataclass(frozen=True)
class ImportedHeads:
    """Turbo heads as read, with their source and warnings for their owner."""

    heads: TurboHeads
    base_name: str
    source: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class LmHead:
    """The base model's LM head, which the shapes of heads are checked against."""

    module: str
    hidden: int
    vocabulary: int

    @classmethod
    def of(cls, base: BaseSpec) -> LmHead:
        """The LM head of `base`. Raises BaseMismatchError where it is no linear module."""
        shape = base.head
        if base.output_head is None or shape is None:
            raise BaseMismatchError(
                f"the base model {base.architecture} has no linear LM head, which Turbo heads need",
                file=HEADS_CONFIG_FILE,
                remedy="serve the heads on a causal language model with a linear LM head",
            )
        return cls(base.output_head, shape.in_features, shape.out_features)

    def take_block(
        self, tensors: AdapterTensors, prefix: str, *, reads_embedding: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take `{prefix}.weight` [H, H], or [H, 2 H], and `{prefix}.bias` [H]."""
        width = 2 * self.hidden if reads_embedding else self.hidden
        weight = tensors.take_shaped(f"{prefix}.weight", self.module, (self.hidden, width))
        return weight, tensors.take_shaped(f"{prefix}.bias", self.module, (self.hidden,))

    def take_tokens(self, tensors: AdapterTensors, key: str) -> torch.Tensor:
        """Take distinct tokens of the base's vocabulary, int64 [D] in the file's order."""
        tokens = tensors.take_integers(key)
        inside = bool(((tokens >= 0) & (tokens < self.vocabulary)).all())
        if (
            tokens.ndim != 1
            or not len(tokens)
            or not inside
            or len(set(tokens.tolist())) < len(tokens)
        ):
            raise InvalidAdapterError(
                f"{list(tokens.shape)} is no list of distinct tokens of the base model's "
                f"{self.vocabulary}",
                file=tensors.file_of(key),
                key=key,
                remedy="list each drafted token once, from 0 to the vocabulary's size less 1",
            )
        return tokens.long()


def is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def count(config: Mapping[str, Any], names: tuple[str, ...], default: int | None = None) -> int:
    """A whole number from 1 under the first of `names` that there is."""
    name = next((name for name in names if config.get(name) is not None), names[0])
    value = config.get(name)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_HEADS:
        raise InvalidAdapterError(
            f"{value!r} is not a whole number from 1 to {MAX_HEADS}",
            file=HEADS_CONFIG_FILE,
            key=name,
            remedy="set it to what the heads were trained with",
        )
    return int(value)


def refuse_left(tensors: AdapterTensors, expected: str) -> None:
    """Refuse tensors that nothing asked for; `expected` says which there should be."""
    if tensors.left:
        key = min(tensors.left)
        more = f" ({len(tensors.left) - 1} more like it)" if len(tensors.left) > 1 else ""
        raise InvalidAdapterError(
            f"the tensor is not expected{more}: {HEADS_CONFIG_FILE} asks for {expected}",
            file=tensors.file_of(key),
            key=key,
            remedy=f"correct {HEADS_CONFIG_FILE}, or save the heads again",
        )


def base_name(config: Mapping[str, Any]) -> str:
    return str(config.get(BASE_NAME) or "")


def plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields other than null, as plain data."""
    return {key: value for key, value in config.items() if value is not None}
