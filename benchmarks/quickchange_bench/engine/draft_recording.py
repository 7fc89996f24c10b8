"""Recordings for the replay of drafting: outputs, whatever heads could draft in them, and prices.

Outputs are greedy and the engine's own. Heads' drafts are kept behind every token of them, with
each word of the prompt that a guide could put in the place of one and what the heads say behind it:
so a replay meets every draft that the engine could have met. Prices are of this machine, by dtype.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quickchange_bench.engine.turbo_tasks import Ask, demo_asks
from quickchange_server.adapters.manager import Residency
from quickchange_server.config import Settings
from quickchange_server.engine.model_runner import Runner
from quickchange_server.entrypoints.engine_start import token_text
from quickchange_server.entrypoints.in_process_engine import InProcessEngine
from quickchange_server.frontend.tokenizer import Text
from quickchange_server.protocol import Component, SamplingParams, Submit
from quickchange_server.spec_decode.draft_heads import DraftItem, HeadDrafter
from quickchange_server.spec_decode.prompt_lookup import TokenText, WordLookup
from quickchange_store.base_model.base_spec import base_spec
from quickchange_store.store import Store
from quickchange_training.demo import publish_demo_adapters
from quickchange_training.demo.tasks import TASKS

DTYPES: Mapping[str, Mapping[str, str]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"dtype": "float32", "quantization": "int8"},
}
_BASE, _BASE_HEADS = "base", "base-heads"
_MOST_ROWS = 256  # most rows priced
_PRICED_ITEMS = (1, 2, 4, 8, 16, 32)
_ROUNDS = 3
_TOGETHER = 16  # sequences in a step of the recording
_MOST_ITEMS = 256  # chains of one drafting call


class HeadNode(NamedTuple):
    """What the heads draft behind some drafts, and the prompt's word for the same place."""

    token: int
    chance: float
    word: int | None  # None: the prompt has none, or the same
    match: int  # characters that matched for the word


@dataclass(frozen=True)
class RecordedText:
    """One request. drafts: for each token of the output, nodes by the drafts between both."""

    prompt: tuple[int, ...]
    output: tuple[int, ...]
    drafts: tuple[Mapping[tuple[int, ...], HeadNode], ...]


@dataclass(frozen=True)
class RecordedTask:
    name: str
    adapted: bool  # False: the base answers
    depth: int  # of the heads
    stop: frozenset[int]  # tokens that end a text
    texts: tuple[RecordedText, ...]


@dataclass(frozen=True)
class MachinePrices:
    """Seconds of steps by rows, and of one pass of the heads by sequences that it drafts for."""

    steps: tuple[tuple[int, float], ...]
    passes: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class DraftRecording:
    tasks: tuple[RecordedTask, ...] = ()
    prices: Mapping[str, MachinePrices] = field(default_factory=dict)  # by dtype


def completed(
    recording: DraftRecording, model: Path, tasks: Sequence[str], count: int, dtypes: Sequence[str]
) -> DraftRecording:
    """The recording with `count` requests of each task that it lacks, in float32, and with the
    prices of each dtype that it lacks.

    Raises ValueError for an unknown task or dtype.
    """
    if unknown := [name for name in dtypes if name not in DTYPES]:
        raise ValueError(f"--dtypes {unknown[0]!r} is none of {', '.join(DTYPES)}")
    had = {task.name for task in recording.tasks}
    lacking = [name for name in tasks if name not in had]
    unpriced = [name for name in dtypes if name not in recording.prices]
    if not lacking and not unpriced:
        return recording
    found, prices = [*recording.tasks], {**recording.prices}
    with TemporaryDirectory(prefix="quickchange-replay-") as folder:
        store = Store(Path(folder))
        publish_demo_adapters(store, base_spec(str(model)))
        served = [*store.names(), _BASE]
        asks = list(demo_asks(lacking, model, served, _BASE, _BASE_HEADS, count))
        if asks:
            text = Text.load(str(model))
            with _engine(model, store, "float32") as engine:
                found += [_recorded(engine, store, text, ask) for ask in asks]
        for name in unpriced:
            with _engine(model, store, name) as engine:
                prices[name] = _prices(_Parts.of(engine), store)
    return DraftRecording(tuple(found), prices)


