"""A tree of tensors goes through one packed buffer and comes out equal; static inputs stay put."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quickchange_server.model.input_buffers import (
    Download,
    StaticInputs,
    layout_of,
    packed,
    rebuilt,
    upload,
    views,
)

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Inner:
    table: Tensor
    height: int
    missing: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Outer:
    ids: Tensor
    inner: Inner
    again: Inner
    weight: Tensor


def make_tree(start: int = 0, rows: int = 3, height: int = 16) -> Outer:
    inner = Inner(torch.arange(start, start + 5, dtype=torch.int32), height)
    return Outer(
        ids=torch.arange(start, start + rows),
        inner=inner,
        again=inner,
        weight=torch.tensor([[0.5 + start], [1.5]]),
    )


def through_a_buffer(tree: Outer) -> tuple[Outer, Tensor]:
    layout, tensors = layout_of(tree)
    buffer = packed(layout, tensors, CPU)
    return rebuilt(layout, views(layout, buffer)), buffer


def test_a_tree_comes_out_of_the_buffer_equal() -> None:
    tree = make_tree()
    copy, _ = through_a_buffer(tree)
    for old, new in (
        (tree.ids, copy.ids),
        (tree.inner.table, copy.inner.table),
        (tree.weight, copy.weight),
    ):
        assert new.dtype == old.dtype
        assert torch.equal(new, old)
    assert copy.inner.height == 16
    assert copy.inner.missing is None


def test_every_tensor_lies_in_one_buffer_at_vector_width() -> None:
    copy, buffer = through_a_buffer(make_tree())
    begin, end = buffer.data_ptr(), buffer.data_ptr() + buffer.nbytes
    for tensor in (copy.ids, copy.inner.table, copy.weight):
        assert begin <= tensor.data_ptr() < end
        assert (tensor.data_ptr() - begin) % 16 == 0


def test_a_tensor_that_is_met_twice_travels_once() -> None:
    copy, buffer = through_a_buffer(make_tree())
    assert copy.inner.table is copy.again.table
    assert buffer.numel() == 32 + 32 + 16  # ids, table, weight, each rounded up to 16 bytes


def test_empty_tensors_and_strided_ones_are_kept() -> None:
    tree = Inner(torch.arange(8)[::2], 0, torch.empty(0, 2, dtype=torch.int32))
    layout, tensors = layout_of(tree)
    copy = rebuilt(layout, views(layout, packed(layout, tensors, CPU)))
    assert copy.table.tolist() == [0, 2, 4, 6]
    assert copy.missing is not None
    assert copy.missing.shape == (0, 2)


def test_a_cpu_gets_the_very_tensors() -> None:
    tree = make_tree()
    assert upload(tree, CPU) is tree


def test_what_is_written_on_the_host_arrives_on_the_same_memory_with_what_goes_up_beside_it() -> (
    None
):
    first = make_tree(0)
    static = StaticInputs(first, CPU)
    assert torch.equal(static.device.ids, first.ids)
    before = static.device.ids.data_ptr()
    static.host.ids[1] = 77
    (beside,) = static.send((torch.arange(4),))
    assert static.device.ids.data_ptr() == before
    assert static.device.ids.tolist() == [0, 77, 2]
    assert torch.equal(first.ids, torch.arange(3)), "the host's tensors were taken, not copied"
    assert beside.tolist() == [0, 1, 2, 3]


def test_a_download_holds_what_the_tensors_held_when_it_began() -> None:
    """A graph's outputs are overwritten by its next run, before the results are read."""
    tree = make_tree()
    before = tree.ids.clone()
    download = Download(tree, CPU)
    tree.ids.zero_()
    assert torch.equal(download.tree().ids, before)


def test_tuples_are_trees_too() -> None:
    tree = (make_tree(0), (torch.arange(3), 7), ())
    layout, tensors = layout_of(tree)
    copy = rebuilt(layout, views(layout, packed(layout, tensors, CPU)))
    assert torch.equal(copy[0].weight, tree[0].weight)
    assert torch.equal(copy[1][0], torch.arange(3))
    assert copy[1][1:] == (7,)
    assert copy[2] == ()
