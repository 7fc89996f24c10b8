"""Versions without a name: published, kept from gc, discarded; and merging as a program."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from quickchange_store.canonical.adapter_bytes import digest
from quickchange_store.canonical.canonical_adapter import CanonicalAdapter, LowRankUpdate
from quickchange_store.combining.merging import Recipe, job, merge, result, run
from quickchange_store.errors import AdapterNotFoundError, UnsupportedFeatureError
from quickchange_store.store import Store

MODULE = "model.layers.0.self_attn.q_proj"


def make(value: float) -> CanonicalAdapter:
    a = torch.arange(8.0).reshape(2, 4) * value - 3
    update = LowRankUpdate(a, torch.ones(4, 2) * value, 1.0)
    return CanonicalAdapter("LlamaForCausalLM", "tiny", {MODULE: update})


def age(store: Store, key: str, seconds: float) -> None:
    past = time.time() - seconds
    os.utime(store.path(key).parent, (past, past))


def test_a_version_without_a_name_is_loaded_by_its_digest_and_listed_nowhere(
    tmp_path: Path,
) -> None:
    store = Store(tmp_path)
    key = store.publish(make(1.0))
    assert key == digest(make(1.0))
    assert digest(store.load(key)) == key
    assert store.names() == ()
    assert store.snapshot().digests() == set()


def test_gc_takes_a_version_without_a_name_unless_it_is_kept(tmp_path: Path) -> None:
    store = Store(tmp_path)
    kept, left = store.publish(make(1.0)), store.publish(make(2.0))
    for key in (kept, left):
        age(store, key, 100)
    assert store.keep(kept)
    assert store.gc(min_age=50).versions == (left,)
    assert store.path(kept).is_file()
    assert not store.keep(left)


def test_discard_removes_at_once_what_no_name_refers_to(tmp_path: Path) -> None:
    store = Store(tmp_path)
    named, unnamed = store.add("a", make(1.0)).digest, store.publish(make(2.0))
    store.publish(make(1.0))
    for key in (named, unnamed, "0" * 64):
        store.discard(key)
    assert store.path(named).is_file()
    with pytest.raises(AdapterNotFoundError):
        store.path(unnamed)
    assert not list((tmp_path / "tmp").iterdir())


def test_discard_leaves_what_was_kept_lately(tmp_path: Path) -> None:
    store = Store(tmp_path)
    digest = store.publish(make(1.0))
    age(store, digest, 100)
    assert store.keep(digest)
    store.discard(digest, 50)
    assert store.path(digest).is_file()
    age(store, digest, 100)
    store.discard(digest, 50)
    assert not store.keep(digest)


def recipe(store: Store, *adapters: CanonicalAdapter) -> Recipe:
    added = [store.add(f"a{index}", adapter) for index, adapter in enumerate(adapters)]
    return Recipe("ties", tuple((version.digest, 0.5) for version in added), 0.5)


def test_a_job_publishes_what_merge_makes(tmp_path: Path) -> None:
    store = Store(tmp_path)
    wanted = recipe(store, make(1.0), make(2.0))
    key = result(json.dumps(run(job(store, wanted))).encode())
    adapters = [store.load(component) for component, _ in wanted.components]
    assert key == digest(merge(wanted, adapters)) == digest(store.load(key))
    assert store.info(key).source["strategy"] == "ties"


def test_a_refusal_crosses_the_programs_border(tmp_path: Path) -> None:
    store = Store(tmp_path)
    activated = replace(make(2.0).updates[MODULE], activation="relu")
    wanted = recipe(store, make(1.0), replace(make(2.0), updates={MODULE: activated}))
    output = json.dumps(run(job(store, wanted))).encode()
    with pytest.raises(UnsupportedFeatureError, match=MODULE) as refused:
        result(output)
    assert refused.value.remedy is not None
