"""What a replica of Ray Serve LLM takes of the cluster."""

from __future__ import annotations

from typing import Any

import pytest

from quickchange_server.cluster.llm.replica_resources import ReplicaResources, replica_resources
from quickchange_server.errors import SettingError


def made(
    engine_kwargs: dict[str, Any] | None = None,
    kind: str = "gpu",
    accelerator: str | None = None,
    placement: dict[str, Any] | None = None,
    **actor: Any,
) -> ReplicaResources:
    return replica_resources(
        engine_kwargs or {},
        kind=kind,
        accelerator_type=accelerator,
        placement=placement,
        actor=actor,
    )


def test_a_gpu_for_each_rank_belongs_to_the_actor() -> None:
    taken = made({"tensor_parallel_size": 4}, accelerator="H100")
    assert (taken.device, taken.threads) == ("cuda", None)
    options = taken.actor_options({"num_cpus": 1, "runtime_env": {}})
    expected = {"num_cpus": 1.0, "num_gpus": 4.0, "accelerator_type": "H100", "runtime_env": {}}
    assert options == expected


def test_a_replica_on_a_cpu_takes_no_gpu_and_as_many_threads_as_cpus() -> None:
    taken = made(kind="cpu", num_cpus=3)
    assert (taken.device, taken.threads) == ("cpu", 3)
    assert taken.actor_options({}) == {"num_cpus": 3.0, "num_gpus": 0.0}


@pytest.mark.parametrize(
    "placement",
    [
        {"bundle_per_worker": {"CPU": 2, "GPU": 1}},
        {"bundles": [{"CPU": 2, "GPU": 1}, {"CPU": 2, "GPU": 1}], "strategy": "STRICT_PACK"},
    ],
)
def test_bundles_are_added_up(placement: dict[str, Any]) -> None:
    taken = made({"tensor_parallel_size": 2}, placement=placement, memory=10, resources={"x": 1})
    options = taken.actor_options({})
    assert options == {"num_cpus": 5.0, "num_gpus": 2.0, "memory": 10.0, "resources": {"x": 1.0}}


def test_a_bundle_of_cpus_is_the_engines_threads() -> None:
    taken = made(kind="cpu", placement={"bundles": [{"CPU": 4}]})
    assert (taken.threads, taken.cpus) == (4, 5.0)


def test_a_part_of_a_gpu_may_be_taken() -> None:
    taken = made(placement={"bundle_per_worker": {"GPU": 0.5}})
    assert taken.actor_options({})["num_gpus"] == 0.5


def test_the_device_of_engine_kwargs_counts_first() -> None:
    assert made({"device": "cpu"}).gpus == 0.0


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"kind": "tpu"}, "accelerator_config"),
        ({"engine_kwargs": {"tensor_parallel_size": 0}}, "tensor_parallel_size"),
        ({"placement": {}}, "placement_group_config"),
        (
            {"placement": {"bundles": [{"GPU": 1}], "bundle_per_worker": {}}},
            "placement_group_config",
        ),
        (
            {"placement": {"bundles": [{"GPU": 1}] * 2, "strategy": "SPREAD"}},
            "placement_group_config.strategy",
        ),
        (
            {
                "engine_kwargs": {"tensor_parallel_size": 4},
                "placement": {"bundles": [{"GPU": 1}] * 2},
            },
            "placement_group_config",
        ),
    ],
)
def test_what_cannot_be_placed_is_refused(wrong: dict[str, Any], param: str) -> None:
    with pytest.raises(SettingError) as error:
        made(**wrong)
    assert error.value.param == param
