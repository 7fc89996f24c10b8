"""Segments made from a step's runs: what they cover, their tiles, and room for captured graphs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quickchange_kernels.lowrank.lowrank_contract import Segments
from quickchange_server.adapters import batch_segments
from quickchange_server.adapters.batch_segments import Components, Room, Run

CPU = torch.device("cpu")
COMPOSITIONS: list[Components] = [(), ((0, 1.0),), ((1, 1.0),), ((0, 0.5), (2, 0.25))]
RUNS = st.lists(st.builds(Run, st.integers(0, 90), st.sampled_from(COMPOSITIONS)), max_size=12)
ROOMY = Room(segments=40, pieces=60, tiles=50, height=16)


def by_row(segments: Segments) -> dict[int, list[tuple[int, float]]]:
    """(slot, weight) of every covered row, in order."""
    found: dict[int, list[tuple[int, float]]] = {}
    triples = zip(
        segments.rows.tolist(), segments.slot.tolist(), segments.weight.tolist(), strict=True
    )
    for (begin, end), slot, weight in triples:
        for row in range(begin, end):
            found.setdefault(row, []).append((slot, weight))
    return found


def by_row_of_tiles(segments: Segments) -> dict[int, list[tuple[int, float]]]:
    """The same, read from the tiles; a row in two tiles fails."""
    assert segments.tiles is not None
    found: dict[int, list[tuple[int, float]]] = {}
    pieces = segments.tiles.pieces.tolist()
    for begin, end, first, last in segments.tiles.tiles.tolist():
        assert end - begin <= segments.tiles.height
        for row in range(begin, end):
            assert row not in found
            found[row] = []
            for piece_begin, piece_end, slot, segment in pieces[first:last]:
                assert (piece_begin, piece_end) == (begin, end)
                found[row].append((slot, segments.weight[segment].item()))
    return found


def wanted(runs: list[Run]) -> dict[int, list[tuple[int, float]]]:
    flat = [run.components for run in runs for _ in range(run.rows)]
    return {row: list(components) for row, components in enumerate(flat) if components}


@given(runs=RUNS)
def test_every_row_takes_its_runs_components(runs: list[Run]) -> None:
    assert by_row(batch_segments.segments(runs, CPU)) == wanted(runs)


@given(runs=RUNS, height=st.sampled_from([16, 64]))
def test_tiles_say_the_same_as_segments(runs: list[Run], height: int) -> None:
    room = Room(segments=24, pieces=150, tiles=90, height=height)
    segments = batch_segments.segments(runs, CPU, room)
    assert by_row_of_tiles(segments) == wanted(runs)


@given(runs=RUNS)
def test_under_the_interpreter_tiles_come_without_asking(runs: list[Run]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        segments = batch_segments.segments(runs, CPU)
    assert by_row_of_tiles(segments) == wanted(runs)


def test_neighbours_under_one_composition_are_one_segment() -> None:
    runs = [Run(1, COMPOSITIONS[1]), Run(3, COMPOSITIONS[1]), Run(1, COMPOSITIONS[2])]
    assert batch_segments.segments(runs, CPU).rows.tolist() == [[0, 4], [4, 5]]


def test_the_native_version_gets_no_tiles() -> None:
    assert batch_segments.segments([Run(1, COMPOSITIONS[1])], CPU).tiles is None


@pytest.mark.parametrize(("longest", "height"), [(16, 16), (17, 64)])
def test_long_runs_are_cut_into_larger_tiles(
    longest: int, height: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    tiles = batch_segments.segments([Run(longest, COMPOSITIONS[1])], CPU).tiles
    assert tiles is not None
    assert tiles.height == height
    assert tiles.tiles.shape == (1, 4)


def test_unused_room_is_empty() -> None:
    segments = batch_segments.segments([Run(2, COMPOSITIONS[3])], CPU, ROOMY)
    assert segments.slot.shape == (40,)
    assert segments.tiles is not None
    assert segments.tiles.pieces.shape == (60, 4)
    assert segments.tiles.tiles.shape == (50, 4)
    assert not segments.rows[2:].any()
    assert not segments.tiles.pieces[2:].any()
    assert not segments.tiles.tiles[1:].any()


def test_segments_of_a_fixed_buffer_follow_what_is_copied_into_it() -> None:
    buffer = torch.zeros(sum(ROOMY.sizes), dtype=torch.int32)
    segments = batch_segments.unpack(buffer, ROOMY)
    for runs in ([Run(20, COMPOSITIONS[3])], [Run(1, COMPOSITIONS[1]), Run(1, COMPOSITIONS[2])]):
        buffer.copy_(batch_segments.pack(runs, ROOMY))
        assert by_row(segments) == by_row_of_tiles(segments) == wanted(runs)


@pytest.mark.parametrize("room", [Room(1, 8, 8, 16), Room(8, 1, 8, 16), Room(8, 8, 1, 16)], ids=str)
def test_a_batch_that_does_not_fit_is_refused(room: Room) -> None:
    with pytest.raises(ValueError, match="take a larger one"):
        batch_segments.segments([Run(17, COMPOSITIONS[3])], CPU, room)
