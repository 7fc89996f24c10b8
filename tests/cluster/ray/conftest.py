"""One cluster of two engines for the tests of this folder, and a single server to compare with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="the extra [ray] is not installed")

from bucket_support import s3_server
from cluster_harness import LiveCluster, live_cluster
from cluster_streams import LORAS
from llm_models import LlmModels, make_llm_models
from random_updates import random_adapter

from quickchange_server.entrypoints.llm import LLM
from quickchange_store.base_model.base_spec import base_spec
from quickchange_store.importing import add_adapter
from quickchange_store.store import Store

CONTEXT = 4096  # tools' prompts are long, with a token a character


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> LlmModels:
    made = make_llm_models(tmp_path_factory.mktemp("models"))
    config = made.path / "config.json"
    longer = json.loads(config.read_text()) | {"max_position_embeddings": CONTEXT}
    config.write_text(json.dumps(longer))
    return made


@pytest.fixture(scope="session")
def store(models: LlmModels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapters `sql` and `orders`, and LORAS, which are random; for LoRAX `team/sql`."""
    folder = tmp_path_factory.mktemp("cluster") / "store"
    base = base_spec(str(models.path))
    for name, path in models.adapters.items():
        add_adapter(Store(folder), name, path, base)
    for seed, name in enumerate(LORAS):
        Store(folder).add(name, random_adapter(base, seed), base)
    for name, seed in (("team/sql", 0), ("json", 1)):  # as LoRAX's client asks for
        Store(folder).add(name, random_adapter(base, seed), base)
    return folder


@pytest.fixture(scope="session")
def single(models: LlmModels, store: Path) -> Iterator[LLM]:
    """One engine without a cluster, over the same base and store."""
    with LLM(model=str(models.path), store=store, threads=1, dtype="float32") as llm:
        yield llm


@pytest.fixture(scope="session")
def bucket() -> Iterator[str]:
    """The URL of an empty bucket on a small S3 server, which nodes have in their environment."""
    with s3_server():
        yield "s3://adapters"


@pytest.fixture(scope="session")
def cluster(models: LlmModels, store: Path, bucket: str) -> Iterator[LiveCluster]:  # noqa: ARG001
    """Two engines, each on a node of its own, and two ingresses; a third node for upgrades."""
    size = {"ingresses": 2, "engine_cpus": 0.6}  # a node has one, in Ray's books
    with live_cluster(models.path, store, workers=3, worker_cpus=1, cluster=size) as live:
        live.wait_for("Ingress", 2)
        yield live
