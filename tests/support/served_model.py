"""A small model with three adapters in a store, and requests to it, for real engines."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny_models import save_model

from quickchange_server.config import Settings
from quickchange_server.protocol import Component, SamplingParams, Submit
from quickchange_store.base_model.base_spec import base_spec
from quickchange_store.canonical.canonical_adapter import CanonicalAdapter, LowRankUpdate
from quickchange_store.store import Store


def served_model(folder: Path) -> tuple[Settings, list[str]]:
    """Settings of an engine on it, and the adapters' digests."""
    model = save_model("llama", folder / "model")
    store = Store(folder / "store")
    digests = [
        store.add(f"adapter-{rank}", random_adapter(model, rank, seed=rank)).digest
        for rank in (4, 8, 24)
    ]
    settings = Settings(
        model=str(model),
        store=folder / "store",
        kv_cache_bytes=4 << 20,
        threads=1,
        prompt_lookup=False,  # the model has no tokenizer
    )
    return settings, digests


def random_adapter(model: Path, rank: int, seed: int) -> CanonicalAdapter:
    """Random updates of every linear of the layers."""
    generator = torch.Generator().manual_seed(seed)
    spec = base_spec(str(model))
    updates = {
        path: LowRankUpdate(
            torch.randn(rank, shape.in_features, generator=generator) * 0.2,
            torch.randn(shape.out_features, rank, generator=generator) * 0.2,
            scale=0.5,
        )
        for path, shape in spec.modules.items()
        if shape.kind == "linear" and "layers" in path
    }
    return CanonicalAdapter(spec.architecture, spec.name, updates)


def mixed_generations(digests: list[str], new_tokens: int) -> list[Submit]:
    """On the base, on each adapter and on two of them mixed; every second one is sampled."""
    compositions = [(), *[(Component(digest),) for digest in digests]]
    compositions.append((Component(digests[0], 0.7), Component(digests[1], -0.2)))
    compositions.append((Component(digests[0], 0.7, 0, 30), Component(digests[1], 1.0, 27)))
    return [
        Submit(
            request_id=f"r{index}",
            prompt=tuple(range(1 + index, 20 + 3 * index)),
            sampling=SamplingParams(
                max_tokens=new_tokens,
                temperature=(0.0, 1.0)[index % 2],
                top_p=0.9,
                repetition_penalty=1.1,
                presence_penalty=0.3,
                logprobs=2 if index == 1 else None,
            ),
            adapters=adapters,
            seed=index,
        )
        for index, adapters in enumerate(compositions)
    ]
