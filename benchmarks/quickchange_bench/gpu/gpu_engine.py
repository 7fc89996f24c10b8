"""The engine on a GPU under loads of several sizes, without server or store.

A Llama of a known shape with random weights; adapters and draft heads of random numbers. Needs
torch, triton, transformers, safetensors, pydantic-settings and cachetools alone.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import count
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from quickchange_bench.models.random_base import SHAPES, LlamaShape
from quickchange_server.adapters.module_groups import ModuleGroup
from quickchange_server.config import Settings
from quickchange_server.engine.engine import Engine
from quickchange_server.engine.step_results import Flight
from quickchange_server.model import paged_attention
from quickchange_server.model.loading.model_loader import LoadedModel, prepare
from quickchange_server.protocol import Component, Drafting, SamplingParams, Submit
from quickchange_store.canonical.canonical_adapter import CanonicalAdapter, LowRankUpdate
from quickchange_store.canonical.turbo_part import DraftBlock, TurboHeads

RANK, HEADS = 16, 3
TURBO = "turbo"  # name of the adapter with draft heads
DEADLINE = 60.0  # seconds for all adapters to arrive and all prompts to be computed
_GIB = 1 << 30
_number = count()


@dataclass(frozen=True, slots=True)
class EngineScale:
    """Sizes of a run."""

    shape: str  # of the model
    seconds: float  # of each load
    prompt: int  # tokens
    long_prompt: int  # of the prefill's
    requests: tuple[int, ...]
    adapters: tuple[int, ...]  # distinct ones; no more than requests
    batch_tokens: int


FULL = EngineScale("llama-8b", 10.0, 256, 2048, (1, 16, 64), (0, 1, 16, 64), 2048)
DRY = EngineScale("tiny", 0.2, 8, 40, (1, 4), (0, 1, 4), 64)


@dataclass(frozen=True, slots=True)
class ServedLoad:
    """Requests that decoded together, each anew where it ended, for some seconds."""

    requests: int
    adapters: int
    drafting: str  # none, lookup, heads
    tokens_per_second: float
    step_ms: float  # median
    host_ms: float  # median of what a step takes without its wait for the device
    accepted: int  # drafts
    idle_share: float | None  # of the device, over some steps; None: it can't be told
    longest_gap_ms: float | None  # between two kernels in these steps
    ready_seconds: float  # from the requests to all of them decoding: adapters, prompts
    late_compilations: int
    late_captures: int


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


class BenchEngine:
    """An engine on a random model, and what it does with loads."""

    def __init__(self, model: LoadedModel, scale: EngineScale, device: torch.device) -> None:
        """Start it, as a server does."""
        self._scale, self._model, self._device = scale, model, device
        small = device.type != "cuda"
        options: dict[str, Any] = {
            "model": "random",
            "store": ".",
            "device": device.type,
            "max_sequences": max(scale.requests),
            "max_batch_tokens": scale.batch_tokens,
            "prefix_cache": False,  # prompts are alike
            "adapter_host_bytes": 8 * _GIB,
        }
        if small:
            options |= {"kv_cache_bytes": 16 << 20, "adapter_device_bytes": 32 << 20}
        self.engine = Engine(
            model,
            Settings.model_validate(options),
            load_adapter=lambda digest, _: random_adapter(model, digest),
            on_wake=lambda: None,
            depth=2,
        )

    def close(self) -> None:
        self.engine.close()

    def serve(self, requests: int, adapters: int, drafting: str = "none") -> ServedLoad:
        """Let so many requests decode, in turn over so many adapters (0: the plain base)."""
        started, before = time.perf_counter(), self.engine.stats()
        running: dict[str, int] = {}
        for place in range(requests):
            self._submit(running, place, adapters, drafting)
        while not self._all_decode(requests):
            if time.perf_counter() - started > DEADLINE:
                raise TimeoutError(f"not all of {requests} decode after {DEADLINE:.0f} s")
            self._step(running, adapters, drafting)
        ready = time.perf_counter() - started
        tokens = accepted = 0
        walls, hosts = [], []
        began = time.perf_counter()
        with _waits() as waited:
            while (now := time.perf_counter()) - began < self._scale.seconds:
                waited.clear()
                made, held = self._step(running, adapters, drafting)
                wall = time.perf_counter() - now
                tokens, accepted = tokens + made, accepted + held
                walls.append(wall)
                hosts.append(wall - sum(waited))
        took = time.perf_counter() - began
        idle, gap = self._idle(lambda: self._step(running, adapters, drafting))
        after = self.engine.stats()
        for key in running:
            self.engine.cancel(key)
        while self.engine.step() is not None:
            pass  # what was under way
        return ServedLoad(
            requests=requests,
            adapters=adapters,
            drafting=drafting,
            tokens_per_second=tokens / took,
            step_ms=1e3 * statistics.median(walls),
            host_ms=1e3 * statistics.median(hosts),
            accepted=accepted,
            idle_share=idle,
            longest_gap_ms=gap,
            ready_seconds=ready,
            late_compilations=after.late_compilations - before.late_compilations,
            late_captures=after.late_captures - before.late_captures,
        )

    def prefill(self, prompts: int) -> float:
        """Prompt tokens a second of long prompts, computed one after the other."""
        started = time.perf_counter()
        running: dict[str, int] = {}
        for place in range(prompts):
            self._submit(running, place, 0, "none", self._scale.long_prompt, new=1)
        while running:
            self._step(running, None, "none")
        return prompts * self._scale.long_prompt / (time.perf_counter() - started)

    def _submit(
        self,
        running: dict[str, int],
        place: int,
        adapters: int,
        drafting: str,
        length: int | None = None,
        new: int = 800,
    ) -> None:
        key = f"{next(_number)}"
        generator = torch.Generator().manual_seed(place)
        length = self._scale.prompt if length is None else length
        prompt = torch.randint(self._model.vocabulary, (length,), generator=generator).tolist()
        chosen = (Component(f"adapter-{place % adapters}"),) if adapters else ()
        drafts = {"none": None, "lookup": Drafting(lookup=True), "heads": Drafting(heads=TURBO)}
        sampling = SamplingParams(max_tokens=new, temperature=0.0)
        self.engine.submit(
            Submit(key, tuple(prompt), sampling, chosen, drafting=drafts[drafting], seed=place)
        )
        running[key] = place

    def _step(
        self, running: dict[str, int], adapters: int | None, drafting: str
    ) -> tuple[int, int]:
        """One step: tokens, and accepted drafts. Ended requests begin anew, unless `adapters` is
        None. Raises RuntimeError for one that failed."""
        self.engine.poll_adapters()
        report = self.engine.step()
        if report is None:
            time.sleep(0.001)  # an adapter is on its way
            return 0, 0
        for delta in report.deltas:
            if delta.error:
                raise RuntimeError(delta.error)
            if delta.finish_reason and delta.request_id in running:
                place = running.pop(delta.request_id)
                if adapters is not None:
                    self._submit(running, place, adapters, drafting)
        return (
            sum(len(delta.token_ids) for delta in report.deltas),
            sum(delta.accepted for delta in report.deltas),
        )

    def _all_decode(self, requests: int) -> bool:
        running = self.engine.scheduler.running
        return len(running) == requests and all(sequence.remaining == 1 for sequence in running)

    def _idle(self, step: Any, steps: int = 50) -> tuple[float | None, float | None]:
        """The device's idle share over some steps, and its longest gap in milliseconds."""
        if self._device.type != "cuda":
            return None, None
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(steps):
                step()
            torch.cuda.synchronize()
        kernels = [e for e in profile.events() if e.device_type == torch.profiler.DeviceType.CUDA]
        return gaps_between([(e.time_range.start, e.time_range.end) for e in kernels])


