"""No request waits for a compiler or a capture: what the start launched is all that is launched.

The engine and its launchers run as on a GPU that is not there (`launch_record.py`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from bought_drafts import every_draft_bought
from engine_driver import Driver, make_settings, request
from hypothesis import HealthCheck, Phase, given, settings
from launch_record import LaunchRecord, graphs_recorded, recorded_launches
from mixed_traffic import TrafficLimits, adapter_for, renamed, traffic
from tiny_models import VOCABULARY, save_model

from quickchange_server.engine.engine import Engine
from quickchange_server.model.loading.model_loader import LoadedModel, load_model
from quickchange_server.protocol import Submit

CONTEXT = 2048
RARE = {"merge_splits_kernel", "filter_kernel", "verify_kernel", "turbo_heads_kernel"}


@dataclass
class Served:
    """A running engine and what it launches."""

    engine: Engine
    drive: Driver
    record: LaunchRecord
    model: LoadedModel


@contextmanager
def served(folder: Path, family: str, dtype: str, **options: object) -> Iterator[Served]:
    """An engine on a model of this family, as it would be on a GPU."""
    path = save_model(family, folder)
    config = json.loads((path / "config.json").read_text())
    config["max_position_embeddings"] = CONTEXT
    (path / "config.json").write_text(json.dumps(config))
    model = load_model(
        str(path), dtype=getattr(torch, dtype), device=torch.device("cpu"), adapters=True
    )
    some = {
        "dtype": dtype,
        "block_size": 16,
        "max_batch_tokens": 512,
        "max_sequences": 20,
        "kv_cache_bytes": 64 << 20,
        "adapter_device_bytes": 64 << 20,
        "adapter_host_bytes": 128 << 20,
        **options,
    }
    with recorded_launches() as record, graphs_recorded(record):
        engine = Engine(
            model,
            make_settings(path, some),
            load_adapter=lambda digest, _: adapter_for(model, digest),
            on_wake=lambda: None,
            depth=2,
        )
        engine.check_integrity = lambda: None  # type: ignore[method-assign]  # slow, and not the matter
        try:
            yield Served(engine, Driver(engine), record, model)
        finally:
            engine.close()


def serve(one: Served, arrivals: list[tuple[Submit, int]]) -> None:
    """Serve requests as they arrive, to the end of all."""
    ids = []
    for submit, pause in renamed(arrivals):
        one.engine.submit(submit)
        ids.append(submit.request_id)
        for _ in range(pause):
            one.drive.step()
    one.drive.finish(*ids)
    # Nothing is computed, so what is read of a prompt may be anything; all else must be right.
    errors = [one.drive.last[i].error or "" for i in ids]
    assert [e for e in errors if e and "can't be read" not in e and "not finite" not in e] == []


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("llama", "bfloat16"),
        ("llama", "float32"),
        ("qwen3", "float16"),
        ("gemma2", "bfloat16"),
        ("qwen3_moe", "bfloat16"),
    ],
)
def test_no_traffic_meets_a_kernel_that_the_start_did_not_compile(
    family: str, dtype: str, tmp_path: Path
) -> None:
    with served(tmp_path, family, dtype) as one, every_draft_bought():
        known = one.record.known()

        @settings(
            max_examples=5,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(traffic(TrafficLimits(prompt=900, vocabulary=VOCABULARY)))
        def check(arrivals: list[tuple[Submit, int]]) -> None:
            serve(one, arrivals)

        one.record.launches.clear()
        check()
        assert one.record.keys_since(known) == []
        stats = one.engine.stats()
        assert (stats.late_compilations, stats.late_captures) == (0, 0)
        assert set(one.record.launches) >= RARE, "the traffic lacks something"


def test_no_adapter_voids_a_graph_however_many_and_wide_they_are(tmp_path: Path) -> None:
    """The 65th slot, ranks 64 and 128: graphs read tables that stay where they are."""
    with served(tmp_path, "llama", "bfloat16", adapter_device_bytes=256 << 20) as one:
        known, captured = one.record.known(), len(one.record.captures)
        names = [f"lora-{rank}-a" for rank in (8, 64, 128)]
        names += [f"lora-8-{place}" for place in range(66)]
        for name in names:
            serve(one, [(request("0", [1, 2, 3], [(name, 1.0)], max_tokens=4), 0)])
        for name in names[:3] + names[-1:]:  # and together with others
            serve(one, [(request("0", [1], [(n, 1.0)], max_tokens=4), 0) for n in (name, names[4])])
        assert len(one.record.captures) == captured
        assert one.record.keys_since(known) == []
        stats = one.engine.stats()
        assert (stats.late_compilations, stats.late_captures) == (0, 0)
