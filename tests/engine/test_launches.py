"""Launches of the real engine on a GPU that is not there: kernels a step, keys, captures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from engine_driver import Driver, engine_of, request
from launch_record import LaunchRecord, graphs_recorded, recorded_launches
from tiny_models import save_model

from quickchange_server.model.loading.model_loader import LoadedModel, load_model


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def loaded(llama: Path) -> LoadedModel:
    """Loaded and proved by the CPU's own kernels."""
    cpu = torch.device("cpu")
    return load_model(str(llama), dtype=torch.float32, device=cpu, adapters=True)


@pytest.fixture
def record(loaded: LoadedModel) -> Iterator[LaunchRecord]:  # noqa: ARG001  loads first
    with recorded_launches() as record, graphs_recorded(record):
        yield record


def test_a_decode_step_launches_nothing_outside_its_graph(
    loaded: LoadedModel, llama: Path, record: LaunchRecord
) -> None:
    engine = engine_of(loaded, llama)
    drive = Driver(engine)
    engine.submit(request("0", [1, 2, 3], max_tokens=5))
    drive.step()
    record.launches.clear()
    replayed = record.replayed
    drive.step()
    engine.close()
    assert record.replayed == replayed + 1
    assert dict(record.launches) == {}
