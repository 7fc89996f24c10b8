"""A model and adapters in a bucket, read with Ray's own clients."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest

pytest.importorskip("pyarrow", reason="ray.serve.llm needs pyarrow")

from moto import mock_aws
from ray_llm import llm_config

from quickchange_server.cluster.llm import ray_buckets
from quickchange_server.cluster.llm.ray_buckets import LoraBucket, local_model, lora_bucket
from quickchange_server.errors import UnavailableError, UnknownModelError

FILES = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"weights"}


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An S3 bucket with the adapter `a:b`, and a parent folder that is no adapter."""
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with mock_aws():
        client = boto3.client("s3")
        client.create_bucket(Bucket="bucket")
        for name, content in FILES.items():
            client.put_object(Bucket="bucket", Key=f"lora/a:b/{name}", Body=content)
            client.put_object(Bucket="bucket", Key=f"lora/parent/a/{name}", Body=content)
        yield client


def fetch(folder: Path, adapter: str, **changes: Any) -> None:
    options: dict[str, Any] = {"url": "s3://bucket/lora", "try_seconds": 30.0, "tries": 1}
    asyncio.run(LoraBucket(**{**options, **changes}).fetch(adapter, folder))


@pytest.mark.usefixtures("bucket")
def test_an_adapters_files_are_copied(tmp_path: Path) -> None:
    fetch(tmp_path, "a:b")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == FILES


@pytest.mark.usefixtures("bucket")
@pytest.mark.parametrize("adapter", ["a", "a:b/c", "parent"])
def test_a_folder_without_a_configuration_is_no_adapter(tmp_path: Path, adapter: str) -> None:
    with pytest.raises(UnknownModelError, match="s3://bucket/lora"):
        fetch(tmp_path, adapter)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("bucket")
def test_a_bucket_out_of_reach_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []

    def fails(**_options: Any) -> None:
        tried.append("once more")
        raise OSError("out of reach")

    monkeypatch.setattr(ray_buckets.CloudFileSystem, "download_files", fails)
    monkeypatch.setattr(ray_buckets, "PAUSE_SECONDS", 0.0)
    with pytest.raises(UnavailableError, match="can't be fetched now"):
        fetch(tmp_path, "a:b", tries=3)
    assert len(tried) == 3


def test_the_bucket_and_its_limits_are_the_configurations() -> None:
    assert lora_bucket(llm_config()) is None
    lora = {
        "dynamic_lora_loading_path": "s3://bucket/lora/",
        "download_timeout_s": 7.0,
        "max_download_tries": 2,
    }
    assert lora_bucket(llm_config(lora_config=lora)) == LoraBucket("s3://bucket/lora", 7.0, 2)


@pytest.mark.parametrize("source", ["folder/of/model", "owner/name", None])
def test_a_folder_or_a_hub_id_is_taken_as_it_is(source: str | None) -> None:
    loading = {"model_id": "id", "model_source": source}
    assert local_model(llm_config(model_loading_config=loading)) == (source or "id")


def test_a_model_in_a_bucket_is_copied_here(
    bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HOME", str(tmp_path))
    bucket.put_object(Bucket="bucket", Key="model/config.json", Body=b"{}")
    for source in ("s3://bucket/model", {"bucket_uri": "s3://bucket/model"}):
        loading = {"model_id": "org/tiny", "model_source": source}
        found = Path(local_model(llm_config(model_loading_config=loading)))
        assert found.is_relative_to(tmp_path)
        assert [file.name for file in found.iterdir()] == ["config.json"]
