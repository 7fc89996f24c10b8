"""Drafts tokens with Turbo heads, for any mix of sequences with different heads in one call.

For an item whose sequence's hidden state is x and whose certain next token is t, head d gives

    parallel     h = blocks_d(x)                 block: h + SiLU(W h + b)
    sequential   h = blocks_d([h; e(t)])         h from the head before (at first x); e(t) the input
                 t = the best token of its logits    embedding, which the first block reads beside h

and its logits are the LM head's of h, with what the request's adapters add there, over the heads'
vocabulary where they have one; or those of the head's own LM head. The embedding is that of the
base model's input embedding module (with its scale, if the module has one), without any adapter's
update: heads are trained on it as it is. A scale or cap behind the LM head keeps the order of the
logits, so it is left out: the tokens are the same, and the chances are those of the bare logits.
Temperature plays no role: drafts are guesses, and the sampler decides.

All is computed on the device; no value comes to the host meanwhile, unless there is a guide.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from quickchange_kernels.lowrank.lowrank_contract import lowrank_
from quickchange_kernels.turbo_heads.draft_logits import draft_logits
from quickchange_kernels.turbo_heads.turbo_heads_contract import head_logits, turbo_heads
from quickchange_server.model.adapter_layers import (
    AdaptedEmbedding,
    AdaptedLinear,
    BaseLinear,
    PackedLinear,
)
from quickchange_server.model.input_buffers import Download, upload
from quickchange_server.model.loading.model_loader import LoadedModel
from quickchange_server.model.loading.spare_tokens import fence_
from quickchange_server.spec_decode.draft_head_plan import (
    Beginning,
    Columns,
    DraftChoice,
    DraftItem,
    DraftPlan,
    HeadAdapters,
    HeadFacts,
    ModuleLogits,
    OwnLogits,
    Planner,
    Round,
    SubsetLogits,
)

__all__ = ["DraftItem", "Drafts", "HeadAdapters", "HeadDrafter"]


class Drafts(NamedTuple):
    """Each head's best token, by item and depth; token 0 with chance 0 where there is none."""

    tokens: Tensor  # int64 [I, depth]; depth: the largest that an item asked for
    chances: Tensor  # float32 [I, depth] softmax of the head's logits, over its vocabulary


class Guide(Protocol):
    """Revises the heads' drafts, depth by depth."""

    def begin(self, tokens: Sequence[int], accepted: Sequence[int]) -> None:
        """Take the certain next token of each item, and how many drafts before it were accepted."""
        ...

    def revise(self, tokens: Sequence[int], chances: Sequence[float]) -> list[int]:
        """Drafts of each item at the next depth, given the heads' best tokens and chances."""
        ...