def save_recording(recording: DraftRecording, path: Path) -> None:
    """Write a recording as compressed JSON, whole or not at all."""
    content = asdict(recording)
    for task in content["tasks"]:
        task["stop"] = sorted(task["stop"])
        for text in task["texts"]:
            text["drafts"] = [[[*key, *node] for key, node in at.items()] for at in text["drafts"]]
    part = path.with_name(path.name + ".part")
    part.write_bytes(gzip.compress(json.dumps(content).encode()))
    part.replace(path)


def load_recording(path: Path) -> DraftRecording:
    """Read what `save_recording` wrote."""
    content = json.loads(gzip.decompress(path.read_bytes()))
    return DraftRecording(
        tuple(
            RecordedTask(
                task["name"],
                task["adapted"],
                task["depth"],
                frozenset(task["stop"]),
                _texts(task["texts"]),
            )
            for task in content["tasks"]
        ),
        {
            name: MachinePrices(_pairs(one["steps"]), _pairs(one["passes"]))
            for name, one in content["prices"].items()
        },
    )


def _texts(texts: Sequence[Mapping[str, Any]]) -> tuple[RecordedText, ...]:
    wide = len(HeadNode._fields)
    return tuple(
        RecordedText(
            tuple(text["prompt"]),
            tuple(text["output"]),
            tuple(
                {tuple(line[:-wide]): HeadNode(*line[-wide:]) for line in at}
                for at in text["drafts"]
            ),
        )
        for text in texts
    )


