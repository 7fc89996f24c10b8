"""Turbo heads in an adapter's canonical bytes: their tensors and their entry in the header.

Equal heads give equal bytes, however they were put together: equal blocks are stored once and
numbered in the order in which the heads first use them, blocks that no head uses are left out, and
equal LM heads are stored once too. Knows nothing of files: `canonical_adapter` writes the bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quickchange_store.canonical.turbo_part import DraftBlock, TurboHeads

if TYPE_CHECKING:
    import torch

VOCABULARY = "turbo.vocabulary"


@dataclass(frozen=True)
class TurboLayout:
    """The header's entry: the blocks and the LM head of each head."""

    heads: tuple[tuple[int, ...], ...]
    outputs: tuple[int, ...]  # number of each head's own LM head; or empty
    sequential: bool
    vocabulary: bool  # True: only the listed tokens are drafted
    tenant: str | None = None  # the only one that they draft for

    def encode(self) -> dict[str, Any]:
        return {
            "heads": [list(head) for head in self.heads],
            "outputs": list(self.outputs),
            "sequential": self.sequential,
            "vocabulary": self.vocabulary,
            **({} if self.tenant is None else {"tenant": self.tenant}),
        }

    @classmethod
    def decode(cls, tree: Mapping[str, Any]) -> TurboLayout:
        """Parse the entry. Raises KeyError, TypeError or ValueError where it is damaged."""
        return cls(
            heads=tuple(tuple(map(_number, head)) for head in tree["heads"]),
            outputs=tuple(map(_number, tree["outputs"])),
            sequential=bool(tree["sequential"]),
            vocabulary=bool(tree["vocabulary"]),
            tenant=_tenant(tree.get("tenant")),
        )


def parts(turbo: TurboHeads) -> tuple[TurboLayout, dict[str, torch.Tensor]]:
    """The heads in their one form: the header's entry, and their tensors by name."""
    blocks, block_numbers = _shared(
        [(turbo.blocks[i].weight, turbo.blocks[i].bias) for head in turbo.heads for i in head]
    )
    outputs, output_numbers = _shared([(output,) for output in turbo.outputs])
    numbers = iter(block_numbers)
    layout = TurboLayout(
        heads=tuple(tuple(next(numbers) for _ in head) for head in turbo.heads),
        outputs=tuple(output_numbers),
        sequential=turbo.sequential,
        vocabulary=turbo.vocabulary is not None,
        tenant=turbo.tenant,
    )
    tensors: dict[str, torch.Tensor] = {}
    for number, (weight, bias) in enumerate(blocks):
        tensors[_weight(number)], tensors[_bias(number)] = weight, bias
    for number, (output,) in enumerate(outputs):
        tensors[_output(number)] = output
    if turbo.vocabulary is not None:
        tensors[VOCABULARY] = turbo.vocabulary
    return layout, tensors


def assemble(layout: TurboLayout, tensor: Callable[[str], torch.Tensor]) -> TurboHeads:
    """Heads from their layout and tensors by name. Raises InvalidAdapterError."""
    used = sorted({index for head in layout.heads for index in head})
    outputs = {i: tensor(_output(i)) for i in set(layout.outputs)}
    return TurboHeads(
        blocks=tuple(DraftBlock(tensor(_weight(i)), tensor(_bias(i))) for i in used),
        heads=layout.heads,
        sequential=layout.sequential,
        vocabulary=tensor(VOCABULARY) if layout.vocabulary else None,
        outputs=tuple(outputs[i] for i in layout.outputs),
        tenant=layout.tenant,
    )


def shared(turbo: TurboHeads) -> TurboHeads:
    """The same heads with equal blocks and equal LM heads held once."""
    layout, tensors = parts(turbo)
    return assemble(layout, tensors.__getitem__)


def parameters(turbo: TurboHeads) -> int:
    """Number of trained values; shared blocks and LM heads count once."""
    return sum(t.numel() for name, t in parts(turbo)[1].items() if name != VOCABULARY)


def _shared(
    items: Sequence[tuple[torch.Tensor, ...]],
) -> tuple[list[tuple[torch.Tensor, ...]], list[int]]:
    """The distinct items in order of first appearance, and each item's number among them."""
    distinct: list[tuple[torch.Tensor, ...]] = []
    numbers = []
    for item in items:
        known = (n for n, other in enumerate(distinct) if all(map(_same, other, item)))
        number = next(known, len(distinct))
        if number == len(distinct):
            distinct.append(item)
        numbers.append(number)
    return distinct, numbers


def _same(left: torch.Tensor, right: torch.Tensor) -> bool:
    """True if two tensors are the same bytes: a zero and its negative differ."""
    import torch

    if left is right:
        return True
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    return torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (left, right)))


def _number(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} is not a number from 0")
    return value


def _tenant(value: object) -> str | None:
    if value is not None and (not isinstance(value, str) or not value):
        raise ValueError(f"{value!r} is not a tenant's name")
    return value


def _weight(number: int) -> str:
    return f"turbo.block.{number}.weight"


def _bias(number: int) -> str:
    return f"turbo.block.{number}.bias"


def _output(number: int) -> str:
    return f"turbo.output.{number}"
