"""Training of Turbo heads on the model's own hidden states and output tokens.

The base model does not run: heads learn from rows of (state, the tokens that came next), with the
base's LM head, cut to the draft vocabulary, behind them. The loss of a head at a row is the
cross-entropy of the token that came, or where the vocabulary lacks that token, with a weight, of a
uniform distribution: a low probability marks an unsure head, whose drafts are then not verified.
Knows nothing of files or of adapters' names.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from quickchange_store.canonical.turbo_part import DraftBlock, TurboHeads
from quickchange_training.adapters.adapter_trainer import lr_share
from quickchange_training.checkpoint import unsaved
from quickchange_training.errors import DataError
from quickchange_training.turbo.turbo_data import ABSENT, OwnOutput, Positions, positions

if TYPE_CHECKING:
    from quickchange_training.checkpoint import Checkpoints
    from quickchange_training.turbo.turbo_recipe import TurboRecipe

_BETAS = (0.9, 0.99)  # second beta below the default, as runs are short
_EVALUATED = 4096  # rows measured at once
_OUTSIDE = -2  # index of a token that the draft vocabulary lacks


@dataclass(frozen=True)
class LossCurve:
    """Loss of each optimizer step, and the seconds that this process spent on them."""

    losses: tuple[float, ...]
    seconds: float

    @property
    def final(self) -> float:
        """Mean over the last tenth of the steps."""
        tail = self.losses[-max(1, len(self.losses) // 10) :]
        return sum(tail) / len(tail)


@dataclass(frozen=True)
class BaseEnds:
    """The base model's input embeddings and LM head, which heads share."""

    embeddings: Tensor  # [V, H]
    head: Tensor  # [V, H]

    def __post_init__(self) -> None:
        if self.embeddings.shape != self.head.shape:
            raise DataError(
                f"input embeddings {list(self.embeddings.shape)} and LM head "
                f"{list(self.head.shape)}: heads need both of one shape"
            )


@dataclass(frozen=True)
class HeadMeasures:
    """Measures on held-out outputs, by depth from 1; greedy drafts of the heads alone."""

    loss: float  # nats per token in the vocabulary, over all depths
    covered: float  # share of the tokens that are in the vocabulary
    acceptance: tuple[float, ...]  # share accepted of drafts after accepted ones
    tokens_a_step: float  # per sequence: accepted drafts and the certain token


