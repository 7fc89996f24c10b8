"""Updates behind norms: called for a norm that an adapter on the device updates, and no other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engine_driver import Driver, make_engine, request
from tiny_models import save_model

from quickchange_server.model import norm_side
from quickchange_store.canonical.canonical_adapter import CanonicalAdapter, LowRankUpdate

HIDDEN = 48


def adapter(module: str, rank: int = 0) -> CanonicalAdapter:
    gain = None if rank else torch.full((HIDDEN,), 1.5)
    update = LowRankUpdate(torch.ones(rank, HIDDEN), torch.ones(HIDDEN, rank), 1.0, gain=gain)
    return CanonicalAdapter("Tiny", "tiny", {f"model.layers.1.{module}": update})


ADAPTERS = {
    "lora": adapter("self_attn.o_proj", rank=4),
    "before attention": adapter("input_layernorm"),
    "before the MLP": adapter("post_attention_layernorm"),
    "rank on a norm": adapter("input_layernorm", rank=4),
}


@pytest.mark.parametrize(
    ("name", "calls_a_pass"), [("lora", 0), ("before attention", 1), ("before the MLP", 1)]
)
def test_only_norms_that_an_adapter_on_the_device_updates_are_followed(
    name: str, calls_a_pass: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(save_model("llama", tmp_path), ADAPTERS.__getitem__)
    calls = []
    real = norm_side.lowrank_

    def counted(*args: object) -> None:
        calls.append(args)
        real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(norm_side, "lowrank_", counted)
    drive = Driver(engine)
    engine.submit(request("plain", [1, 2, 3], max_tokens=2))
    drive.finish("plain")
    assert not calls
    engine.submit(request("adapted", [1, 2, 3], [(name, 1.0)], max_tokens=4))
    drive.finish("adapted")
    engine.close()
    assert len(calls) == 4 * calls_a_pass


def test_an_update_of_a_norm_that_has_a_rank_is_refused_by_name(tmp_path: Path) -> None:
    engine = make_engine(save_model("llama", tmp_path), ADAPTERS.__getitem__)
    drive = Driver(engine)
    engine.submit(request("a", [1, 2, 3], [("rank on a norm", 1.0)], max_tokens=2))
    engine.submit(request("b", [1, 2, 3], [("before attention", 1.0)], max_tokens=2))
    drive.finish("a", "b")
    engine.close()
    assert "model.layers.1.input_layernorm is a norm" in str(drive.moves)
    assert len(drive.tokens["b"]) == 2
