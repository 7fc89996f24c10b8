"""Host image of an adapter: its pages, ready to be copied to the device.

A page is 8 ranks of one module's update: A [8, in], then B [8, width] transposed so that row j is
rank j's output vector, each part rounded up to 64 bytes. The last page of an update is padded with
zeros. A bias is a page of its own with scale 1 and no activation: A is zero, shift 1 in its first
rank, B's first row is the bias, exactly as it was trained (folding it into a free rank would divide
it by the scale). A gain is a page of its own too, and only as long as its one row: gain − 1, which
a short dtype holds better than the gain. Behind them come the pages of the adapter's Turbo heads
(turbo_packing.py).

Images are built beside decoding, so the work is cut in pieces below torch's threshold for entering
a parallel region: those would fight the engine's threads for its cores, and a second thread that
ever enters one gets a thread team of its own, after which OpenMP, seeing more threads than cores,
lets the engine's team sleep between regions (a step of SmolLM2 took 30 ms instead of 24 from then
on). Knows nothing of slots, budgets or threads.
"""

from __future__ import annotations

import mmap
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from quickchange_kernels.lowrank.lowrank_contract import RANKS_PER_PAGE, PageKind
from quickchange_server.adapters.module_groups import Member, ModuleGroup, Shard, Spans
from quickchange_server.adapters.paced_copies import Pause, aligned, copy_in_pieces, no_pause
from quickchange_server.adapters.prompts.held_prompt import HeldPrompt
from quickchange_server.adapters.turbo_packing import HeadLayout, head_pages
from quickchange_server.errors import AdapterFailedError
from quickchange_store.canonical.canonical_adapter import (
    ACTIVATIONS,
    Activation,
    CanonicalAdapter,
    LowRankUpdate,
    Source,
)

_KINDS: dict[Activation, PageKind] = {name: PageKind[name.upper()] for name in ACTIVATIONS}


@dataclass(frozen=True, slots=True)
class PageShape:
    """Layout of a page of one module's update. Offsets and sizes in elements."""

    group: int
    features: int  # the module's inputs; an embedding has its vocabulary
    column: int
    width: int
    b_offset: int  # B's begin within the page
    elements: int  # size of the page, 64-byte aligned
    gain_elements: int  # size of a page that holds a gain
    shard: Shard | None = None  # the part of the module that is here; None: all of it
    # tokens that only some adapters have: the last outputs, of an embedding inputs
    spare: int = 0
    embeds: bool = False
    heads: int | None = None  # of a norm, that have one weight

    @property
    def whole(self) -> tuple[int, int]:
        """Features in and out of the whole module."""
        if self.shard is None:
            return self.features // (self.heads or 1), self.width // (self.heads or 1)
        return self.shard.in_features, self.shard.out_features

    @property
    def without_spare(self) -> tuple[int, int]:
        """Features in and out of the whole module as the base has it."""
        found, made = self.whole
        return (found - self.spare, made) if self.embeds else (found, made - self.spare)

    @property
    def inputs(self) -> Spans:
        """The module's inputs that are here."""
        return (self.shard and self.shard.inputs) or ((0, self.features),)

    @property
    def outputs(self) -> Spans:
        """The module's outputs that are here."""
        return (self.shard and self.shard.outputs) or ((0, self.width),)

    @property
    def leaves_sums(self) -> bool:
        """True if another process adds what is added once to a sum over all of them."""
        return self.shard is not None and self.shard.leaves_sums


Place = tuple[str, Source]  # (a module's path, what an update of it reads)


def page_shapes(groups: Sequence[ModuleGroup], dtype: torch.dtype) -> dict[Place, PageShape]:
    """Page shapes of every module that an adapter may update, for each source of its updates."""
    return {
        (member.path, group.source): _page_shape(group, member, dtype)
        for group in groups
        for member in group.members
    }


def _page_shape(group: ModuleGroup, member: Member, dtype: torch.dtype) -> PageShape:
    b_offset = aligned(RANKS_PER_PAGE * group.in_features, dtype)
    return PageShape(
        group=group.index,
        features=group.in_features,
        column=member.column,
        width=member.width,
        b_offset=b_offset,
        elements=b_offset + aligned(RANKS_PER_PAGE * member.width, dtype),
        gain_elements=aligned(member.width, dtype),
        shard=member.shard,
        spare=member.spare,
        embeds=group.kind == "embedding",
        heads=member.heads,
    )


