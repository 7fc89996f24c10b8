"""Adapters whose numbers overflow fail their own requests; no other request notices."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from engine_driver import Driver, make_engine, request
from tiny_models import greedy, make_model, save_model
from turbo_adapters import make_turbo, turbo_adapter

from quickchange_server.adapters.packing import build_image, page_shapes
from quickchange_server.errors import AdapterFailedError
from quickchange_server.model.loading.model_loader import load_model
from quickchange_store.canonical.canonical_adapter import CanonicalAdapter, LowRankUpdate

LAYER = "model.layers.0.mlp.down_proj"


def lora(path: str, value: float, shape: tuple[int, int]) -> CanonicalAdapter:
    """An update of rank 1 whose numbers are all `value`."""
    a, b = torch.full((1, shape[0]), value), torch.full((shape[1], 1), value)
    return CanonicalAdapter("LlamaForCausalLM", "tiny", {path: LowRankUpdate(a, b, 1.0)})


ADAPTERS = {
    "huge": lora(LAYER, 1e30, (80, 48)),
    "head": lora("lm_head", 1e30, (48, 97)),
    "fine": lora(LAYER, 0.1, (80, 48)),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("base"))


@pytest.fixture
def drive(base: Path) -> Iterator[Driver]:
    # Few blocks, so that what a broken request wrote is soon another's.
    engine = make_engine(base, ADAPTERS.__getitem__, kv_cache_bytes=1 << 17)
    yield Driver(engine)
    engine.close()


def refused(drive: Driver, name: str) -> None:
    last = drive.last[name]
    assert last.error_kind == "weights"
    assert "lower the weight, or mend the adapter" in (last.error or "")


@pytest.mark.parametrize(
    ("adapter", "weight"), [("huge", 1.0), ("head", 1.0), ("fine", 1e38), ("fine", -1e38)]
)
def test_a_request_that_overflows_fails_alone(drive: Driver, adapter: str, weight: float) -> None:
    prompts = {"plain": [1, 2, 3, 4, 5], "other": [9, 8, 7], "later": [5] * 40}
    drive.engine.submit(request("plain", prompts["plain"]))
    drive.engine.submit(request("broken", [1, 2, 3, 4, 5], [(adapter, weight)]))
    drive.engine.submit(request("mixed", [4, 4], [("fine", 1.0), (adapter, weight)]))
    drive.engine.submit(request("other", prompts["other"]))
    drive.finish("plain", "broken", "mixed", "other")
    drive.engine.submit(request("later", prompts["later"]))
    drive.finish("later")
    refused(drive, "broken")
    refused(drive, "mixed")
    for name, prompt in prompts.items():
        assert drive.tokens[name] == greedy(make_model("llama"), prompt, 10), name


def test_an_embedding_and_scores_that_overflow_fail_alone(drive: Driver) -> None:
    drive.engine.submit(request("embedding", [1, 2], [("huge", 1.0)], pooling="mean"))
    drive.engine.submit(request("scores", [1, 2], [("huge", 1.0)], prompt_logprobs=1))
    drive.engine.submit(request("plain", [3, 1, 4]))
    drive.finish("embedding", "scores", "plain")
    refused(drive, "embedding")
    refused(drive, "scores")
    assert drive.tokens["plain"] == greedy(make_model("llama"), [3, 1, 4], 10)


@pytest.mark.parametrize("value", [1e12, 1e30, float("nan")])
def test_heads_that_overflow_draft_nothing_and_change_no_token(base: Path, value: float) -> None:
    heads = make_turbo(48, 3, blocks_a_head=3)
    for block in heads.blocks:
        block.weight.fill_(value)
    engine = make_engine(base, {"heads": turbo_adapter(heads)}.__getitem__)
    drive = Driver(engine)
    engine.submit(request("drafted", [1, 2, 3], [("heads", 1.0)], max_tokens=30))
    drive.finish("drafted")
    engine.close()
    assert drive.tokens["drafted"] == greedy(make_model("llama"), [1, 2, 3], 30)


@pytest.mark.parametrize("part", ["a", "b"])
def test_numbers_beyond_a_narrower_dtype_name_the_setting(base: Path, part: str) -> None:
    model = load_model(str(base), dtype=torch.float32, device=torch.device("cpu"), adapters=True)
    shapes = page_shapes(model.groups, torch.float16)
    update = LowRankUpdate(torch.ones(1, 80), torch.ones(48, 1), 1.0)
    getattr(update, part).view(-1)[3] = 1e6
    adapter = CanonicalAdapter("LlamaForCausalLM", "tiny", {LAYER: update})
    with pytest.raises(AdapterFailedError, match="--adapter-dtype"):
        build_image(adapter, shapes, torch.float16)
    build_image(adapter, page_shapes(model.groups, torch.bfloat16), torch.bfloat16)
