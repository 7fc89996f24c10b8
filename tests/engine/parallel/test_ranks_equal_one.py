"""Two ranks give token for token what one process gives, whatever shares the batch."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path

import deep_engine
import graph_ranks
import numpy as np
import pytest
from bought_drafts import buying_main
from client_support import tokens_of
from engine_driver import Driver, make_engine
from parallel_adapters import adapters_of_every_kind, mixed_requests, stored
from rank_groups import answered, settings_of
from tiny_models import save_model

from quickchange_server.engine_client.local.channel import EngineMain
from quickchange_server.entrypoints.engine_start import engine_main
from quickchange_server.protocol import AdapterMoved

SMALL = {"kv_cache_bytes": 1 << 16, "adapter_device_bytes": 400_000}


@pytest.mark.parametrize(
    ("family", "main"),
    [("llama", graph_ranks.main), ("qwen3", deep_engine.main), ("qwen3_moe", engine_main)],
    ids=["llama-graphs", "qwen3-overlapped", "qwen3_moe"],
)
def test_two_ranks_equal_one_with_adapters_of_every_kind(
    family: str, main: EngineMain, tmp_path: Path
) -> None:
    model = save_model(family, tmp_path / "model")
    digests = stored(model, tmp_path / "store")
    adapters = {digests[name]: each for name, each in adapters_of_every_kind(model).items()}
    wanted = mixed_requests(digests)
    small = settings_of(model, tmp_path / "store", 1, **SMALL).model_dump(exclude={"model"})
    alone = Driver(make_engine(model, adapters.__getitem__, **small))
    for each in wanted:
        alone.engine.submit(each)
    alone.finish(*[each.request_id for each in wanted])
    alone.engine.close()

    together = answered(
        settings_of(model, tmp_path / "store", 2, **SMALL), wanted, partial(buying_main, main)
    )

    for each, deltas in zip(wanted, together, strict=True):
        assert deltas[-1].finish_reason == alone.last[each.request_id].finish_reason, deltas[-1]
        assert tokens_of(deltas) == alone.tokens[each.request_id], each
    embedded, expected = together[-1][-1].embedding, alone.last[wanted[-1].request_id].embedding
    assert embedded is not None
    assert expected is not None
    np.testing.assert_allclose(
        np.frombuffer(embedded, "<f4"), np.frombuffer(expected, "<f4"), rtol=1e-3, atol=1e-3
    )
    assert any(isinstance(m, AdapterMoved) and m.reason == "evict" for m in alone.moves)
    assert alone.engine.scheduler.preemptions > 0
    assert alone.engine.scheduler.prefix_hit_tokens > 0
    assert sum(delta.drafted for delta in itertools.chain(*together)) > 0
    assert len({tuple(tokens) for tokens in alone.tokens.values()}) > len(digests)
