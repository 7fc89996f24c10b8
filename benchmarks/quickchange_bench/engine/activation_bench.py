"""First tokens of activated LoRAs (aLoRA) and of plain ones over a prefix that the base has read.

One conversation: the base reads a long text, then each adapter is called on it, as an agent's steps
are: a question of its own behind the shared text, then the invocation. The same random updates
answer once as aLoRA, from the invocation on, and once as LoRA, over the whole text. All adapters
are on the device before, so what is compared is the reading of the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from quickchange_bench.engine.perplexity import TEXT
from quickchange_bench.report_tables import MILLI, number, table
from quickchange_server.config import Settings
from quickchange_server.entrypoints.in_process_engine import EngineCompletion, InProcessEngine
from quickchange_server.frontend.adapter_spans import activated
from quickchange_server.frontend.tokenizer import Text
from quickchange_server.protocol import Component, SamplingParams, Submit
from quickchange_store.base_model.base_spec import base_spec
from quickchange_store.canonical.canonical_adapter import (
    BaseSpec,
    CanonicalAdapter,
    LowRankUpdate,
)

INVOCATION = "\n\n# Answer\n"  # whatever it is, it stands in no prefix
_B_STD = 0.015  # answers differ from the base's and are still text
_ROOM = 256  # tokens behind the prefix


@dataclass(frozen=True, slots=True)
class ActivationOptions:
    model: str
    prefix_tokens: int = 4000
    adapters: int = 3
    rank: int = 16
    dtype: str = "float32"
    threads: int = 2


@dataclass(frozen=True, slots=True)
class FirstTokens:
    """First tokens of one way of serving, in seconds, and prompt tokens found in the cache."""

    way: str
    seconds: tuple[float, ...]
    cached: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ActivationResult:
    prefix_tokens: int
    base: FirstTokens
    lora: FirstTokens
    alora: FirstTokens

    @property
    def ratio(self) -> float:
        """Median first-token time of LoRA over that of aLoRA."""
        return median(self.lora.seconds) / median(self.alora.seconds)


def measure_activation(options: ActivationOptions) -> ActivationResult:
    """Measure both ways on an engine in this process.

    Raises ValueError where the text beside the benchmarks is shorter than the prefix, and what
    `InProcessEngine` raises.
    """
    text = Text.load(options.model)
    prefix = text.encode_now(TEXT.read_text())[: options.prefix_tokens]
    if len(prefix) < options.prefix_tokens:
        raise ValueError(f"--prefix-tokens: the text has {len(prefix)}; give fewer")
    calls = tuple(text.encode_now(INVOCATION, add_special_tokens=False))
    prompts = [
        (*prefix, *text.encode_now(f"\n\nQuestion {k}: what is said of {k}?"), *calls)
        for k in range(options.adapters)
    ]
    spec = base_spec(options.model)
    names = [f"adapter-{k}" for k in range(options.adapters)]
    adapters = {name: random_adapter(spec, options.rank, seed) for seed, name in enumerate(names)}
    settings = Settings(
        model=options.model,
        store=Path(options.model),  # all adapters are at hand
        dtype=options.dtype,
        threads=options.threads,
        max_model_len=options.prefix_tokens + _ROOM,
        turbo=False,
    )
    invocations = dict.fromkeys(names, calls)
    with InProcessEngine(settings, adapters.__getitem__) as engine:
        warm = [submit(name, calls, (Component(name),)) for name in names]
        engine.run([*warm, submit("base", calls, ())])
        base = one_by_one(engine, "base", [submit("base", prefix, ())])
        alora = [
            submit(name, prompt, activated([Component(name)], invocations, prompt))
            for name, prompt in zip(names, prompts, strict=True)
        ]
        lora = [
            submit(name, prompt, (Component(name),))
            for name, prompt in zip(names, prompts, strict=True)
        ]
        return ActivationResult(
            options.prefix_tokens,
            base,
            lora=one_by_one(engine, "LoRA", lora),
            alora=one_by_one(engine, "aLoRA", alora),
        )


def submit(name: str, prompt: Sequence[int], adapters: tuple[Component, ...]) -> Submit:
    sampling = SamplingParams(max_tokens=1, temperature=0.0)
    return Submit(name, tuple(prompt), sampling, adapters, seed=0)


def one_by_one(engine: InProcessEngine, way: str, submits: Sequence[Submit]) -> FirstTokens:
    found: list[EngineCompletion] = []
    for one in submits:
        found += engine.run([one]).completions
    return FirstTokens(
        way,
        tuple(completion.first_token_seconds for completion in found),
        tuple(completion.cached_tokens for completion in found),
    )


def random_adapter(base: BaseSpec, rank: int, seed: int) -> CanonicalAdapter:
    """Random updates of every linear of the layers."""
    generator = torch.Generator().manual_seed(seed)
    updates = {
        path: LowRankUpdate(
            torch.randn(rank, shape.in_features, generator=generator) * shape.in_features**-0.5,
            torch.randn(shape.out_features, rank, generator=generator) * _B_STD,
            scale=2.0,
        )
        for path, shape in base.modules.items()
        if shape.kind == "linear" and path != base.output_head
    }
    return CanonicalAdapter(base.architecture, base.name, updates)


def activation_table(found: ActivationResult) -> str:
    """Markdown table of the first tokens."""
    rows = [
        [
            each.way,
            str(len(each.seconds)),
            number(median(each.seconds), 0, MILLI),
            number(min(each.seconds), 0, MILLI),
            number(max(each.seconds), 0, MILLI),
            number(median(each.cached), 0),
        ]
        for each in (found.base, found.lora, found.alora)
    ]
    header = ["over the prefix", "requests", "first token, ms", "least", "most", "cached tokens"]
    shared = (
        f"prefix of {found.prefix_tokens} tokens; aLoRA's first token {found.ratio:.1f}x sooner"
    )
    return f"{table(header, rows)}\n\n{shared}"
