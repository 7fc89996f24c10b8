"""Turbo heads of an adapter as pages beside those of its updates.

Every matrix (a block's, an own LM head's) is cut in pages of 16 outputs, as `turbo_heads` reads
them: 16 rows of the weight, then their 16 biases, zeros behind the last output. The draft
vocabulary is a page too, as int32 token ids in the arena's bytes, as large as a page of the
matrices if it fits in one: a size of its own would claim a whole slab of the arena for one short
list. Knows nothing of slots or budgets.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from quickchange_kernels.turbo_heads.turbo_heads_contract import PAGE_ROWS, page_elements
from quickchange_server.adapters.paced_copies import Pause, aligned, copy_in_pieces
from quickchange_server.errors import AdapterFailedError
from quickchange_store.canonical.turbo_part import TurboHeads


@dataclass(frozen=True, slots=True)
class TurboShape:
    """Sizes of a base model that its Turbo heads must fit."""

    hidden: int  # features that enter its LM head
    vocabulary: int  # columns of its logits

    def check(self, turbo: TurboHeads) -> None:
        """Raises AdapterFailedError if the heads were made for another base model."""
        if turbo.hidden != self.hidden:
            raise AdapterFailedError(
                f"the heads draft from {turbo.hidden} features, the served model's LM head takes "
                f"{self.hidden}; add the adapter again with its own base model"
            )
        if turbo.vocabulary is not None:
            self._check_tokens(turbo.vocabulary)
        rows = max((output.shape[0] for output in turbo.outputs), default=0)
        if rows > self.vocabulary:
            raise AdapterFailedError(
                f"the heads have LM heads of their own for {rows} tokens, the served model has "
                f"{self.vocabulary}; add the adapter again with its own base model"
            )

    def _check_tokens(self, vocabulary: Tensor) -> None:
        last = int(vocabulary[-1])  # token ids ascend
        if last >= self.vocabulary:
            raise AdapterFailedError(
                f"the heads' vocabulary holds token {last}, the served model has tokens 0 to "
                f"{self.vocabulary - 1}; add the adapter again with its own base model"
            )


@dataclass(frozen=True)
class HeadLayout:
    """Layout of an image's head pages, numbered from the first of them."""

    matrices: npt.NDArray[np.int32]  # [M, 2] pages [first, end) of each: blocks, then outputs
    heads: tuple[tuple[int, ...], ...]  # matrices of each head's blocks, in order
    sequential: bool
    outputs: tuple[int, ...]  # matrices of own LM heads, one per head, or none
    columns: int | None  # tokens that the heads choose from; None: those of the base's LM head
    vocabulary: int | None  # tokens in the page behind all matrices; None: no such page


@dataclass(frozen=True, slots=True)
class MatrixPage:
    """Outputs [first, first + 16) of a matrix."""

    weight: Tensor  # [N, K]
    bias: Tensor | None  # [N]
    first: int
    elements: int

    def fill(self, target: Tensor, pause: Pause) -> None:
        """Copy the page's content to `target` [elements], which is zero."""
        features = self.weight.shape[1]
        rows = self.weight[self.first : self.first + PAGE_ROWS]
        place = target[: PAGE_ROWS * features].view(PAGE_ROWS, features)
        copy_in_pieces(place[: rows.shape[0]], rows, pause)
        if self.bias is not None:
            biases = target[PAGE_ROWS * features :][None, : rows.shape[0]]
            copy_in_pieces(biases, self.bias[None, self.first : self.first + PAGE_ROWS], pause)


@dataclass(frozen=True, slots=True)
class VocabularyPage:
    """Draft vocabulary: int32 token ids in the page's first bytes."""

    tokens: Tensor  # int32 [D]
    elements: int

    def fill(self, target: Tensor, pause: Pause) -> None:
        """Copy the page's content to `target` [elements]."""
        numbers = target.view(torch.int32)[: self.tokens.numel()]
        copy_in_pieces(numbers[None], self.tokens[None], pause)


def head_pages(
    turbo: TurboHeads, dtype: torch.dtype
) -> tuple[list[MatrixPage | VocabularyPage], HeadLayout]:
    """Pages of all matrices, then the vocabulary's, with their layout."""
    blocks = [(block.weight, block.bias) for block in turbo.blocks]
    pages: list[MatrixPage | VocabularyPage] = []
    matrices: list[tuple[int, int]] = []
    for weight, bias in [*blocks, *((output, None) for output in turbo.outputs)]:
        first, size = len(pages), aligned(page_elements(weight.shape[1]), dtype)
        pages += [
            MatrixPage(weight, bias, row, size) for row in range(0, weight.shape[0], PAGE_ROWS)
        ]
        matrices.append((first, len(pages)))
    if turbo.vocabulary is not None:
        pages.append(_vocabulary_page(turbo.vocabulary, {page.elements for page in pages}, dtype))
    layout = HeadLayout(
        matrices=np.array(matrices, dtype=np.int32),
        heads=turbo.heads,
        sequential=turbo.sequential,
        outputs=tuple(range(len(blocks), len(matrices))),
        columns=_columns(turbo),
        vocabulary=None if turbo.vocabulary is None else turbo.vocabulary.numel(),
    )
    return pages, layout


def _vocabulary_page(tokens: Tensor, sizes: set[int], dtype: torch.dtype) -> VocabularyPage:
    needed = aligned(-(-tokens.numel() * torch.int32.itemsize // dtype.itemsize), dtype)
    fitting = [size for size in sizes if size >= needed]
    return VocabularyPage(tokens, min(fitting, default=needed))


def _columns(turbo: TurboHeads) -> int | None:
    if turbo.vocabulary is not None:
        return turbo.vocabulary.numel()
    return turbo.outputs[0].shape[0] if turbo.outputs else None
