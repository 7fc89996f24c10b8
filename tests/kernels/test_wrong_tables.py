"""Index tables with wrong entries: every operation raises, and touches nothing out of range.

One entry of one table is replaced by a number that the contract does not allow, or several by any
numbers, of which the contract may allow some.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quickchange_kernels.attention.kv_write import kv_write_
from quickchange_kernels.attention.paged_attention_contract import paged_attention
from quickchange_kernels.lowrank.lowrank_contract import PageKind, lowrank_, lowrank_embedding_
from quickchange_kernels.random_inputs import make_segments, random_keys, random_tables
from quickchange_kernels.sampling.sample_contract import Draws, Edits, sample
from quickchange_kernels.sampling.token_mask import token_mask_
from quickchange_kernels.sampling.verify import verify
from quickchange_kernels.turbo_heads.draft_logits import draft_logits
from quickchange_kernels.turbo_heads.turbo_heads_contract import (
    HeadItems,
    HeadTables,
    head_logits,
    in_pages,
    turbo_heads,
)

Tables = dict[str, torch.Tensor]

ROWS, FEATURES, COLUMNS = 7, 12, 20
VOCABULARY = 40


@dataclass(frozen=True)
class Operation:
    """An operation on good tables by name, and the numbers that each table's columns may hold."""

    tables: Tables
    call: Callable[[Tables], object]
    sizes: dict[str, tuple[int, ...]]  # by column of the last axis; one stands for all
    unread: frozenset[int] = frozenset()  # places in `pages` that no call reads

    def places(self, table: str) -> list[int]:
        """Places of a table whose numbers are read."""
        unread = self.unread if table == "pages" else ()
        return [i for i in range(self.tables[table].numel()) if i not in unread]


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def _ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _lowrank(*, embedding: bool) -> Operation:
    kinds = (PageKind.IDENTITY, PageKind.GELU, PageKind.GAIN)
    features = VOCABULARY if embedding else FEATURES
    made = random_tables(features, (8, 12), (3, 8, 11), _generator(), kinds=kinds)
    segments = make_segments([(0, 2, 0, 1.0), (2, 6, 2, 0.5), (3, 7, 1, 1.0)])
    tables = {
        "directory": made.directory,
        "pages": made.pages,
        "page_kind": made.page_kind,
        "rows": segments.rows,
        "slot": segments.slot,
        "ids": torch.arange(ROWS) * 3,
    }

    def call(now: Tables) -> None:
        wrong = dataclasses.replace(
            made, directory=now["directory"], pages=now["pages"], page_kind=now["page_kind"]
        )
        over = dataclasses.replace(segments, rows=now["rows"], slot=now["slot"])
        y = torch.zeros(ROWS, COLUMNS)
        if embedding:
            lowrank_embedding_(y, now["ids"], wrong, over, 0, VOCABULARY)
        else:
            lowrank_(y, torch.ones(ROWS, FEATURES), wrong, over, 0)

    pages, room = made.pages.shape[0], made.arena.numel()
    sizes = {
        "directory": (pages + 1,),
        "pages": (room, room, COLUMNS + 1, COLUMNS + 1),
        "page_kind": (len(PageKind),),
        "rows": (ROWS + 1,),
        "slot": (3,),
    }
    gains = (made.page_kind == PageKind.GAIN).nonzero().flatten()
    sizes |= {"ids": (VOCABULARY,)} if embedding else {}
    return Operation(tables, call, sizes, frozenset((4 * gains).tolist()))  # they have no A


