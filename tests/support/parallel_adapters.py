"""Adapters of every kind for a tiny model, and requests under them that share batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from turbo_adapters import make_turbo

from quickchange_server.protocol import Component, Drafting, SamplingParams, Submit
from quickchange_store.base_model.base_spec import base_spec
from quickchange_store.canonical.canonical_adapter import (
    BaseSpec,
    CanonicalAdapter,
    LowRankUpdate,
    expert_path,
)
from quickchange_store.store import Store

NEW_TOKENS = 14


class _Drawn:
    """Random updates, the same for the same seed."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self._generator) * 0.2

    def update(self, features: int, width: int, rank: int, **parts: object) -> LowRankUpdate:
        a, b = self.normal(rank, features), self.normal(width, rank)
        return LowRankUpdate(a, b, scale=0.5, **parts)  # type: ignore[arg-type]


def adapters_of_every_kind(model: Path) -> dict[str, CanonicalAdapter]:
    """By kind, random adapters of every module that a kind may update."""
    spec = base_spec(str(model))
    linears = {
        path: (shape.in_features, shape.out_features)
        for path, shape in spec.modules.items()
        if shape.kind == "linear" and "layers" in path
    }
    made: dict[str, CanonicalAdapter] = {}

    def keep(name: str, updates: Mapping[str, LowRankUpdate]) -> None:
        made[name] = CanonicalAdapter(spec.architecture, spec.name, dict(updates))

    drawn = _Drawn(1)
    for rank in (4, 24):
        keep(
            f"rank-{rank}",
            {
                path: drawn.update(*sizes, rank, bias=drawn.normal(sizes[1]))
                for path, sizes in linears.items()
            },
        )
    keep(
        "gains",
        {
            path: drawn.update(
                *sizes,
                number % 3 * 4,
                gain=1 + drawn.normal(sizes[1]),
                bias=drawn.normal(sizes[1]),
            )
            for number, (path, sizes) in enumerate(linears.items())
        },
    )
    keep("ends-and-experts", _ends_and_experts(spec, drawn))
    sources = ("output", "stream", "residual")
    keep(
        "bottlenecks",
        {
            path: drawn.update(
                48,
                48,
                5,
                source=sources[number % 3],
                activation=("relu", "silu")[number % 2],
                shift=drawn.normal(5),
            )
            for number, path in enumerate(spec.sublayers)
        },
    )
    head = spec.head
    assert head is not None
    turbo = make_turbo(head.in_features, 3, vocabulary=range(5, 60), seed=3)
    made["turbo"] = CanonicalAdapter(
        spec.architecture, spec.name, dict(made["rank-4"].updates), turbo=turbo
    )
    return made


def _ends_and_experts(spec: BaseSpec, drawn: _Drawn) -> dict[str, LowRankUpdate]:
    """Updates of the embedding, the head, routers, norms and every other expert."""
    updates = {
        path: drawn.update(shape.in_features, shape.out_features, 4)
        for path, shape in spec.modules.items()
        if shape.kind in ("embedding", "router") or path == spec.output_head
    }
    for path, shape in spec.modules.items():
        if shape.kind == "norm":
            width = shape.out_features
            updates[path] = drawn.update(width, width, 0, gain=1 + drawn.normal(width))
    for parameter, part in spec.experts.items():
        for expert in range(0, part.experts, 2):
            updates[expert_path(parameter, expert)] = drawn.update(
                part.in_features, part.out_features, 6
            )
    return updates


def stored(model: Path, folder: Path) -> dict[str, str]:
    """Digests by kind of those adapters in a store."""
    store = Store(folder)
    adapters = adapters_of_every_kind(model)
    return {name: store.add(name, adapter).digest for name, adapter in adapters.items()}


def mixed_requests(digests: Mapping[str, str]) -> list[Submit]:
    """Requests for the base, each adapter and compositions; many share a prefix. The last one asks
    for its prompt's embedding."""
    one, two = digests["rank-4"], digests["gains"]
    compositions: Sequence[tuple[Component, ...]] = [
        (),
        *((Component(digest),) for digest in digests.values()),
        (Component(one, 0.7), Component(two, -0.4)),
        (Component(one, 0.7, 0, 19), Component(two, -0.4, 6)),
        (Component(digests["rank-24"], 0.5), Component(digests["ends-and-experts"], 0.5)),
        (),
        (Component(one),),
    ]
    heads = digests["turbo"]
    return [
        Submit(
            request_id=f"r{index}",
            prompt=(*range(3, 20), *range(index, index + 5 * (index % 3))),
            sampling=SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, logprobs=1),
            adapters=adapters,
            drafting=Drafting(heads=heads) if Component(heads) in adapters else None,
            pooling="mean" if index == len(compositions) - 1 else None,
            seed=index,
        )
        for index, adapters in enumerate(compositions)
    ]