@dataclass(frozen=True)
class AdapterImage:
    """All pages of one adapter in one host tensor, with the tables that describe them.

    The first L pages are the updates', by module group; the heads' follow. In `data`, pages of one
    size lie side by side, so that a run of free pages on the device takes one copy.
    """

    data: Tensor  # [E] in the arena's dtype; pinned if the device is CUDA
    start: npt.NDArray[np.int64]  # [P] begin of each page in `data`
    elements: npt.NDArray[np.int64]  # [P] size of each page
    group: npt.NDArray[np.int64]  # [L] ascending
    b_offset: npt.NDArray[np.int64]  # [L] begin of B within the page
    column: npt.NDArray[np.int64]  # [L]
    width: npt.NDArray[np.int64]  # [L]
    scale: npt.NDArray[np.float32]  # [L]
    shift: npt.NDArray[np.float32]  # [L, 8]
    kind: npt.NDArray[np.int32]  # [L] PageKind
    heads: HeadLayout | None  # describes the heads' pages; None: there are none
    rank: int = 0  # the highest of the updates
    tokens: int = 0  # of its vocabulary; 0: the base's own
    digest: str = ""  # of the adapter's version in the store, if it is of one
    prompt: HeldPrompt | None = None  # its virtual tokens, which have no pages

    @property
    def pages(self) -> int:
        """L: the updates' pages."""
        return int(self.group.size)

    @property
    def nbytes(self) -> int:
        """Bytes of the pages, the same on the host and on the device."""
        return self.data.numel() * self.data.element_size()

    @property
    def demand(self) -> Mapping[int, int]:
        """Number of pages by page size in elements."""
        return Counter(self.elements.tolist())


class _Content(Protocol):
    """A page of any kind."""

    @property
    def elements(self) -> int: ...

    def fill(self, target: Tensor, pause: Pause) -> None:
        """Copy the page's content to `target` [elements], which is zero."""


@dataclass(frozen=True, slots=True)
class _Page:
    """Ranks [first, first + 8) of an update, or its bias, or its gain."""

    shape: PageShape
    update: LowRankUpdate
    first: int
    row: Tensor | None = None  # [width]: the bias or the gain, in place of the ranks
    kind: PageKind = PageKind.IDENTITY

    @property
    def last(self) -> int:
        return min(self.first + RANKS_PER_PAGE, self.update.rank)

    @property
    def elements(self) -> int:
        return self.shape.gain_elements if self.kind is PageKind.GAIN else self.shape.elements

    @property
    def b_offset(self) -> int:
        return 0 if self.kind is PageKind.GAIN else self.shape.b_offset

    @property
    def scale(self) -> float:
        return self.update.scale if self.row is None else 1.0

    def write_shift(self, target: npt.NDArray[np.float32]) -> None:
        """Write the page's shifts to `target` [8], which is zero."""
        if self.row is not None:
            target[0] = self.kind is not PageKind.GAIN
        elif self.update.shift is not None:
            shift = self.update.shift[self.first : self.last]
            target[: len(shift)] = shift.float().numpy()

    def fill(self, target: Tensor, pause: Pause) -> None:
        """Copy the page's content to `target` [elements], which is zero."""
        shape, update = self.shape, self.update
        b = target[self.b_offset :]
        if self.row is not None:
            if self.kind is PageKind.GAIN or not shape.leaves_sums:
                row = self.row.repeat(shape.heads or 1)
                _copy_spans(b[None, : shape.width], row[None], shape.outputs, pause)
            return
        b = b[: RANKS_PER_PAGE * shape.width].view(RANKS_PER_PAGE, shape.width)
        count = self.last - self.first
        a = target[: RANKS_PER_PAGE * shape.features].view(RANKS_PER_PAGE, shape.features)
        _copy_spans(a[:count], update.a[self.first : self.last], shape.inputs, pause)
        _copy_spans(b[:count], update.b[:, self.first : self.last].T, shape.outputs, pause)


def _copy_spans(target: Tensor, source: Tensor, spans: Spans, pause: Pause) -> None:
    """target [n, m] = those columns of source that lie in `spans`, side by side. A source that
    lacks the last ones, spare tokens, leaves zeros there."""
    at = 0
    for begin, stop in spans:
        end = min(stop, source.shape[1])
        copy_in_pieces(target[:, at : at + end - begin], source[:, begin:end], pause)
        at += stop - begin