def _attention(window: int) -> Operation:
    lengths = (5, 70, 300)
    keys = random_keys(lengths, 2, 8, 16, _generator())
    counts = (1, 65, 3)
    starts = _ints(0, *torch.tensor(counts).cumsum(0).tolist())
    q = torch.randn(int(starts[-1]), 4, 8)
    used = [[min(b, -(-n // 16) - 1) for b in range(keys.block_tables.shape[1])] for n in lengths]
    blocks = keys.block_tables.gather(1, torch.tensor(used))
    tables = {"blocks": blocks, "lengths": keys.seq_lens, "starts": starts}

    def call(now: Tables) -> None:
        paged_attention(
            q,
            keys.k_cache,
            keys.v_cache,
            now["blocks"],
            now["lengths"],
            now["starts"],
            0.3,
            window,
        )

    room = blocks.shape[1] * 16 + 1
    return Operation(tables, call, {"lengths": (room,), "starts": (len(q) + 1,)})


def _blocks() -> Operation:
    """One sequence of whole blocks, all of which are read."""
    keys = random_keys((64,), 2, 8, 16, _generator())
    tables = {"blocks": keys.block_tables[:, :4]}

    def call(now: Tables) -> None:
        lengths, starts = _ints(64), _ints(0, 1)
        q = torch.ones(1, 4, 8)
        paged_attention(q, keys.k_cache, keys.v_cache, now["blocks"], lengths, starts, 0.3)

    return Operation(tables, call, {"blocks": (keys.k_cache.shape[0],)})


def _kv_write() -> Operation:
    def call(now: Tables) -> None:
        k, cache = torch.ones(4, 2, 8), torch.zeros(3, 2, 16, 8)
        kv_write_(k, k, cache, cache.clone(), now["slots"])

    return Operation({"slots": torch.tensor([0, 17, -1, 47])}, call, {"slots": (48,)})


def _sample() -> Operation:
    tables = {
        "begin": _ints(0, 1, 1, 2, 2, 3, 3, 3, 4),
        "token": _ints(3, 0, 39, 7),
    }

    def call(now: Tables) -> None:
        edits = Edits(now["begin"], now["token"], torch.ones(4))
        sample(torch.randn(2, VOCABULARY), Draws(), edits)

    return Operation(tables, call, {"begin": (5,), "token": (VOCABULARY,)})


def _token_mask() -> Operation:
    def call(now: Tables) -> None:
        token_mask_(torch.zeros(5, VOCABULARY), now["rows"], torch.full((3, 2), -1).int())

    return Operation({"rows": torch.tensor([4, 0, 2])}, call, {"rows": (5,)})


def _verify() -> Operation:
    def call(now: Tables) -> None:
        verify(torch.ones(9).long(), torch.ones(9).long(), now["rows"], 16)

    rows = _ints(0, 3, 3, 4, 4, 9).view(3, 2)
    return Operation({"rows": rows}, call, {"rows": (10, 25)})  # longer ones are cut to 16


def _heads(*, residual: bool) -> Operation:
    generator = _generator()
    weights = [torch.randn(COLUMNS, FEATURES, generator=generator) for _ in range(3)]
    pages = [in_pages(weight) for weight in weights]
    each = pages[0].shape[1]
    arena = torch.cat([page.flatten() for page in pages])
    items = HeadItems.of([(0, 1), (6, 0), (3, 1), (2, 2)])
    tables = {
        "pages": torch.arange(6) * each,
        "matrices": _ints(0, 2, 2, 4, 4, 6).view(3, 2),
        "items": items.items,
        "segments": items.segments,
    }

    def call(now: Tables) -> None:
        heads = HeadTables(arena, now["pages"], now["matrices"])
        wrong = HeadItems(now["items"], now["segments"])
        z = torch.ones(ROWS, FEATURES)
        if residual:
            turbo_heads(torch.ones(ROWS, COLUMNS), z, heads, wrong)
        else:
            head_logits(z, heads, wrong, COLUMNS)

    sizes = {
        "pages": (arena.numel() - each + 1,),
        "matrices": (7,),
        "items": (ROWS, 4),
        "segments": (5, 5, 3),
    }
    return Operation(tables, call, sizes)


def _draft_logits() -> Operation:
    tables = {
        "vocabulary": _ints(0, 5, 39, 1, 2),
        "segments": _ints(0, 2, 0, 3, 2, 4, 3, 5).view(2, 4),
    }

    def call(now: Tables) -> None:
        weight = torch.ones(VOCABULARY, FEATURES)
        draft_logits(torch.ones(4, FEATURES), weight, now["vocabulary"], now["segments"], 3)

    return Operation(tables, call, {"vocabulary": (VOCABULARY,), "segments": (5, 5, 6, 6)})


OPERATIONS: dict[str, Callable[[], Operation]] = {
    "lowrank_": lambda: _lowrank(embedding=False),
    "lowrank_embedding_": lambda: _lowrank(embedding=True),
    "paged_attention": lambda: _attention(0),
    "paged_attention, window": lambda: _attention(9),
    "paged_attention, blocks": _blocks,
    "kv_write_": _kv_write,
    "sample": _sample,
    "token_mask_": _token_mask,
    "verify": _verify,
    "turbo_heads": lambda: _heads(residual=True),
    "head_logits": lambda: _heads(residual=False),
    "draft_logits": _draft_logits,
}


@pytest.fixture(params=["plain", "best"])
def served_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operations go to their plain versions, or to the machine's native ones."""
    if request.param == "best":
        request.getfixturevalue("native_kernels")
        return
    for module, name, operation in _DISPATCHED:
        plain = getattr(torch.ops.quickchange, operation).plain
        monkeypatch.setattr(f"quickchange_kernels.{module}.{name}", plain)


_DISPATCHED = (
    ("lowrank.lowrank_contract", "_lowrank_", "lowrank_"),
    ("lowrank.lowrank_contract", "_lowrank_embedding_", "lowrank_embedding_"),
    ("attention.paged_attention_contract", "_paged_attention", "paged_attention"),
    ("attention.kv_write", "_kv_write_", "kv_write_"),
    ("sampling.sample_contract", "_sample", "sample"),
    ("sampling.token_mask", "_token_mask", "token_mask_"),
    ("sampling.verify", "_verify", "verify"),
    ("turbo_heads.turbo_heads_contract", "_turbo_heads", "turbo_heads"),
    ("turbo_heads.turbo_heads_contract", "_head_logits", "head_logits"),
    ("turbo_heads.draft_logits", "_draft_logits", "draft_logits"),
)

_quick = settings(
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.mark.usefixtures("served_by")
@pytest.mark.parametrize("name", OPERATIONS)
def test_good_tables_are_taken(name: str) -> None:
    operation = OPERATIONS[name]()
    operation.call(operation.tables)


@pytest.mark.usefixtures("served_by")
@pytest.mark.parametrize("name", OPERATIONS)
@_quick
@given(data=st.data())
def test_a_number_out_of_range_raises(name: str, data: st.DataObject) -> None:
    operation = OPERATIONS[name]()
    table = data.draw(st.sampled_from(sorted(operation.sizes)))
    values, sizes = operation.tables[table], operation.sizes[table]
    place = data.draw(st.sampled_from(operation.places(table)))
    bounds = torch.iinfo(values.dtype)
    below = -2 if table == "slots" else -1  # a slot of -1 is padding
    wrong = st.integers(bounds.min, below) | st.integers(sizes[place % len(sizes)], bounds.max)
    with pytest.raises((IndexError, ValueError)):
        operation.call(operation.tables | {table: _with(values, place, data.draw(wrong))})


@pytest.mark.usefixtures("served_by")
@pytest.mark.parametrize("name", OPERATIONS)
@_quick
@given(data=st.data())
def test_any_number_is_taken_or_raises(name: str, data: st.DataObject) -> None:
    operation = OPERATIONS[name]()
    tables = dict(operation.tables)
    for _ in range(data.draw(st.integers(1, 3))):
        table = data.draw(st.sampled_from(sorted(tables)))
        place = data.draw(st.integers(0, tables[table].numel() - 1))
        tables[table] = _with(tables[table], place, data.draw(st.integers(-3, 60)))
    with contextlib.suppress(IndexError, ValueError):
        operation.call(tables)


def _with(values: torch.Tensor, place: int, value: int) -> torch.Tensor:
    changed = values.clone()
    changed.view(-1)[place] = value
    return changed
