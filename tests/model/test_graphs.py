"""Decode steps from captured graphs: the bookkeeping, on the CPU.

A graph here is the computation itself, called again on the same memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from repeating_capture import RepeatingCapture
from torch import Tensor

from quickchange_kernels.lowrank.lowrank_contract import LowRankTables
from quickchange_kernels.random_inputs import random_tables
from quickchange_server.adapters.memory_pool import DevicePool
from quickchange_server.adapters.module_groups import Member, ModuleGroup
from quickchange_server.adapters.packing import build_image, page_shapes
from quickchange_server.model.graphs.cuda_graphs import Graphs, Outputs
from quickchange_store.canonical.canonical_adapter import CanonicalAdapter, LowRankUpdate

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Inputs:
    values: Tensor


def doubled(inputs: Inputs, tables: LowRankTables | None) -> Outputs:
    return (inputs.values * 2 + (0 if tables is None else tables.page_scale.sum()),)


class Running:
    """Graphs whose inputs are written and run at once."""

    def __init__(self, graphs: Graphs[Inputs]) -> None:
        self.graphs = graphs

    def run(self, key: str, inputs: Inputs, tables: LowRankTables | None) -> Outputs:
        written = self.graphs.inputs(key, lambda: inputs)
        written.values.copy_(inputs.values)
        outputs, nothing = self.graphs.run(key, tables, ())
        assert nothing == ()
        return outputs


def make_graphs() -> tuple[Running, RepeatingCapture]:
    capture = RepeatingCapture()
    return Running(Graphs(doubled, capture, CPU)), capture


def make_tables() -> LowRankTables:
    return random_tables(8, [8], [8, 8], torch.Generator().manual_seed(0))


def test_a_key_is_captured_once_and_replayed_on_new_values() -> None:
    graphs, capture = make_graphs()
    for value in (1.0, 2.0, 3.0):
        (out,) = graphs.run("a", Inputs(torch.full((4,), value)), None)
        assert torch.equal(out, torch.full((4,), 2 * value))
    assert (len(capture.rows), capture.replayed) == (1, 3)


def test_each_key_has_its_own_graph() -> None:
    graphs, capture = make_graphs()
    graphs.run("two", Inputs(torch.ones(2)), None)
    graphs.run("three", Inputs(torch.ones(3)), None)
    assert graphs.run("two", Inputs(torch.full((2,), 5.0)), None)[0].tolist() == [10.0, 10.0]
    assert len(capture.rows) == 2


def test_contents_of_the_tables_may_change_without_a_new_capture() -> None:
    graphs, capture = make_graphs()
    tables = make_tables()
    graphs.run("a", Inputs(torch.zeros(1)), tables)
    tables.page_scale.fill_(1.0)
    same = dataclasses.replace(tables)  # another object on the same tensors
    (out,) = graphs.run("a", Inputs(torch.zeros(1)), same)
    assert out.item() == tables.page_scale.numel()
    assert len(capture.rows) == 1


def test_tables_on_other_memory_are_captured_anew() -> None:
    graphs, capture = make_graphs()
    tables = make_tables()
    graphs.run("a", Inputs(torch.zeros(1)), tables)
    grown = dataclasses.replace(tables, page_scale=torch.full((9,), 1.0))
    assert graphs.run("a", Inputs(torch.zeros(1)), grown)[0].item() == 9.0
    assert len(capture.rows) == 2
    assert graphs.run("a", Inputs(torch.ones(1)), grown)[0].item() == 11.0
    assert len(capture.rows) == 2


WIDTH = 32
GROUPS = [ModuleGroup(0, "linear", WIDTH, WIDTH, (Member("m", 0, WIDTH),))]


def load(pool: DevicePool, rank: int) -> int:
    update = LowRankUpdate(torch.ones(rank, WIDTH), torch.ones(WIDTH, rank), 1.0)
    adapter = CanonicalAdapter("L", "base", {"m": update})
    image = build_image(adapter, page_shapes(GROUPS, pool.dtype), pool.dtype)
    slot = pool.allocate(image)
    assert slot is not None
    pool.write(slot, image)
    pool.publish(slot)
    return slot


def test_adapters_of_any_rank_come_and_go_without_a_new_capture() -> None:
    pool = DevicePool(GROUPS, 1 << 20, torch.float32, CPU)
    graphs, capture = make_graphs()
    graphs.run("a", Inputs(torch.zeros(1)), pool.tables)
    for rank in (4, 8, 16, 64, 300):
        slot = load(pool, rank)
        graphs.run("a", Inputs(torch.zeros(1)), pool.tables)
        pool.free(slot)
        graphs.run("a", Inputs(torch.zeros(1)), pool.tables)
    assert len(capture.rows) == 1


def test_graphs_write_their_outputs_to_the_same_memory() -> None:
    """So that logits of all shapes take the memory of the largest alone."""
    outputs: list[Outputs] = []

    def capture(compute: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
        outputs.append(compute())
        return (lambda: None), outputs[-1]

    graphs = Running(Graphs(doubled, capture, CPU))
    for rows in (4, 3, 1):
        (out,) = graphs.run(str(rows), Inputs(torch.full((rows,), 1.0 * rows)), None)
        assert out.tolist() == [2.0 * rows] * rows
    assert len({out.data_ptr() for (out,) in outputs}) == 1


def test_what_goes_up_beside_the_inputs_comes_out_on_the_device() -> None:
    graphs = Graphs(doubled, RepeatingCapture(), CPU)
    graphs.inputs("a", lambda: Inputs(torch.ones(2)))
    _, (beside, number) = graphs.run("a", None, (torch.arange(3), 7))
    assert (beside.tolist(), number) == ([0, 1, 2], 7)