def _pairs(pairs: Sequence[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    return tuple([(count, seconds) for count, seconds in pairs])


@contextmanager
def _engine(model: Path, store: Store, dtype: str) -> Iterator[InProcessEngine]:
    settings = Settings.model_validate(
        {"model": str(model), "store": store.location, "prefix_cache": False, **DTYPES[dtype]}
    )
    with InProcessEngine(settings) as engine:
        yield engine


def _recorded(engine: InProcessEngine, store: Store, text: Text, ask: Ask) -> RecordedTask:
    sampling = SamplingParams(
        max_tokens=ask.max_tokens, temperature=0.0, stop_token_ids=text.eos_ids
    )
    adapters = () if ask.model == _BASE else (Component(store.resolve(ask.model).digest),)
    prompts = list(ask.prompts.values())
    submits = [
        Submit(str(k), prompt, sampling, adapters, seed=0) for k, prompt in enumerate(prompts)
    ]
    run = engine.run(submits, states=True, concurrency=_TOGETHER)
    heads = store.resolve(ask.turbo).digest
    words, parts = token_text(text), _Parts.of(engine)
    texts = []
    with _claimed(parts.tiers, [*(c.digest for c in adapters), heads]) as slots:
        components = tuple([(slots[c.digest], c.weight) for c in adapters])
        depth = parts.tiers.head_count(slots[heads])
        tree = _HeadTree(parts, DraftItem(0, slots[heads], depth, components), words)
        for prompt, done in zip(prompts, run.completions, strict=True):
            if done.states is None:
                raise RuntimeError(f"{ask.task}: a request ended without a token")
            drafts = tree.grown(prompt, done.token_ids, done.states)
            texts.append(RecordedText(prompt, done.token_ids, drafts))
    stop = frozenset(sampling.stop_token_ids)
    return RecordedTask(ask.task, bool(adapters), depth, stop, tuple(texts))


class _Parts(NamedTuple):
    """Parts of an engine that draft."""

    runner: Runner
    tiers: Residency
    drafter: HeadDrafter

    @classmethod
    def of(cls, engine: InProcessEngine) -> _Parts:
        inner = engine._engine
        tiers = inner._adapters
        if not isinstance(tiers, Residency):
            raise TypeError("an engine that serves no adapters has no heads")
        return cls(inner._runner, tiers, inner._runner._drafter)


@contextmanager
def _claimed(tiers: Residency, digests: Sequence[str]) -> Iterator[Mapping[str, int]]:
    """Device slots of adapters, which are held meanwhile."""
    tiers.claim("recording", list(dict.fromkeys(digests)))
    try:
        while (slots := tiers.ready("recording")) is None:
            tiers.poll()
            if (error := tiers.failed("recording")) is not None:
                raise RuntimeError(error)
        yield slots
    finally:
        tiers.release("recording")


class _Forced:
    """Guide that puts given drafts first, and keeps what the heads say behind each."""

    def __init__(self, prefixes: Sequence[tuple[int, ...]]) -> None:
        self.paths: list[list[int]] = [[] for _ in prefixes]
        self.said: list[list[tuple[int, float]]] = [[] for _ in prefixes]
        self._prefixes = prefixes

    def begin(self, tokens: Sequence[int], accepted: Sequence[int]) -> None:
        del tokens, accepted

    def revise(self, tokens: Sequence[int], chances: Sequence[float]) -> list[int]:
        for at, (token, chance) in enumerate(zip(tokens, chances, strict=True)):
            path, prefix = self.paths[at], self._prefixes[at]
            self.said[at].append((token, chance))
            path.append(prefix[len(path)] if len(path) < len(prefix) else token)
        return [path[-1] for path in self.paths]


@dataclass(frozen=True)
class _HeadTree:
    """Grows the nodes of one text. item: of its first row."""

    parts: _Parts
    item: DraftItem
    words: TokenText

    def grown(
        self, prompt: Sequence[int], output: Sequence[int], states: Tensor
    ) -> tuple[dict[tuple[int, ...], HeadNode], ...]:
        """Nodes for each token of the output; states [tokens, H]."""
        nodes: list[dict[tuple[int, ...], HeadNode]] = [{} for _ in output]
        known = [*prompt]
        lookups = []
        for token in output:
            lookups.append(WordLookup([*known], len(prompt), self.words))
            known.append(token)
        wanted: list[tuple[int, tuple[int, ...]]] = [(at, ()) for at in range(len(output))]
        while wanted:
            now, wanted = wanted[:_MOST_ITEMS], wanted[_MOST_ITEMS:]
            forced = self._drafted(now, output, states)
            for (at, prefix), path, said in zip(now, forced.paths, forced.said, strict=True):
                for place in range(len(prefix), len(said)):
                    before = tuple(path[:place])
                    token, chance = said[place]
                    found = lookups[at].find(1, [output[at], *before])
                    word = None if found is None or found.tokens[0] == token else found.tokens[0]
                    match = 0 if found is None else found.match
                    nodes[at][before] = HeadNode(token, chance, word, match)
                    if word is not None and place + 1 < len(said):
                        wanted.append((at, (*before, word)))
        return tuple(nodes)

    def _drafted(
        self, wanted: Sequence[tuple[int, tuple[int, ...]]], output: Sequence[int], states: Tensor
    ) -> _Forced:
        guide = _Forced([prefix for _, prefix in wanted])
        own = self.item
        items = [DraftItem(row, own.slot, own.depth, own.components) for row in range(len(wanted))]
        rows = [at for at, _ in wanted]
        tokens = torch.tensor([output[at] for at in rows])
        self.parts.drafter.draft(states[rows], tokens, items, self.parts.tiers, guide=guide)
        return guide


def _prices(parts: _Parts, store: Store) -> MachinePrices:
    steps = tuple(parts.runner.price_rows(_MOST_ROWS))
    digest = store.resolve(f"{next(iter(TASKS))}-heads").digest
    with _claimed(parts.tiers, [digest]) as slots:
        slot = slots[digest]
        rounds = [[_pass_seconds(parts, slot, n) for n in _PRICED_ITEMS] for _ in range(_ROUNDS)]
    passes = [(n, min(times)) for n, *times in zip(_PRICED_ITEMS, *rounds, strict=True)]
    return MachinePrices(steps, tuple(passes))


def _pass_seconds(parts: _Parts, slot: int, count: int) -> float:
    """Seconds of one pass for `count` sequences."""
    model = parts.runner._model
    hidden = torch.randn(count, model.hidden).to(model.dtype)
    tokens = torch.arange(count)
    depth = parts.tiers.head_count(slot)
    items = [DraftItem(row, slot, depth, ()) for row in range(count)]
    started = perf_counter()
    parts.drafter.draft(hidden, tokens, items, parts.tiers)
    return (perf_counter() - started) / depth