class TrainableHeads(nn.Module):
    """Heads in training, in float32: of the blocks `heads` each, as `TurboHeads` numbers them.

    Embeddings are much smaller than hidden states; `embedding_scale` makes them alike for the
    optimizer, and `export` moves it into the weights.
    """

    def __init__(
        self,
        heads: tuple[tuple[int, ...], ...],
        *,
        sequential: bool,
        hidden: int,
        embedding_scale: float,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.sequential = sequential
        self.embedding_scale = embedding_scale
        firsts = {head[0] for head in self.heads} if sequential else set()
        count = 1 + max(max(head) for head in self.heads)
        self.blocks = nn.ModuleList(
            nn.Linear(2 * hidden if i in firsts else hidden, hidden) for i in range(count)
        )
        for parameter in self.blocks.parameters():  # a head begins as the LM head itself
            nn.init.zeros_(parameter)

    @classmethod
    def of(cls, start: TurboHeads, embedding_scale: float) -> TrainableHeads:
        """Heads that begin as stored ones. `start` has no LM heads of its own."""
        made = cls(
            start.heads,
            sequential=start.sequential,
            hidden=start.hidden,
            embedding_scale=embedding_scale,
        )
        with torch.no_grad():
            for linear, block in zip(made.blocks, start.blocks, strict=True):
                weight, bias = linear.parameters()
                weight.copy_(block.weight)
                weight[:, start.hidden :] /= embedding_scale
                bias.copy_(block.bias)
        return made

    def forward(self, states: Tensor, embedded: Tensor) -> Tensor:
        """Heads' hidden states [depth, N, H] from states [N, H] and embeddings [depth, N, H].

        embedded[i] is that of the token before the one that head i drafts.
        """
        ends, h = [], states
        for head, e in zip(self.heads, embedded, strict=True):
            if self.sequential:
                z = torch.cat([h, e * self.embedding_scale], dim=1)
            else:
                h, z = states, states
            for index in head:
                h = z = h + functional.silu(self.blocks[index](z))
            ends.append(h)
        return torch.stack(ends)

    def export(self, vocabulary: Tensor | None) -> TurboHeads:
        """The heads as stored, in bfloat16."""
        return TurboHeads(
            blocks=tuple(self._block(block) for block in self.blocks),
            heads=self.heads,
            sequential=self.sequential,
            vocabulary=None if vocabulary is None else vocabulary.to(torch.int32),
        )

    def _block(self, block: nn.Module) -> DraftBlock:
        weight, bias = (p.detach().clone() for p in block.parameters())
        weight[:, len(bias) :] *= self.embedding_scale
        return DraftBlock(weight.to(torch.bfloat16), bias.to(torch.bfloat16))


@dataclass(frozen=True)
class TurboTrainer:
    """One training: rows to learn from, the base's ends, the draft vocabulary, the recipe.

    `start`: heads to go on from, `recipe.depth` of them; None: the recipe's own, from nothing.
    """

    recipe: TurboRecipe
    ends: BaseEnds
    vocabulary: Tensor | None  # int64 ascending; None: every token
    start: TurboHeads | None = None

    def train(
        self, rows: Positions, checkpoints: Checkpoints | None = None
    ) -> tuple[TrainableHeads, LossCurve]:
        """Train heads on `rows`, from the last checkpoint where there is one.

        The same recipe and rows on the same machine give the same heads, interrupted or not.
        """
        from tqdm import tqdm

        recipe = self.recipe
        heads = self.begun(rows)
        optimizer = torch.optim.AdamW(
            heads.parameters(), lr=recipe.lr, betas=_BETAS, weight_decay=recipe.weight_decay
        )
        total = self.total_steps(len(rows))
        losses: list[float] = []
        saved = None if checkpoints is None else checkpoints.load()
        if saved is not None:
            heads.load_state_dict(saved["heads"])
            optimizer.load_state_dict(saved["optimizer"])
            losses = saved["losses"]
        started = time.monotonic()

        def state() -> dict[str, Any]:
            saved_heads, saved_optimizer = heads.state_dict(), optimizer.state_dict()
            return {"heads": saved_heads, "optimizer": saved_optimizer, "losses": losses}

        saving = nullcontext(unsaved) if checkpoints is None else checkpoints.saving()
        with (
            saving as stepped,
            tqdm(total=total, initial=len(losses), desc="train turbo", unit="step") as bar,
        ):
            for chosen in self._batches(len(rows), len(losses), total):
                for group in optimizer.param_groups:
                    group["lr"] = recipe.lr * lr_share(len(losses), total, recipe.warmup)
                loss = self.loss(heads, rows, chosen)
                loss.backward()  # type: ignore[no-untyped-call]
                nn.utils.clip_grad_norm_(heads.parameters(), recipe.clip)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                losses.append(loss.item())
                bar.update()
                bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
                stepped(len(losses), state)
        return heads, LossCurve(tuple(losses), time.monotonic() - started)

    def total_steps(self, rows: int) -> int:
        """Optimizer steps of a run over the given number of rows."""
        per_epoch = math.ceil(rows / self.recipe.batch_size)
        return (
            self.recipe.steps if self.recipe.steps is not None else self.recipe.epochs * per_epoch
        )

    def loss(self, heads: TrainableHeads, rows: Positions, chosen: Tensor) -> Tensor:
        """Mean loss over the drafts at the rows `chosen` [N], weighted by depth."""
        recipe, tokens = self.recipe, rows.tokens[chosen]
        with torch.autocast("cpu", torch.bfloat16):
            logits = (
                heads(rows.states[chosen].float(), self._embedded(tokens)) @ self._head_rows().T
            )
        shares = logits.float().log_softmax(-1)  # [depth, N, D]
        places = self._places(tokens[:, 1:].T)  # [depth, N]
        weights = recipe.depth_decay ** torch.arange(recipe.depth)[:, None]
        said = -shares.gather(-1, places.clamp(min=0)[..., None])[..., 0]
        if recipe.kl:
            said = said + recipe.kl * self._divergence(shares, rows.states, chosen)
        unsure = -shares.mean(-1)
        each = torch.where(places == _OUTSIDE, recipe.spread * unsure, said)
        counted = weights * (places != ABSENT)
        return (each * counted).sum() / counted.sum()

    def _divergence(self, shares: Tensor, states: Tensor, chosen: Tensor) -> Tensor:
        """Divergence of the heads' distributions from the model's, over the vocabulary: [depth, N].

        The model's distribution is from the state that gave the drafted token, a row further on
        for each depth; where the output has ended there, the value means nothing.
        """
        ahead = chosen + 1 + torch.arange(self.recipe.depth)[:, None]
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            logits = states[ahead.clamp(max=len(states) - 1)].float() @ self._head_rows().T
        own = logits.float().log_softmax(-1)
        return functional.kl_div(shares, own, reduction="none", log_target=True).sum(-1)

    @torch.no_grad()
    def measure(self, heads: TrainableHeads, outputs: Sequence[OwnOutput]) -> HeadMeasures:
        """Loss and greedy acceptance on held-out outputs."""
        rows = positions(outputs, self.recipe.depth)
        right, losses = [], []
        for start in range(0, len(rows), _EVALUATED):
            states = rows.states[start : start + _EVALUATED].float()
            tokens = rows.tokens[start : start + _EVALUATED]
            logits = heads(states, self._embedded(tokens)) @ self._head_rows().T
            places = self._places(tokens[:, 1:].T)
            right.append((logits.argmax(-1) == places).T)  # [N, depth]
            said = functional.cross_entropy(
                logits.flatten(0, 1),
                places.flatten().clamp(min=-1),
                ignore_index=-1,
                reduction="none",
            )
            losses.append(said[places.flatten() >= 0])
        chain = torch.cat(right).cumprod(1)
        there = rows.tokens[:, 1:] != ABSENT
        before = torch.cat([torch.ones(len(chain), 1), chain[:, :-1]], dim=1)
        tried = (before * there).sum(0)
        covered = self._places(rows.tokens[:, 0]) >= 0
        return HeadMeasures(
            loss=float(torch.cat(losses).mean()),
            covered=float(covered.float().mean()),
            acceptance=tuple((chain.sum(0) / tried.clamp(min=1)).tolist()),
            tokens_a_step=_tokens_a_step([len(o.tokens) for o in outputs], chain.sum(1).tolist()),
        )

    def begun(self, rows: Positions) -> TrainableHeads:
        """The heads before their first step."""
        drafted = self._head_rows(self.ends.embeddings)
        scale = float(rows.states.float().std() / drafted.std())
        if self.start is not None:
            return TrainableHeads.of(self.start, scale)
        return TrainableHeads(
            self.recipe.heads,
            sequential=self.recipe.kind == "sequential",
            hidden=rows.states.shape[1],
            embedding_scale=scale,
        )

    def _batches(self, rows: int, done: int, total: int) -> Iterator[Tensor]:
        """Row indices [batch_size] of steps `done` to `total`, shuffled anew each epoch."""
        size, seed = self.recipe.batch_size, self.recipe.seed
        per_epoch = math.ceil(rows / size)
        order = torch.empty(0, dtype=torch.int64)
        for step in range(done, total):
            epoch, place = divmod(step, per_epoch)
            if not place or not len(order):
                generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
                order = torch.randperm(rows, generator=generator)
            yield order[place * size : (place + 1) * size]

    def _embedded(self, tokens: Tensor) -> Tensor:
        """Embeddings [depth, N, H] of the tokens before the drafted ones."""
        return functional.embedding(tokens[:, :-1].T.clamp(min=0), self.ends.embeddings)

    def _head_rows(self, matrix: Tensor | None = None) -> Tensor:
        """Rows [D, H] of the LM head, or of another matrix, for the draft vocabulary."""
        matrix = self.ends.head if matrix is None else matrix
        return matrix if self.vocabulary is None else matrix[self.vocabulary]

    def _places(self, tokens: Tensor) -> Tensor:
        """Indices of tokens in the vocabulary; _OUTSIDE where it lacks them, ABSENT stays."""
        if self.vocabulary is None:
            return tokens
        tokens = tokens.contiguous()
        place = torch.searchsorted(self.vocabulary, tokens).clamp(max=len(self.vocabulary) - 1)
        found = torch.where(self.vocabulary[place] == tokens, place, _OUTSIDE)
        return torch.where(tokens == ABSENT, ABSENT, found)


def _tokens_a_step(lengths: Sequence[int], accepted: Sequence[int]) -> float:
    """Tokens per decode step over outputs of `lengths`, from `accepted` drafts at each row.

    The first token of an output comes from its prompt's step and is not counted.
    """
    tokens, steps, begin = 0, 0, 0
    for length in lengths:
        row = begin
        while row < begin + length - 1:
            row += 1 + int(accepted[row])
            steps += 1
        tokens += length - 1
        begin += length
    return tokens / max(1, steps)
