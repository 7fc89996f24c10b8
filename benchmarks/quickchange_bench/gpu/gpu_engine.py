"""Decode steps of the engine on a GPU, without server or store.

A random Llama decodes with and without CUDA graphs, over a number of distinct adapters.

Needs torch, triton, transformers, safetensors, pydantic-settings and cachetools alone.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from quickchange_bench.models.random_base import SHAPES, LlamaShape
from quickchange_server.adapters.module_groups import ModuleGroup
from quickchange_server.config import Settings
from quickchange_server.engine import model_runner
from quickchange_server.engine.engine import Engine
from quickchange_server.model import paged_attention
from quickchange_server.model.cuda_graphs import capture_for
from quickchange_server.model.loading.model_loader import LoadedModel, prepare
from quickchange_server.protocol import Component, SamplingParams, Submit
from quickchange_store.canonical.canonical_adapter import CanonicalAdapter, LowRankUpdate

RANK = 16
PROMPT = 128  # tokens
WARM_UP, STEPS = 8, 40
DEADLINE = 60.0  # seconds for all adapters to arrive and all prompts to be computed
_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class DecodeLoad:
    """`rows` decoding sequences, in turn over a number of adapters (0: the plain base)."""

    rows: int
    adapters: int


@dataclass(frozen=True, slots=True)
class Decoded:
    """Median step times in seconds."""

    load: DecodeLoad
    graphs: bool
    seconds: float
    floor: float  # by the bytes that a step must move
    ready_seconds: float  # from the requests to all of them decoding: adapters, prompts

    @property
    def tokens_per_second(self) -> float:
        return self.load.rows / self.seconds


LOADS = [
    DecodeLoad(1, 0), DecodeLoad(1, 1), DecodeLoad(8, 0), DecodeLoad(8, 1), DecodeLoad(8, 8),
    DecodeLoad(32, 0), DecodeLoad(32, 1), DecodeLoad(32, 8), DecodeLoad(32, 32),
]  # fmt: skip


def random_llama(shape: LlamaShape, device: torch.device, dtype: torch.dtype) -> LoadedModel:
    """A Llama of this shape with random weights, made on the device."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    paged_attention.register()
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=8_192,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        tie_word_embeddings=shape.tied,
    )
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            config, attn_implementation=paged_attention.NAME, dtype=dtype
        )
    return prepare(model.to(device, dtype).eval(), adapters=True)


def suitable_shape(device: torch.device) -> str:
    """Name of the largest shape that fits the device."""
    if device.type != "cuda":
        return "tiny"
    free, _ = torch.cuda.mem_get_info(device)
    return "llama-8b" if free > 30 * _GIB else "llama-1b"


def decode_steps(
    name: str, device: torch.device, bandwidth: float, left: Callable[[], float]
) -> Iterator[Decoded]:
    """Measure every load with CUDA graphs, where there are any, and without, while time is left."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = random_llama(SHAPES[name], device, dtype)
    for graphs in (True, False) if device.type == "cuda" else (False,):
        capture = capture_for if graphs else lambda _device: None
        with mock.patch.object(model_runner, "capture_for", capture):
            engine = _engine(model, device, dtype)
        try:
            for load in LOADS:
                if left() > 0:
                    yield _decode(engine, model, load, graphs, bandwidth)
        finally:
            engine.close()
        del engine


def _engine(model: LoadedModel, device: torch.device, dtype: torch.dtype) -> Engine:
    most = max(load.rows for load in LOADS)
    small = device.type != "cuda"
    settings = Settings.model_validate(
        {
            "model": "random",
            "store": Path(),
            "device": device.type,
            "dtype": str(dtype).removeprefix("torch."),
            "max_sequences": most,
            "max_batch_tokens": 2048,
            "max_model_len": 1024,
            "kv_cache_bytes": (_GIB >> 6) if small else 6 * _GIB,
            "prefix_cache": False,
            "adapter_device_bytes": (_GIB >> 5) if small else 4 * _GIB,
            "adapter_host_bytes": 8 * _GIB,
            "turbo": False,
        }
    )
    return Engine(
        model,
        settings,
        load_adapter=lambda digest, _: _random_adapter(model, digest),
        on_wake=lambda: None,
    )


def _random_adapter(model: LoadedModel, digest: str) -> CanonicalAdapter:
    """Rank 16 on all seven projections. The numbers are the same in all; on the device each has
    pages of its own, which is what counts."""
    updates = {
        member.path: LowRankUpdate(
            _random(RANK, group.in_features), _random(member.width, RANK), 1.0
        )
        for group in _projections(model)
        for member in group.members
    }
    return CanonicalAdapter("LORA", digest, updates)


def _projections(model: LoadedModel) -> list[ModuleGroup]:
    """Linears of attention and MLP, by their input."""
    return [
        group
        for group in model.groups
        if group.kind == "linear"
        and group.source == "input"
        and "lm_head" not in group.members[0].path
    ]


@cache
def _random(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.01


def _decode(
    engine: Engine, model: LoadedModel, load: DecodeLoad, graphs: bool, bandwidth: float
) -> Decoded:
    keys = [f"{load.rows}/{load.adapters}/{row}" for row in range(load.rows)]
    generator = torch.Generator().manual_seed(0)
    started = time.perf_counter()
    for row, key in enumerate(keys):
        prompt = torch.randint(model.vocabulary, (PROMPT,), generator=generator).tolist()
        adapters = (Component(f"adapter-{row % load.adapters}"),) if load.adapters else ()
        sampling = SamplingParams(max_tokens=800, temperature=0.0)
        engine.submit(Submit(key, tuple(prompt), sampling, adapters, seed=row))
    while not _all_decode(engine, load.rows):
        if time.perf_counter() - started > DEADLINE:
            raise TimeoutError(f"{load}: not all decode after {DEADLINE:.0f} s")
        engine.poll_adapters()
        report = engine.step()
        if report is None:
            time.sleep(0.001)  # an adapter is on its way
            continue
        if errors := [delta.error for delta in report.deltas if delta.error]:
            raise RuntimeError(f"{load}: {errors[0]}")
    ready = time.perf_counter() - started
    times = [_step_seconds(engine) for _ in range(WARM_UP + STEPS)][WARM_UP:]
    context = PROMPT + WARM_UP + STEPS // 2
    for key in keys:
        engine.cancel(key)
    floor = _bytes_moved(model, load, context) / bandwidth
    return Decoded(load, graphs, statistics.median(times), floor, ready)


def _all_decode(engine: Engine, rows: int) -> bool:
    running = engine.scheduler.running
    return len(running) == rows and all(sequence.remaining == 1 for sequence in running)


def _step_seconds(engine: Engine) -> float:
    """The tokens come back to the host, so the device is done when a step returns."""
    started = time.perf_counter()
    engine.poll_adapters()
    engine.step()
    return time.perf_counter() - started


def _bytes_moved(model: LoadedModel, load: DecodeLoad, context: int) -> int:
    """Bytes of a step: weights once (few rows of the embedding), adapter pages, keys and values."""
    embedding = model.module.get_input_embeddings().weight  # type: ignore[operator]
    weights = sum(p.nbytes for p in model.module.parameters() if p is not embedding)
    head = model.module.get_output_embeddings().weight  # type: ignore[operator]
    tied = int(head.nbytes) if head is embedding else 0
    size = int(head.itemsize)
    pages = sum(
        RANK * (group.in_features * len(group.members) + group.out_features)
        for group in _projections(model)
    )
    values = sum(2 * shape.kv_heads * shape.head_size for shape in model.layers.values())
    return weights + tied + size * (load.adapters * pages + load.rows * context * values)
