"""Drives an engine directly, without processes: submit, step to the end, collect."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from quickchange_server.adapters.paced_copies import Pause
from quickchange_server.config import Settings
from quickchange_server.engine.engine import Engine
from quickchange_server.model.loading.model_loader import LoadedModel, load_model
from quickchange_server.protocol import (
    AdapterFailed,
    AdapterMoved,
    Component,
    Delta,
    Pooling,
    SamplingParams,
    Submit,
    TokenLogprobs,
)
from quickchange_server.structured_output.compiler import ConstraintCompiler
from quickchange_store.canonical.canonical_adapter import CanonicalAdapter


def make_engine(
    model: Path,
    load: Callable[[str], CanonicalAdapter] | None = None,
    constraints: ConstraintCompiler | None = None,
    on_wake: Callable[[], None] = lambda: None,
    on_begun: Callable[[tuple[str, ...]], None] = lambda _: None,
    depth: int | None = None,
    **options: object,
) -> Engine:
    """An engine on a small model. `load` finds adapters by digest."""
    settings = make_settings(model, options)
    loaded = load_model(
        str(model),
        dtype=torch.float32,
        device=torch.device(settings.device),
        adapters=settings.adapters,
        quantization=settings.quantization,
        extra_vocabulary=settings.spare_tokens,
    )
    return engine_of(loaded, settings, load, constraints, on_wake, on_begun, depth)


def make_settings(model: Path, options: Mapping[str, object]) -> Settings:
    small = {
        "block_size": 4,
        "kv_cache_bytes": 1 << 20,
        "max_batch_tokens": 16,
        "max_sequences": 8,
        "adapter_device_bytes": 16 << 20,
        "adapter_host_bytes": 16 << 20,
    }
    return Settings.model_validate({"model": str(model), "store": model, **small, **options})


def engine_of(
    loaded: LoadedModel,
    settings: Settings | Path,
    load: Callable[[str], CanonicalAdapter] | None = None,
    constraints: ConstraintCompiler | None = None,
    on_wake: Callable[[], None] = lambda: None,
    on_begun: Callable[[tuple[str, ...]], None] = lambda _: None,
    depth: int | None = None,
) -> Engine:
    """An engine on a model that is loaded already. settings: or a folder, and small ones."""
    if isinstance(settings, Path):
        settings = make_settings(settings, {})

    def read(digest: str, _: Pause) -> CanonicalAdapter:
        if load is None:
            raise FileNotFoundError(f"no adapter {digest}")
        return load(digest)

    return Engine(
        loaded,
        settings,
        load_adapter=read,
        on_wake=on_wake,
        constraints=constraints,
        on_begun=on_begun,
        depth=depth,
    )


def request(
    request_id: str,
    prompt: Sequence[int],
    adapters: Sequence[tuple[str, float]] = (),
    output: Sequence[int] = (),
    *,
    salt: str = "",
    background: bool = False,
    pooling: Pooling | None = None,
    seed: int = 0,
    **sampling: object,
) -> Submit:
    """A greedy request unless told otherwise."""
    options = {"max_tokens": 10, "temperature": 0.0, **sampling}
    return Submit(
        request_id,
        tuple(prompt),
        SamplingParams(**options),  # type: ignore[arg-type]
        tuple(Component(*adapter) for adapter in adapters),
        tuple(output),
        salt=salt,
        background=background,
        pooling=pooling,
        seed=seed,
    )


class Driver:
    """Collects what an engine says, and checks its integrity after every step."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.tokens: dict[str, list[int]] = {}
        self.logprobs: dict[str, list[TokenLogprobs]] = {}
        self.last: dict[str, Delta] = {}
        self.first: dict[str, Delta] = {}
        self.drafted: Counter[str] = Counter()
        self.accepted: Counter[str] = Counter()
        self.moves: list[AdapterMoved | AdapterFailed] = []

    def step(self) -> bool:
        """One step; False if there was nothing to do just now."""
        self.moves += self.engine.poll_adapters()
        report = self.engine.step()
        self.engine.check_integrity()
        for delta in () if report is None else report.deltas:
            self.first.setdefault(delta.request_id, delta)
            self.tokens.setdefault(delta.request_id, []).extend(delta.token_ids)
            self.logprobs.setdefault(delta.request_id, []).extend(delta.logprobs)
            self.drafted[delta.request_id] += delta.drafted
            self.accepted[delta.request_id] += delta.accepted
            if delta.finish_reason:
                assert delta.request_id not in self.last, "two ends of one request"
                self.last[delta.request_id] = delta
        return report is not None

    def finish(self, *request_ids: str, seconds: float = 60.0) -> None:
        """Step until these requests have ended."""
        deadline = time.monotonic() + seconds
        while not set(request_ids) <= set(self.last):
            assert time.monotonic() < deadline, f"not ended: {set(request_ids) - set(self.last)}"
            if not self.step():
                time.sleep(0.001)  # an adapter is loading