def build_image(
    adapter: CanonicalAdapter,
    shapes: Mapping[Place, PageShape],
    dtype: torch.dtype,
    *,
    pin_memory: bool = False,
    pause: Pause = no_pause,
) -> AdapterImage:
    """Lay out and convert an adapter's updates and heads. `pause` is called between pieces of work.

    Raises AdapterFailedError for a module that the model does not have, or of other shapes. Heads
    are not checked: TurboShape.check does that.
    """
    updates = _list_pages(adapter, shapes)
    pages: list[_Content] = [*updates]
    layout = None
    if adapter.turbo is not None:
        heads, layout = head_pages(adapter.turbo, dtype)
        pages += heads
    elements = np.array([page.elements for page in pages], dtype=np.int64)
    order = np.argsort(elements, kind="stable")
    start = np.empty_like(elements)
    start[order] = np.cumsum(elements[order]) - elements[order]
    data = _zeros(int(elements.sum()), dtype, pin_memory=pin_memory)
    for page, begin in zip(pages, start.tolist(), strict=True):
        page.fill(data[begin : begin + page.elements], pause)
    shift = np.zeros((len(updates), RANKS_PER_PAGE), dtype=np.float32)
    for update, page_shift in zip(updates, shift, strict=True):
        update.write_shift(page_shift)
    return AdapterImage(
        data=data,
        start=start,
        elements=elements,
        group=np.array([page.shape.group for page in updates], dtype=np.int64),
        b_offset=np.array([page.b_offset for page in updates], dtype=np.int64),
        column=np.array([page.shape.column for page in updates], dtype=np.int64),
        width=np.array([page.shape.width for page in updates], dtype=np.int64),
        scale=np.array([page.scale for page in updates], dtype=np.float32),
        shift=shift,
        kind=np.array([page.kind for page in updates], dtype=np.int32),
        heads=layout,
        rank=max((update.rank for update in adapter.updates.values()), default=0),
        tokens=0 if adapter.tokenizer is None else adapter.tokenizer.rows,
    )


def _zeros(count: int, dtype: torch.dtype, *, pin_memory: bool) -> Tensor:
    """Zero tensor [count], without a parallel region.

    Its pages are the system's and go back to it: the heap of the loader's thread would keep those
    of a whole adapter. Large ones cost as little as memory that is used again.
    """
    if pin_memory or not count:
        return torch.zeros(count, dtype=dtype, pin_memory=pin_memory)
    pages = mmap.mmap(-1, count * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if sys.platform == "linux":
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype)


def _list_pages(adapter: CanonicalAdapter, shapes: Mapping[Place, PageShape]) -> list[_Page]:
    tokens = 0 if adapter.tokenizer is None else adapter.tokenizer.rows
    pages: list[_Page] = []
    for path, update in adapter.updates.items():
        shape = shapes.get((path, update.source))
        if shape is None:
            reads = "" if update.source == "input" else f" whose {update.source} could be read"
            raise AdapterFailedError(
                f"{path}: the served model has no such module{reads}, or one that adapters can't "
                "update (quantised experts, a router with no one product, a norm over other "
                "rows); add the adapter again with the base model that it was trained on, or "
                "train one without this module"
            )
        _check_shapes(path, update, shape, tokens)
        pages += _pages_of(update, shape)
    pages.sort(key=lambda page: page.shape.group)
    return pages


def _pages_of(update: LowRankUpdate, shape: PageShape) -> Iterator[_Page]:
    for first in range(0, update.rank, RANKS_PER_PAGE):
        yield _Page(shape, update, first, kind=_KINDS[update.activation])
    if update.bias is not None:
        yield _Page(shape, update, 0, row=update.bias)
    if update.gain is not None:
        yield _Page(shape, update, 0, row=update.gain.float() - 1, kind=PageKind.GAIN)


def _check_shapes(path: str, update: LowRankUpdate, shape: PageShape, tokens: int) -> None:
    """Raise AdapterFailedError for an update of another module's shape. tokens: rows of the
    adapter's vocabulary; 0: the base's own."""
    found, whole = (update.a.shape[1], update.b.shape[0]), shape.without_spare
    beyond = found[0] - whole[0] if shape.embeds else found[1] - whole[1]
    if tokens and beyond > shape.spare:
        raise AdapterFailedError(
            f"{path}: the adapter adds tokens, {beyond} rows beyond the base's own, and this "
            f"server has room for {shape.spare} (setting extra_vocabulary): serve it with "
            f"--extra-vocabulary {beyond} or more"
        )
    added = beyond if tokens else 0
    if found != ((whole[0] + added, whole[1]) if shape.embeds else (whole[0], whole[1] + added)):
        raise AdapterFailedError(
            f"{path}: the update maps {found[0]} to {found[1]} features, the served model's module "
            f"{whole[0]} to {whole[1]}; add the adapter again with its own base model"
        )
    if shape.heads is not None and update.rank:
        raise AdapterFailedError(
            f"{path} is a norm, and the update is more than a gain and a bias of its output; train "
            "norms whole (modules_to_save of PEFT)"
        )
    partial = shape.shard is not None and shape.shard.inputs is not None
    if partial and (update.activation != "identity" or update.shift is not None):
        raise AdapterFailedError(
            f"{path}: its update has a shift or an activation between A and B, which can't be cut "
            "with the module's inputs; serve it with --tensor-parallel 1"
        )
