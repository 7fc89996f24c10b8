"""The wrapped model on paged attention gives transformers' own logits, family by family."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import FAMILIES, VOCABULARY, greedy, make_model, save_model

from quickchange_server.adapters.manager import NoAdapters
from quickchange_server.engine.model_runner import Runner
from quickchange_server.engine.scheduling.kv_cache_manager import KVBlocks
from quickchange_server.engine.scheduling.scheduler import Scheduler
from quickchange_server.engine.scheduling.sequence import Sequence
from quickchange_server.engine.token_masks import NoConstraints
from quickchange_server.model.loading.model_loader import load_model
from quickchange_server.protocol import SamplingParams, Submit
from quickchange_server.spec_decode.speculator import NoSpeculation

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_generation_in_chunks_equals_transformers(family: str, tmp_path: Path) -> None:
    path = save_model(family, tmp_path)
    loaded = load_model(str(path), dtype=torch.float32, device=CPU, adapters=True)
    assert loaded.vocabulary == VOCABULARY
    runner = Runner(
        loaded,
        NoAdapters(),
        NoConstraints(0).masks,
        num_blocks=32,
        block_size=4,
        most_graph_rows=3,
        max_model_len=100,
        dtype=torch.float32,
        device=CPU,
    )
    drafts = NoSpeculation()
    scheduler = Scheduler(
        KVBlocks(32, 4),
        NoAdapters(),
        drafts,
        max_batch_tokens=8,
        max_sequences=3,
        max_model_len=100,
    )
    prompts = {"a": list(range(1, 20)), "b": [5, 6], "c": [9] * 7}
    sequences = {}
    for name, prompt in prompts.items():
        sampling = SamplingParams(max_tokens=12, temperature=0)
        sequences[name] = Sequence(Submit(name, tuple(prompt), sampling, seed=0), 0.0)
        scheduler.add(sequences[name])
    while plan := scheduler.schedule(0.0):
        flight = runner.launch(plan, drafts)
        scheduler.launched(plan)
        results = iter(flight.ran().results)
        for item in plan:
            tokens = [row.token_id for row in next(results).sampled] if item.samples else []
            scheduler.settled(item, tokens)
    reference = make_model(family)
    for name, prompt in prompts.items():
        assert sequences[name].tokens[len(prompt) :] == greedy(reference, prompt, 12), name
