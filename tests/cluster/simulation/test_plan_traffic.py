"""`quickchange plan --traffic`: its models of a replica, and what affinity is worth."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from quickchange_server.cluster.simulation.plan_traffic import plan_traffic
from quickchange_server.cluster.simulation.replica_model import of_ready, read_model
from quickchange_server.cluster.simulation.simulation import ClusterModel, simulate
from quickchange_server.cluster.simulation.traffic import traffic
from quickchange_server.errors import SettingError
from quickchange_server.protocol import Ready

MEASURED: dict[str, Any] = {
    "prices": [[1, 0.006], [64, 0.008], [512, 0.02]],
    "adapter_bytes": 1 << 20,
    "adapter_device_bytes": 40 << 20,
    "adapter_host_bytes": 200 << 20,
    "kv_tokens": 100_000,
}
READY = Ready(
    4096, 1000, 16, 1.0, 40 << 20, 200 << 20, ((1, 0.006), (1, 0.007), (64, 0.008), (192, 0.02))
)


def written(tmp_path: Path, **changed: Any) -> Path:
    values = {name: value for name, value in {**MEASURED, **changed}.items() if value is not ...}
    path = tmp_path / "replica.json"
    path.write_text(json.dumps(values))
    return path


def planned(path: Path | None, **options: Any) -> str:
    given: dict[str, Any] = {
        "trace": "zipf:adapters=20,rate=5,seconds=10",
        "replicas": 2,
        "policy": None,
        "gpu": None,
        "ranks": None,
        **options,
    }
    return plan_traffic({}, measured=None if path is None else str(path), **given)


def test_the_table_has_a_line_for_each_way_of_routing(tmp_path: Path) -> None:
    text = planned(written(tmp_path))
    assert "2 replicas, each with room for 40 adapters on the device and 200 on the host" in text
    assert "6.00 ms for 1 row" in text
    assert [line.split()[0] for line in text.splitlines()[5:8]] == [
        "affinity",
        "random",
        "least-loaded",
    ]
    only = planned(written(tmp_path), policy="random")
    assert "affinity" not in only


def test_a_replica_may_be_as_its_engine_told(tmp_path: Path) -> None:
    path = tmp_path / "ready.json"
    path.write_text(json.dumps({**asdict(READY), "adapter_bytes": 1 << 20}))
    model = read_model(path)
    assert model == of_ready(READY, adapter_bytes=1 << 20)
    assert (model.kv_tokens, model.device_room) == (16_000, 40)
    assert model.price_table()[1] == pytest.approx(0.0065)  # the median of what was measured


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"prices": ...}, "prices: is missing"),
        ({"prices": [[1, 0.1]]}, "prices: give"),
        ({"prices": [[1, 0.1], [2, -1]]}, "prices: give"),
        ({"prices": "x"}, "prices: give"),
        ({"adapter_bytes": 0}, "adapter_bytes: 0 is too small"),
        ({"kv_tokens": 1.5}, "kv_tokens: 1.5 is not a whole number"),
        ({"kv_token": 1}, "kv_token: is none of prices"),
        ({"copy_seconds": "x"}, "copy_seconds: 'x' is not a number"),
    ],
)
def test_a_mistake_in_a_replicas_file_is_named(
    tmp_path: Path, changed: dict[str, Any], said: str
) -> None:
    with pytest.raises(SettingError, match=said):
        planned(written(tmp_path, **changed))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"replicas": 0}, "--replicas 0: give at least 1"),
        ({"policy": "best"}, "--policy best: give one of affinity"),
        ({"trace": "zipf:prompt=900000,seconds=10"}, "room for 100000"),
    ],
)
def test_a_mistaken_option_is_named(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingError, match=said):
        planned(written(tmp_path), **options)


def test_without_prices_the_options_that_give_them_are_named() -> None:
    with pytest.raises(SettingError, match=r"--measured FILE, or --gpu"):
        planned(None)
    with pytest.raises(SettingError, match=r"--measured FILE, or --gpu"):
        planned(None, gpu="24GiB")


def test_a_gpus_data_sheet_gives_the_least_a_step_can_take(tmp_path: Path) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 1000,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = 2 * (256 * (256 + 128 + 128 + 256) + 3 * 256 * 512 + 2 * 256) + 2 * 1000 * 256 + 256
    text = plan_traffic(
        {"model": str(tmp_path)},
        trace="zipf:adapters=20,rate=5,seconds=10",
        replicas=2,
        policy="affinity",
        measured=None,
        gpu="h100",
        ranks="16",
    )
    assert f"{2 * weights / 3.35e12 * 1e3:.2f} ms for 1 row" in text
    assert "data sheet of h100" in text


def test_affinity_keeps_two_replicas_with_room_for_40_of_64_adapters_at_their_adapters(
    tmp_path: Path,
) -> None:
    cluster = ClusterModel(replica=read_model(written(tmp_path)), replicas=2, ingresses=2)
    requests = traffic("zipf:adapters=64,rate=20,seconds=150,prompt=64,output=16")
    affinity, anywhere = (simulate(requests, cluster, name) for name in ("affinity", "random"))
    assert affinity.hit_rate >= 0.95
    assert affinity.late_hit_rate >= 0.99
    assert affinity.store_loads < 0.7 * anywhere.store_loads
    assert affinity.first_token(0.99) <= anywhere.first_token(0.99) * 1.05


def test_a_single_hot_adapter_spreads_over_replicas_and_loads_once_on_each(tmp_path: Path) -> None:
    cluster = ClusterModel(replica=read_model(written(tmp_path, max_sequences=32)), replicas=4)
    requests = traffic("zipf:adapters=1,rate=200,seconds=10,prompt=64,output=64")
    outcome = simulate(requests, cluster, "affinity")
    used = [count for count in outcome.placed if count]
    assert len(used) >= 3
    assert outcome.store_loads == outcome.copies == len(used)
    assert max(outcome.placed) / (sum(outcome.placed) / 4) < 1.7
