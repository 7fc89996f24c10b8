"""Model ids `BASE:ADAPTER` over the store: imported once, resolved by the id that a client sent."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest
from http_support import BASE_SPEC, make_adapter, write_peft
from hypothesis import given, settings
from hypothesis import strategies as st

from quickchange_server.adapter_registry.import_runner import ThreadRunner
from quickchange_server.adapter_registry.importer import Imports
from quickchange_server.cluster.llm.lora_ids import LoraCatalog, LoraIds, adapter_of, store_name
from quickchange_server.errors import UnavailableError, UnknownModelError
from quickchange_store.names import check_name
from quickchange_store.store import Store

BASE = "org/base"


class Bucket:
    """Adapters by id, in folders; counts what is fetched."""

    def __init__(self, folders: dict[str, Path], outages: int = 0) -> None:
        self.folders = folders
        self.outages = outages
        self.fetched: list[str] = []

    async def fetch(self, adapter: str, folder: Path) -> None:
        self.fetched.append(adapter)
        await asyncio.sleep(0.01)
        if self.outages:
            self.outages -= 1
            raise UnavailableError("out of reach")
        if adapter not in self.folders:
            raise UnknownModelError(f"no {adapter}")
        shutil.copytree(self.folders[adapter], folder, dirs_exist_ok=True)


def make_ids(store: Store, bucket: Bucket | None) -> tuple[LoraIds, LoraCatalog]:
    imports = Imports(ThreadRunner(store, lambda: BASE_SPEC), (BASE,), lambda _name: None)
    ids = LoraIds(BASE, store, imports, None if bucket is None else bucket.fetch)
    return ids, LoraCatalog(store, ids, adapters=True, turbo=True, lookup=True)


@settings(deadline=None)
@given(st.text(min_size=1, max_size=300))
def test_every_id_has_a_valid_name_of_its_own(adapter: str) -> None:
    assert check_name(store_name(adapter)) == store_name(adapter)
    assert store_name(adapter) != store_name(f"{adapter}:") != store_name(f"{adapter}/")


@pytest.mark.parametrize(
    ("model", "adapter"),
    [(f"{BASE}:a", "a"), (f"{BASE}:a:b/c", "a:b/c"), (BASE, None), ("a", None), ("x:a", None)],
)
def test_the_adapter_of_an_id_is_what_follows_the_base(model: str, adapter: str | None) -> None:
    assert adapter_of(BASE, model) == adapter


def test_all_who_wait_for_an_adapter_share_one_import(tmp_path: Path) -> None:
    bucket = Bucket({"a": write_peft(tmp_path / "a", 1.0)})
    ids, catalog = make_ids(Store(tmp_path / "store"), bucket)

    async def scenario() -> None:
        first = asyncio.create_task(ids.load(f"{BASE}:a"))
        await asyncio.sleep(0)
        first.cancel()  # one that goes away takes nothing from the others
        digests = await asyncio.gather(*(ids.load(f"{BASE}:a") for _ in range(5)))
        assert len(set(digests)) == 1
        assert bucket.fetched == ["a"]
        assert await ids.load(f"{BASE}:a") is None
        selection = catalog.select(f"{BASE}:a")
        assert selection.model == f"{BASE}:a"
        assert [c.digest for c in selection.adapters] == [digests[0]]

    asyncio.run(scenario())


def test_equal_weights_under_two_ids_are_one_version(tmp_path: Path) -> None:
    folder = write_peft(tmp_path / "a", 1.0)
    ids, catalog = make_ids(Store(tmp_path / "store"), Bucket({"a": folder, "x:y z": folder}))

    async def scenario() -> None:
        await asyncio.gather(ids.load(f"{BASE}:a"), ids.load(f"{BASE}:x:y z"))
        both = [catalog.select(f"{BASE}:{name}").adapters for name in ("a", "x:y z")]
        assert both[0] == both[1]

    asyncio.run(scenario())


def test_an_outage_is_not_remembered(tmp_path: Path) -> None:
    bucket = Bucket({"a": write_peft(tmp_path / "a", 1.0)}, outages=1)
    ids, _ = make_ids(Store(tmp_path / "store"), bucket)

    async def scenario() -> None:
        with pytest.raises(UnavailableError):
            await ids.load(f"{BASE}:a")
        assert await ids.load(f"{BASE}:a") is not None

    asyncio.run(scenario())


def test_what_the_bucket_lacks_the_store_may_have(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    store.add("mine", make_adapter(3.0), BASE_SPEC)
    ids, catalog = make_ids(store, Bucket({}))

    async def scenario() -> None:
        assert await ids.load(f"{BASE}:mine") is None
        assert catalog.select(f"{BASE}:mine").adapters == catalog.select("mine").adapters
        with pytest.raises(UnknownModelError):
            await ids.load(f"{BASE}:other")

    asyncio.run(scenario())


@pytest.mark.parametrize("adapter", ["", "..", "a/../b", "/a", "a/", "."])
def test_an_id_that_leads_elsewhere_is_not_fetched(tmp_path: Path, adapter: str) -> None:
    bucket = Bucket({})
    ids, _ = make_ids(Store(tmp_path / "store"), bucket)
    with pytest.raises(UnknownModelError):
        asyncio.run(ids.load(f"{BASE}:{adapter}"))
    assert bucket.fetched == []


def test_an_unknown_id_is_told_as_the_client_wrote_it(tmp_path: Path) -> None:
    _, catalog = make_ids(Store(tmp_path / "store"), None)
    with pytest.raises(UnknownModelError, match=rf"^model: there is no model '{BASE}:a b'"):
        catalog.select(f"{BASE}:a b")