class HeadDrafter:
    """Drafts with heads over one model's LM head and embedding. No state between calls."""

    def __init__(self, model: LoadedModel, device: torch.device) -> None:
        head, embedding = model.head, model.embedding
        self._device = device
        self._own_vocabulary = model.own_vocabulary
        self.waits = 0  # times that the host has waited for the device, for guides
        self._group = head.group.index if isinstance(head, AdaptedLinear) else None
        self._head = head.base if isinstance(head, AdaptedLinear) else head
        base = self._head
        self._rows = VocabularyRows(base) if isinstance(base, BaseLinear | PackedLinear) else None
        self._embedding = embedding.base if isinstance(embedding, AdaptedEmbedding) else embedding

    @property
    def facts(self) -> HeadFacts:
        return HeadFacts(plain=self._rows is not None, group=self._group)

    def plan(self, items: Sequence[DraftItem], adapters: HeadAdapters, rows: int) -> DraftPlan:
        """Plan drafts of `items` (one at least) from so many rows of hidden states, on the host.

        Raises ValueError for a slot without heads, and for a depth that its heads don't have.
        """
        planner = Planner(items, adapters, self.facts, rows, self._device)
        return DraftPlan(items, planner.rounds(), planner.vocabularies, planner.depth)

    @torch.inference_mode()
    def draft(
        self,
        hidden: Tensor,
        tokens: Tensor,
        items: Sequence[DraftItem],
        adapters: HeadAdapters,
        *,
        guide: Guide | None = None,
    ) -> Drafts:
        """Drafts of `items`, planned and computed."""
        plan = self.plan(items, adapters, hidden.shape[0])
        return self.run(
            plan, upload(plan.rounds, self._device), hidden, tokens, adapters, guide=guide
        )

    @torch.inference_mode()
    def run(
        self,
        plan: DraftPlan,
        rounds: Sequence[Round],
        hidden: Tensor,
        tokens: Tensor,
        adapters: HeadAdapters,
        *,
        accepted: Tensor | None = None,
        guide: Guide | None = None,
    ) -> Drafts:
        """The planned drafts. rounds: the plan's, on the device.

        hidden [n, H]: what entered the LM head. tokens int64 [n]: each row's certain next token.
        accepted int32 [n]: drafts accepted before it, for the guide; None: there were no drafts.
        Sequential heads follow their best tokens, or what `guide` puts in their place: for it alone
        the host waits, for the certain tokens and at every depth (`waits` counts). An item's drafts
        do not depend on the others.
        """
        call = DraftCall(plan.vocabularies, adapters, tokens, (len(plan.items), plan.depth))
        if guide is not None:
            known = (tokens,) if accepted is None else (tokens, accepted)
            certain, *held = [part.tolist() for part in call.on_host(known)]
            rows = [item.row for item in plan.items]
            before = held[0] if held else [0] * len(certain)
            guide.begin([certain[row] for row in rows], [before[row] for row in rows])
        drafts = self.compute(rounds, hidden, call, guide)
        self.waits += call.waits
        return drafts

    def compute(
        self, rounds: Sequence[Round], hidden: Tensor, call: DraftCall, guide: Guide | None = None
    ) -> Drafts:
        """The device's part of `draft`. All tensors are on the device."""
        states = hidden
        for number, part in enumerate(rounds):
            states = self._states(part, hidden, states, call, first=number == 0)
            if part.module is not None:
                self._through_module(part.module, states, call)
            if part.subset is not None and self._rows is not None:
                _over_subset(part.subset, self._rows, states, call)
            for own in part.own:
                _through_own(own, states, call)
            if guide is not None:
                call.revise(number, guide)
        if guide is not None:
            for number in range(len(rounds), call.depth):
                call.revise(number, guide)
        return call.drafts

    def _states(
        self, part: Round, hidden: Tensor, before: Tensor, call: DraftCall, *, first: bool
    ) -> Tensor:
        """States [rows of the round, H] behind the heads' last blocks."""
        heads = call.adapters.heads
        states: list[Tensor] = []
        if part.parallel is not None:
            states.append(turbo_heads(hidden, hidden, heads, part.parallel))
        if part.sequential is not None:
            tokens = call.certain if first else call.best
            states.append(self._begin(part.sequential, before, tokens, call))
        found = states[0] if len(states) == 1 else torch.cat(states)
        for level in part.levels:
            out = turbo_heads(found, found, heads, level.items)
            found = out if level.rows is None else found.index_copy(0, level.rows, out)
        return found

    def _begin(self, begin: Beginning, before: Tensor, tokens: Tensor, call: DraftCall) -> Tensor:
        """States [S, H] behind the first blocks of sequential heads."""
        x = _chosen(before, begin.states)
        embedded: Tensor = self._embedding(tokens.index_select(0, begin.tokens))
        z = torch.cat([x, embedded.to(x.dtype)], dim=1)
        return turbo_heads(x, z, call.adapters.heads, begin.items)

    def _through_module(self, part: ModuleLogits, states: Tensor, call: DraftCall) -> None:
        rows = _chosen(states, part.rows)
        logits: Tensor = self._head(rows)
        if part.segments is not None and self._group is not None:
            lowrank_(logits, rows, call.adapters.wide_tables, part.segments, self._group)
        tokens = None if part.segments is None else call.adapters.wide_tables.tokens
        fence_(logits, self._own_vocabulary, part.segments, tokens)
        over_all = 0
        if part.over_all is not None:
            over_all = part.over_all.places.shape[0]
            call.choose(logits[:over_all], part.over_all)
        if part.over_columns is not None and part.columns is not None:
            picked = call.columns(logits[over_all:], part.over_columns, part.columns)
            call.choose(picked, part.over_columns)


