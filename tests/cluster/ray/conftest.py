"""One cluster of two engines for the tests of this folder, and a single server to compare with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="the extra [ray] is not installed")

from cluster_harness import LiveCluster, live_cluster
from llm_models import LlmModels, make_llm_models

from quickchange_store.base_model.base_spec import base_spec
from quickchange_store.importing import add_adapter
from quickchange_store.store import Store


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> LlmModels:
    return make_llm_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def store(models: LlmModels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapters `sql` and `orders`."""
    folder = tmp_path_factory.mktemp("cluster") / "store"
    for name, path in models.adapters.items():
        add_adapter(Store(folder), name, path, base_spec(str(models.path)))
    return folder


@pytest.fixture(scope="session")
def cluster(models: LlmModels, store: Path) -> Iterator[LiveCluster]:
    with live_cluster(models.path, store) as live:
        yield live