def gaps_between(spans: list[tuple[float, float]]) -> tuple[float | None, float | None]:
    """Share of the time that no span [µs] covers, from the first to the last; the longest gap in
    milliseconds. None without spans."""
    if not spans:
        return None, None
    spans = sorted(spans)
    end = first = spans[0][0]
    idle = longest = 0.0
    for start, stop in spans:
        gap = max(start - end, 0.0)
        idle, longest, end = idle + gap, max(longest, gap), max(end, stop)
    return (idle / (end - first) if end > first else 0.0), longest / 1e3


@contextmanager
def _waits() -> Iterator[list[float]]:
    """Seconds that steps wait for their results, as they come."""
    waited: list[float] = []
    ran = Flight.ran

    def timed(flight: Flight) -> Any:
        started = time.perf_counter()
        try:
            return ran(flight)
        finally:
            waited.append(time.perf_counter() - started)

    with mock.patch.object(Flight, "ran", timed):
        yield waited


def random_adapter(model: LoadedModel, digest: str) -> CanonicalAdapter:
    """Rank 16 on all seven projections, or draft heads. The numbers are the same in all; on the
    device each has pages of its own, which is what counts."""
    if digest == TURBO:
        return CanonicalAdapter("LORA", digest, {}, turbo=_heads(model.hidden))
    updates = {
        member.path: LowRankUpdate(
            _random(RANK, group.in_features), _random(member.width, RANK), 1.0
        )
        for group in model.groups
        if _is_projection(group)
        for member in group.members
    }
    return CanonicalAdapter("LORA", digest, updates)


def _is_projection(group: ModuleGroup) -> bool:
    """True for linears of attention and MLP, by their input."""
    linear = group.kind == "linear" and group.source == "input"
    return linear and "lm_head" not in group.members[0].path


@cache
def _heads(hidden: int) -> TurboHeads:
    blocks = tuple(DraftBlock(_random(hidden, hidden), torch.zeros(hidden)) for _ in range(HEADS))
    return TurboHeads(blocks, tuple((head,) for head in range(HEADS)))


@cache
def _random(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.01


def suitable_scale(device: torch.device) -> EngineScale:
    """The sizes that suit the device."""
    if device.type != "cuda":
        return DRY
    free, _ = torch.cuda.mem_get_info(device)
    shape = "llama-8b" if free > 30 * _GIB else "llama-1b"
    return EngineScale(shape, *[getattr(FULL, name) for name in EngineScale.__slots__[1:]])


def model_of(scale: EngineScale, device: torch.device) -> LoadedModel:
    """The scale's model, in the floats that a GPU serves."""
    return random_llama(SHAPES[scale.shape], device, torch.bfloat16)
