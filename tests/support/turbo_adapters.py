"""Random Turbo heads, and what they draft by their formulas in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from quickchange_store.canonical.canonical_adapter import CanonicalAdapter, LowRankUpdate
from quickchange_store.canonical.turbo_part import DraftBlock, TurboHeads


def make_turbo(
    hidden: int,
    depth: int,
    *,
    blocks_a_head: int = 1,
    sequential: bool = False,
    shared: bool = False,
    vocabulary: Sequence[int] | None = None,
    own_outputs: int = 0,
    seed: int = 0,
) -> TurboHeads:
    """Heads with random weights. shared: all heads are the same blocks. own_outputs: tokens that
    each head's own LM head knows; 0: the heads have none."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.2

    chains = 1 if shared else depth
    blocks = [
        DraftBlock(normal(hidden, hidden * (2 if sequential and level == 0 else 1)), normal(hidden))
        for _ in range(chains)
        for level in range(blocks_a_head)
    ]
    chain = [tuple(range(i * blocks_a_head, (i + 1) * blocks_a_head)) for i in range(chains)]
    return TurboHeads(
        blocks=tuple(blocks),
        heads=tuple(chain * depth if shared else chain),
        sequential=sequential,
        vocabulary=None if vocabulary is None else torch.tensor(vocabulary, dtype=torch.int32),
        outputs=tuple(normal(own_outputs, hidden) for _ in range(depth if own_outputs else 0)),
    )


def turbo_adapter(turbo: TurboHeads, **updates: LowRankUpdate) -> CanonicalAdapter:
    """An adapter of heads, and of updates by their modules' paths (dots written as __)."""
    named = {path.replace("__", "."): update for path, update in updates.items()}
    return CanonicalAdapter("Tiny", "tiny", named, turbo=turbo)


def drafts_by_formula(
    turbo: TurboHeads,
    x: Tensor,
    token: int,
    depth: int,
    embed: Callable[[int], Tensor],
    logits: Callable[[Tensor], Tensor],
) -> list[Tensor]:
    """The softmax of each of `depth` heads' logits over all tokens of the model, float64 [V]: zero
    for those that can't be drafted.

    x [H]: what entered the LM head. embed: a token's input embedding [H]. logits: the LM head's
    [V] of a state [H], with what the request's adapters add.
    """
    found: list[Tensor] = []
    state = x.double()
    for index in range(depth):
        state = state if turbo.sequential else x.double()
        for block in (turbo.blocks[number] for number in turbo.heads[index]):
            z = torch.cat([state, embed(token).double()]) if block.reads_embedding else state
            a = block.weight.double() @ z + block.bias.double()
            state = state + a * torch.sigmoid(a)
        over_all = logits(state)
        own = turbo.outputs[index].double() @ state if turbo.outputs else None
        columns = torch.arange(len(over_all) if own is None else len(own))
        if turbo.vocabulary is not None:
            columns = turbo.vocabulary.long()
        masked = torch.full_like(over_all, float("-inf"))
        masked[columns] = over_all[columns] if own is None else own
        found.append(masked.softmax(0))
        token = int(masked.argmax())
    return found