class DraftCall:
    """Inputs of one call of `draft`, and its drafts as they come."""

    def __init__(
        self,
        vocabularies: Sequence[Tensor],
        adapters: HeadAdapters,
        certain: Tensor,
        shape: tuple[int, int],
    ) -> None:
        device = certain.device
        self.adapters = adapters
        self.waits = 0
        self.certain = certain  # int64 [n]
        self.vocabulary = torch.cat([certain.new_empty(0, dtype=torch.int32), *vocabularies])
        self.drafts = Drafts(
            torch.zeros(shape, dtype=torch.int64, device=device),
            torch.zeros(shape, dtype=torch.float32, device=device),
        )

    @property
    def depth(self) -> int:
        return self.drafts.tokens.shape[1]

    def revise(self, number: int, guide: Guide) -> None:
        """Let `guide` revise the drafts at depth `number` (from 0)."""
        tokens, chances = (part[:, number] for part in self.drafts)
        at_host = self.on_host((tokens, chances))
        before = at_host[0].tolist()
        after = guide.revise(before, at_host[1].tolist())
        if after != before:
            (revised,) = upload((torch.tensor(after),), tokens.device)
            tokens.copy_(revised)

    def on_host(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The tensors' values, for which the host waits."""
        self.waits += 1
        return Download(tensors, self.certain.device).tree()

    @property
    def best(self) -> Tensor:
        """Drafts so far: int64 [items · depth]."""
        return self.drafts.tokens.view(-1)

    def columns(self, logits: Tensor, choice: DraftChoice, columns: Columns) -> Tensor:
        """Columns [m, width] of the rows' vocabularies in [m, V]; -inf behind the shorter ones."""
        number = torch.arange(columns.width, device=logits.device)
        absent = number >= columns.size[:, None]
        return logits.gather(1, self._named(choice, number)).masked_fill(absent, float("-inf"))

    def choose(self, logits: Tensor, choice: DraftChoice) -> None:
        """Keep the best tokens of logits [m, columns] as drafts at the choice's places."""
        logits = logits.float()
        value, index = logits.max(1, keepdim=True)
        chances = (value - logits.logsumexp(1, keepdim=True)).exp().squeeze(1)
        chances = chances.nan_to_num(0.0)  # heads whose numbers overflow draft nothing worth a row
        tokens = self._named(choice, index).squeeze(1)
        self.best.index_copy_(0, choice.places, tokens)
        self.drafts.chances.view(-1).index_copy_(0, choice.places, chances)

    def _named(self, choice: DraftChoice, columns: Tensor) -> Tensor:
        """Token ids int64 [m, k] of columns [m, k] or [k]."""
        if choice.first is None:
            return columns
        # Columns behind a vocabulary's end are never chosen: any token may stand there.
        at = (choice.first[:, None] + columns).clamp(max=self.vocabulary.shape[0] - 1)
        return self.vocabulary[at].long()


class VocabularyRows:
    """Rows of a plain LM head, by token.

    Those of a packed one are copied out of its panels when a vocabulary first names them and stay,
    once for all vocabularies: at most as many bytes as the head has.
    """

    def __init__(self, head: BaseLinear | PackedLinear) -> None:
        self._head = head
        self._weight: Tensor = head.weight
        self._bias: Tensor | None = head.bias
        self._place: Tensor | None = None  # int32 [V] each token's row of them; -1: none yet
        if isinstance(head, PackedLinear):
            self._weight = head.weight[:0]
            self._bias = None if head.bias is None else head.bias[:0]
            self._place = torch.full((len(head.weight),), -1, dtype=torch.int32)

    def of(self, tokens: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Rows [n, H], their biases [n], and which of them are those of `tokens`: int32 [S]."""
        if not isinstance(self._head, PackedLinear) or self._place is None:
            return self._weight, self._bias, tokens
        places = self._place.index_select(0, tokens)
        if places.numel() and int(places.min()) < 0:
            new = torch.unique(tokens[places < 0].long())
            self._place[new] = torch.arange(len(new), dtype=torch.int32) + len(self._weight)
            self._weight = torch.cat([self._weight, self._head.rows(new)])
            if self._bias is not None:
                self._bias = torch.cat([self._bias, self._head.bias[new]])
            places = self._place.index_select(0, tokens)
        return self._weight, self._bias, places


def _over_subset(part: SubsetLogits, head: VocabularyRows, states: Tensor, call: DraftCall) -> None:
    rows = _chosen(states, part.rows)
    weight, bias, vocabulary = head.of(call.vocabulary)
    logits = draft_logits(rows, weight, vocabulary, part.segments, part.width, bias)
    call.choose(logits, part.choice)


def _through_own(part: OwnLogits, states: Tensor, call: DraftCall) -> None:
    logits = head_logits(states, call.adapters.heads, part.items, part.width)
    call.choose(logits, part.choice)


def _chosen(rows: Tensor, which: Tensor | None) -> Tensor:
    return rows if which is None else rows.index_select(0, which)
