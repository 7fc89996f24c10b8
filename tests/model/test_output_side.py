"""Steps without adapters that read behind sub-layers do no work for them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engine_driver import Driver, make_engine, request
from tiny_models import save_model

from quickchange_server.model import output_side
from quickchange_store.canonical.canonical_adapter import CanonicalAdapter, LowRankUpdate, Source

HIDDEN, LAYERS = 48, 3


def adapter(source: Source, module: str) -> CanonicalAdapter:
    update = LowRankUpdate(
        torch.ones(8, HIDDEN), torch.ones(HIDDEN, 8), 1.0, activation="relu", source=source
    )
    return CanonicalAdapter("Tiny", "tiny", {f"model.layers.1.{module}": update})


ADAPTERS = {
    "lora": adapter("input", "self_attn.o_proj"),
    "output": adapter("output", "self_attn.o_proj"),
    "residual": adapter("residual", "mlp.down_proj"),
    "stream": adapter("stream", "mlp.down_proj"),
}


@pytest.mark.parametrize(
    ("name", "calls_a_pass", "kept_a_pass"),
    [("lora", 0, 0), ("output", 1, 0), ("residual", 1, 1), ("stream", 1, 1)],
)
def test_only_groups_that_an_adapter_on_the_device_uses_are_called(
    name: str,
    calls_a_pass: int,
    kept_a_pass: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = make_engine(save_model("llama", tmp_path), ADAPTERS.__getitem__)
    calls, kept = [], []
    real = output_side.lowrank_

    def counted(*args: object) -> None:
        calls.append(args)
        real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(output_side, "lowrank_", counted)
    add = output_side.OutputSide.add_

    def watched(side: output_side.OutputSide, y: torch.Tensor, adapters: object) -> None:
        if side._entered is not None:
            kept.append(y)
        add(side, y, adapters)  # type: ignore[arg-type]

    monkeypatch.setattr(output_side.OutputSide, "add_", watched)
    drive = Driver(engine)
    engine.submit(request("plain", [1, 2, 3], max_tokens=2))
    drive.finish("plain")
    assert not calls
    engine.submit(request("adapted", [1, 2, 3], [(name, 1.0)], max_tokens=4))
    drive.finish("adapted")
    engine.close()
    assert len(calls) == 4 * calls_a_pass
    assert len(kept) == 4 * kept_a_pass
