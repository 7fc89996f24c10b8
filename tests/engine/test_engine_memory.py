"""An engine on a device whose memory is divided: measured first, then filled, never beyond.

The device is a stand-in that counts what the process comes to hold, the arena's and the caches'
tensors, and what the base, captured graphs and steps are said to take.
"""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_driver import Driver, engine_of, make_engine, request
from repeating_capture import RepeatingCapture
from tiny_models import save_model

from quickchange_server.config import Settings
from quickchange_server.engine import engine as engine_module
from quickchange_server.engine import engine_memory, model_runner
from quickchange_server.engine.memory.footprint import tensor_bytes
from quickchange_server.engine.model_runner import Runner
from quickchange_server.errors import SettingError
from quickchange_server.model.loading.model_loader import LoadedModel, load_model

GRAPH_BYTES, STEP_BYTES, BASE = 3 << 20, 5 << 20, 1 << 20
CPU = torch.device("cpu")


class CountedMemory:
    """Counts every tensor that lives, and adds what graphs and steps of a GPU would take."""

    def __init__(self, total: int, capture: RepeatingCapture) -> None:
        self.total = total
        self.peak = 0
        self._capture = capture
        gc.collect()
        gc.freeze()  # what is there already is not looked at again

    def in_use(self) -> int:
        # The last runner's graphs alone live: those of the first are gone with it.
        graphs = GRAPH_BYTES if self._capture.rows else 0
        return BASE + self._living() + graphs

    def growth(self, work: Callable[[], None]) -> int:
        before = self.in_use()
        work()
        return self.in_use() + STEP_BYTES - before

    def _living(self) -> int:
        gc.collect()
        found = {}
        for each in gc.get_objects():
            if type(each) in (torch.Tensor, torch.nn.Parameter) and not each.is_meta:
                found[each.untyped_storage().data_ptr()] = each.untyped_storage().nbytes()
        return sum(found.values())


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("base"))


@pytest.fixture
def model(path: Path) -> LoadedModel:
    return load_model(str(path), dtype=torch.float32, device=CPU, adapters=True)


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> RepeatingCapture:
    repeating = RepeatingCapture()
    monkeypatch.setattr(model_runner, "capture_for", lambda _device: repeating)
    return repeating


@pytest.fixture
def device(
    capture: RepeatingCapture, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[int], CountedMemory]]:
    def of(total: int) -> CountedMemory:
        memory = CountedMemory(total, capture)
        monkeypatch.setattr(engine_module, "memory_of", lambda _: memory)
        return memory

    yield of
    gc.unfreeze()


def settings(path: Path, **options: object) -> Settings:
    small = {
        "model": str(path),
        "store": path,
        "block_size": 4,
        "max_batch_tokens": 16,
        "max_sequences": 4,
    }
    return Settings.model_validate({**small, **options})


@pytest.mark.parametrize("share", [0.5, 0.9])
@pytest.mark.parametrize("arena", [None, 1 << 20])
def test_keys_and_values_get_what_the_rest_leaves(
    share: float,
    arena: int | None,
    path: Path,
    device: Callable[[int], CountedMemory],
    model: LoadedModel,
) -> None:
    memory = device(64 << 20)
    given = settings(path, gpu_memory_utilization=share, adapter_device_bytes=arena)
    engine = engine_of(model, given)
    engine.submit(request("one", [1, 2, 3], max_tokens=4))
    Driver(engine).finish("one")
    most = memory.in_use() + STEP_BYTES
    engine.close()
    limit = int(share * memory.total)
    assert limit - (1 << 20) < most <= limit + (1 << 16), "nothing is left, and nothing is over"


def test_the_runner_that_was_measured_is_gone_before_the_real_caches_are_taken(
    path: Path,
    device: Callable[[int], CountedMemory],
    model: LoadedModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device(64 << 20)
    made: list[weakref.ref[Runner]] = []
    alive: list[int] = []

    class Watched(Runner):
        def __init__(self, *args: Any, **options: Any) -> None:
            alive.append(sum(one() is not None for one in made))
            super().__init__(*args, **options)
            made.append(weakref.ref(self))

    monkeypatch.setattr(engine_memory, "Runner", Watched)
    gc.disable()  # runners lie in cycles, and no chance collection is to be relied on
    try:
        engine_of(model, settings(path)).close()
    finally:
        gc.enable()
    assert alive == [0, 0]


def test_what_is_measured_is_captured_twice_and_the_second_time_on_the_real_caches(
    path: Path,
    device: Callable[[int], CountedMemory],
    capture: RepeatingCapture,
    model: LoadedModel,
) -> None:
    device(64 << 20)
    engine_of(model, settings(path)).close()
    half = len(capture.rows) // 2
    assert capture.rows[:half] == capture.rows[half:] != []


def test_a_cache_of_a_set_size_gets_that_size(
    path: Path, device: Callable[[int], CountedMemory], model: LoadedModel
) -> None:
    device(64 << 20)
    engine = engine_of(model, settings(path, kv_cache_bytes=1 << 20))
    engine.close()
    block = 2 * 2 * 3 * 12 * 4 * 4 // 1
    assert engine.scheduler.blocks.num_blocks == (1 << 20) // block


def test_a_device_without_room_for_a_sequence_refuses_with_what_fits(
    path: Path, device: Callable[[int], CountedMemory], model: LoadedModel
) -> None:
    device(12 << 20)
    with pytest.raises(SettingError, match=r"gpu_memory_utilization.*What would fit") as caught:
        engine_of(model, settings(path, adapter_device_bytes=1 << 20))
    assert caught.value.param == "gpu_memory_utilization"


def test_an_arena_larger_than_what_the_base_leaves_is_refused(
    path: Path, device: Callable[[int], CountedMemory], model: LoadedModel
) -> None:
    device(12 << 20)
    with pytest.raises(SettingError, match=r"adapter_device_bytes \(\d+\): the base leaves"):
        engine_of(model, settings(path, adapter_device_bytes=1 << 30))


def test_a_step_that_runs_out_of_memory_while_measured_is_refused_by_name(
    path: Path,
    device: Callable[[int], CountedMemory],
    model: LoadedModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device(64 << 20)

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(model_runner.Runner, "rehearse", full)
    with pytest.raises(SettingError, match=r"a step of 16 rows does not fit.*--max-batch-tokens"):
        engine_of(model, settings(path))


def test_an_engine_on_a_cpu_tells_what_takes_memory(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        engine = make_engine(path)
    engine.close()
    (table,) = [r.message for r in caplog.records if r.message.startswith("memory:")]
    names = [line.split("  ")[1] for line in table.splitlines()[1:]]
    assert names == ["base", "adapters", "graphs", "scratch", "KV cache", "sum"]
    assert "all-linear rank-16" in table


def test_weights_in_one_memory_are_counted_once(model: LoadedModel) -> None:
    distinct = {p.untyped_storage().data_ptr(): p.nbytes for p in model.module.parameters()}
    assert tensor_bytes(model.module) >= sum(distinct.values())
    linear = torch.nn.Linear(4, 4, bias=False)
    twice = torch.nn.ModuleList([linear, torch.nn.Linear(4, 4, bias=False)])
    twice[1].weight = linear.weight
    assert tensor_bytes(twice) == 64
