"""A stored adapter that is damaged fails its own requests; the others go on."""

from __future__ import annotations

from pathlib import Path

import torch
from engine_driver import Driver, make_engine, request
from tiny_models import save_model

from quickchange_store.canonical.canonical_adapter import CanonicalAdapter, LowRankUpdate
from quickchange_store.store import Store

PATH = "model.layers.0.mlp.down_proj"


def adapter(seed: int) -> CanonicalAdapter:
    torch.manual_seed(seed)
    update = LowRankUpdate(torch.randn(4, 80), torch.randn(48, 4), 0.5)
    return CanonicalAdapter("LlamaForCausalLM", "tiny", {PATH: update})


def test_a_damaged_version_is_never_served_and_disturbs_no_other(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    good, bad = (store.add(f"a{seed}", adapter(seed)).digest for seed in range(2))
    content = bytearray(store.path(bad).read_bytes())
    content[-7] ^= 16
    store.path(bad).write_bytes(content)
    engine = make_engine(save_model("llama", tmp_path / "base"), store.load)
    drive = Driver(engine)
    engine.submit(request("good", [1, 2, 3], [(good, 1.0)]))
    engine.submit(request("bad", [1, 2, 3], [(bad, 1.0)]))
    drive.finish("good", "bad")
    assert drive.last["good"].finish_reason == "length"
    assert drive.last["bad"].error_kind == "adapter"
    assert "add the adapter again" in (drive.last["bad"].error or "")
    store.add("a1", adapter(1))
    engine.submit(request("repaired", [1, 2, 3], [(bad, 1.0)]))
    drive.finish("repaired")
    engine.close()
    assert drive.last["repaired"].finish_reason == "length"
