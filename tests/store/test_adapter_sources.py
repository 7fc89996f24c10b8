"""Adapters from a hub, a bucket and a registry: the same version as from a folder, or a refusal."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from adapter_places import Places, adapter_places, files_of
from bucket_support import s3_server
from huggingface_hub import constants
from hypothesis import given
from hypothesis import strategies as st

from quickchange_store.errors import AdapterSourceError, SourceUnavailableError, StoreError
from quickchange_store.importing import add_adapter, add_from_url
from quickchange_store.sources.adapter_url import adapter_url
from quickchange_store.sources.fetching import fetched
from quickchange_store.store import Store


@pytest.fixture(scope="module")
def places() -> Iterator[Places]:
    with adapter_places() as made:
        yield made


@pytest.fixture(autouse=True)
def _fresh(places: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    places.fails = 0
    places.asked.clear()


@pytest.fixture
def adapter(train: Any, tmp_path: Path) -> Path:
    folder = tmp_path / "trained"
    train("llama", folder, r=4, target_modules=["q_proj"])
    return folder


def digests(store: Store) -> set[str]:
    return {version.digest for name in store.names() for version in store.versions(name)}


def test_the_same_adapter_from_everywhere_is_one_digest(
    places: Places, adapter: Path, bases: Any, tmp_path: Path
) -> None:
    base, store = bases("llama").spec, Store(tmp_path / "store")
    files = files_of(adapter)
    commit = places.publish("acme/orders", {**files, "optimizer.pt": b"x", "runs/log.json": b"{}"})
    manifest = places.push("team/orders", "v1", files)
    add_adapter(store, "folder", adapter, base)
    hub = add_from_url(store, "hub", adapter_url("hf://acme/orders"), base)
    oci = add_from_url(store, "oci", adapter_url(f"oci://{places.address}/team/orders:v1"), base)
    assert len(digests(store)) == 1
    assert not any("optimizer" in path for path in places.asked)
    assert hub.version.digest == oci.version.digest
    with fetched(adapter_url(f"hf://acme/orders@{commit}")) as there:
        assert there.origin["revision"] == commit
    with fetched(adapter_url(f"oci://{places.address}/team/orders@{manifest}")) as there:
        assert there.origin["revision"] == manifest


def test_an_adapter_lies_in_a_bucket(adapter: Path, bases: Any, tmp_path: Path) -> None:
    with s3_server():
        files = fsspec.filesystem("s3", skip_instance_cache=True)
        for name, content in files_of(adapter).items():
            files.pipe_file(f"adapters/team/orders/{name}", content)
        files.pipe_file("adapters/team/orders-2/adapter_config.json", b"{}")
        store = Store(tmp_path / "store")
        added = add_from_url(
            store, "mine", adapter_url("s3://adapters/team/orders"), bases("llama").spec
        )
        with (
            pytest.raises(AdapterSourceError, match="no object begins so"),
            fetched(adapter_url("s3://adapters/team/other")),
        ):
            pass
        with pytest.raises(AdapterSourceError), fetched(adapter_url("s3://not-there/orders")):
            pass
    source = store.info(added.version.digest).source
    assert source["from"] == {"url": "s3://adapters/team/orders"}
    assert (
        added.version.digest
        == add_adapter(store, "again", adapter, bases("llama").spec).version.digest
    )


def test_a_folder_of_a_repository_and_its_branches_are_named(places: Places, adapter: Path) -> None:
    files = files_of(adapter)
    places.publish("acme/many", {f"fine/{name}": each for name, each in files.items()}, "dev")
    with fetched(adapter_url("hf://acme/many@dev/fine")) as there:
        kept = {name: each for name, each in files.items() if name != "README.md"}
        assert files_of(there.folder) == kept
    with (
        pytest.raises(AdapterSourceError, match="no files of an adapter"),
        fetched(adapter_url("hf://acme/many@dev")),
    ):
        pass


@pytest.mark.parametrize("url", ["hf://acme/none", "hf://acme/none@v9", "oci://{}/team/none:v1"])
def test_what_is_not_there_is_said_with_a_remedy(places: Places, url: str) -> None:
    with (
        pytest.raises(AdapterSourceError, match="see the URL") as caught,
        fetched(adapter_url(url.format(places.address))),
    ):
        pass
    assert caught.value.file == url.format(places.address)


@pytest.mark.parametrize("url", ["hf://acme/orders", "oci://{}/team/orders:v1"])
def test_a_place_that_fails_is_unavailable_at_once(places: Places, url: str) -> None:
    places.fails = 503
    with pytest.raises(SourceUnavailableError), fetched(adapter_url(url.format(places.address))):
        pass


def test_a_registry_that_is_away_is_unavailable_at_once() -> None:
    with pytest.raises(SourceUnavailableError), fetched(adapter_url("oci://127.0.0.1:9/a/b:v1")):
        pass


def test_what_is_larger_than_allowed_is_not_fetched(places: Places, adapter: Path) -> None:
    places.publish("acme/orders", files_of(adapter))
    with (
        pytest.raises(AdapterSourceError, match="max_upload_bytes"),
        fetched(adapter_url("hf://acme/orders"), most_bytes=100),
    ):
        pass
    assert not any("resolve" in path for path in places.asked)


def test_bytes_that_are_not_the_manifests_are_refused(places: Places, adapter: Path) -> None:
    files = files_of(adapter)
    places.push("team/other", "v1", files)
    for digest, content in places.blobs.items():
        if content == files["adapter_config.json"]:
            places.blobs[digest] = content + b" "
    with (
        pytest.raises(AdapterSourceError, match="while the manifest says"),
        fetched(adapter_url(f"oci://{places.address}/team/other:v1")),
    ):
        pass


def test_prefixes_allow_whole_parts_alone() -> None:
    url = adapter_url("hf://acme/orders@main")
    assert url.within(["hf://acme/orders"])
    assert url.within(["s3://x", " hf://acme"])
    assert url.within(["hf://"])
    assert not url.within(["hf://acme/ord", "hf://ac", "https://", "*", ""])


@pytest.mark.parametrize(
    "text",
    [
        "hf://acme",
        "hf://acme/x/../y",
        "hf://a/b?token=x",
        "hf://me:secret@acme/x",
        "s3://bucket",
        "s3://me:secret@bucket/x",
        "s3://bucket/a//b",
        "s3://bucket/../x",
        "oci://registry",
        "oci://me:secret@host/x",
        "https://host/x",
        "file:///etc",
        "://",
        "hf://",
    ],
)
def test_what_no_url_of_an_adapter_says_is_refused_without_repeating_it(text: str) -> None:
    with pytest.raises(AdapterSourceError) as caught:
        adapter_url(text)
    assert "secret" not in str(caught.value)
    assert "token" not in str(caught.value)


@given(st.text(max_size=80), st.sampled_from(["hf://", "s3://", "gs://", "oci://", ""]))
def test_any_text_is_a_url_or_refused(text: str, scheme: str) -> None:
    try:
        url = adapter_url(scheme + text)
    except StoreError:
        return
    assert ".." not in url.path.split("/")
    assert url.within([scheme]) if scheme else True
